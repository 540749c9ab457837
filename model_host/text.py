"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# Tokens of a prompt that are decoded before its answer: enough to see where a word begins.
CONTEXT = 6
# Bytes of a character, and so the most tokens of one.
LONGEST_CHARACTER = 4
# Tokens that are waited for before they are taken for broken characters.
HELD = 3 * LONGEST_CHARACTER


class Detokenizer:
    """Decodes a growing token list without ever giving half a character.

    A piece is the difference between two decodings of a short window, because many tokenisers decode a token
    differently at the start of a text than inside it.

    Args:
        decode: tokens to text, special tokens left out.
        before: the tokens that the text continues; their own text is not given out.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = _tail(decode, before)
        self._window = 0
        self._read = len(self._ids)

    def push(self, *tokens: int) -> str:
        """The text that these tokens complete, decoded at once if possible; empty while a character is
        unfinished.
        """
        if len(tokens) > 1:
            self._ids += tokens
            known, text = self._decoded()
            if len(text) > len(known) and not text.endswith(REPLACEMENT):
                return self._advance(len(self._ids), text[len(known) :])
            # Some of them may be whole characters.
            del self._ids[-len(tokens) :]
        return "".join(map(self._push, tokens))

    def _push(self, token: int) -> str:
        self._ids.append(token)
        known, text = self._decoded()
        if len(text) > len(known) and not text.endswith(REPLACEMENT):
            return self._advance(len(self._ids), text[len(known) :])
        if len(self._ids) - self._read < HELD:
            return ""
        if text == known:
            del self._ids[self._read :]  # none of them is text
            return ""
        return self._give_out_broken(known, text)

    def _decoded(self) -> tuple[str, str]:
        """The text of the window that was given out, and all of it."""
        return self._decode(self._ids[self._window : self._read]), self._decode(self._ids[self._window :])

    def _advance(self, read: int, given: str) -> str:
        del self._ids[: self._read]
        self._window, self._read = 0, read - self._read
        return given

    def _give_out_broken(self, known: str, text: str) -> str:
        """Give out bytes that will never be a character, rather than decode ever more of them again.

        What comes before the last four tokens can change no more, for no character has more bytes. It is
        given out up to a token that ends with a character or with such a byte.
        """
        for read in range(len(self._ids) - LONGEST_CHARACTER, self._read, -1):
            ready = self._decode(self._ids[self._window : read])
            if len(ready) > len(known) and ready + self._decode(self._ids[read:]) == text:
                return self._advance(read, ready[len(known) :])
        return ""

    def flush(self) -> str:
        """What remains at the end, without an unfinished character."""
        known = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :]).rstrip(REPLACEMENT)
        self._window = self._read = len(self._ids)
        return text[len(known) :]


def _tail(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[int]:
    """The last of ``tokens`` that decode to some text which begins with a whole character."""
    size = CONTEXT
    while size < len(tokens):
        text = decode(list(tokens[-size:]))
        if text and not text.startswith(REPLACEMENT):
            break
        size *= 2
    return list(tokens[-size:])


class StopFilter:
    """Passes text on up to the first stop string, holding back what may become one.

    Args:
        stops: the strings that end the text; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[bool] = []  # of each character held, whether it is given out
        self.stopped = False

    def push(self, text: str, *, shown: bool = True) -> str:
        """The text that is safe to give out now; after a stop string, nothing more.

        Args:
            shown: whether ``text`` is part of the text, or only of what stop strings are looked for in.
        """
        if self.stopped:
            return ""
        if not self._stops:
            return text if shown else ""
        self._held += text
        self._shown += [shown] * len(text)
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - max(_overlap(self._held, stop) for stop in self._stops))

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        ready = "".join(
            character for character, shown in zip(self._held[:count], self._shown, strict=False) if shown
        )
        self._held, self._shown = self._held[count:], self._shown[count:]
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
