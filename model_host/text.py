"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes a growing token list without ever giving half a character.

    A piece is the difference between two decodings of a short window, because many tokenisers decode a token
    differently at the start of a text than inside it.

    Args:
        decode: tokens to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """What remains at the end, without an unfinished character."""
        known = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :]).rstrip(REPLACEMENT)
        self._window = self._read = len(self._ids)
        return text[len(known) :]


class StopFilter:
    """Passes text on up to the first stop string, holding back what may become one.

    Args:
        stops: the strings that end the text; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to give out now; after a stop string, nothing more."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        ready, self._held = self._held, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
