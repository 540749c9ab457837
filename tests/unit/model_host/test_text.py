"""Text comes out in whole characters and never holds a stop string, however it was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_host.text import Detokenizer, StopFilter


def decode(ids: list[int]) -> str:
    """A tokeniser with one token per byte, like the byte fallback of real ones."""
    return bytes(ids).decode("utf-8", errors="replace")


def filtered(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    stop_filter = StopFilter(stops)
    out = [stop_filter.push(piece) for piece in pieces]
    return [*out, stop_filter.flush()], stop_filter.stopped


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    detokenizer = Detokenizer(decode)

    pieces = [detokenizer.push(byte) for byte in "a€b".encode()]

    assert pieces == ["a", "", "", "€", "b"]


def test_half_a_character_at_the_end_is_left_out() -> None:
    detokenizer = Detokenizer(decode)

    pieces = [detokenizer.push(byte) for byte in "a€".encode()[:-1]]

    assert [*pieces, detokenizer.flush()] == ["a", "", "", ""]


def test_a_leading_space_that_the_tokeniser_drops_at_the_start_is_kept_inside() -> None:
    # given a tokeniser that strips the first space of whatever it decodes
    words = {1: " Hello", 2: " there"}
    detokenizer = Detokenizer(lambda ids: "".join(words[token] for token in ids).removeprefix(" "))

    # when two words are pushed
    pieces = [detokenizer.push(1), detokenizer.push(2)]

    # then the space between them is there
    assert pieces == ["Hello", " there"]


@given(st.text())
def test_pieces_joined_are_the_text(text: str) -> None:
    detokenizer = Detokenizer(decode)

    pieces = [detokenizer.push(byte) for byte in text.encode()]

    assert "".join([*pieces, detokenizer.flush()]).rstrip("\ufffd") == text.rstrip("\ufffd")


@given(st.one_of(st.binary(max_size=60), st.text(max_size=20).map(str.encode)), st.data())
def test_however_tokens_come_together_and_whatever_they_are_their_text_is_the_same(
    tokens: bytes, data: st.DataObject
) -> None:
    detokenizer = Detokenizer(decode)
    pieces, at = [], 0
    while at < len(tokens):
        count = data.draw(st.integers(1, 9))
        pieces.append(detokenizer.push(*tokens[at : at + count]))
        at += count

    joined = "".join([*pieces, detokenizer.flush()])

    assert joined.rstrip("\ufffd") == decode(list(tokens)).rstrip("\ufffd")


@pytest.mark.parametrize("token", [0xE2, 0xBF, 0xFF], ids=["begun", "continued", "never"])
def test_broken_characters_without_end_are_given_out_and_decoded_a_few_times(token: int) -> None:
    longest = 0

    def measured(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    detokenizer = Detokenizer(measured)
    pieces = [detokenizer.push(token) for _ in range(4000)]

    assert len("".join(pieces)) > 3900
    assert longest < 50


def test_tokens_without_text_are_not_decoded_again_and_again() -> None:
    longest = 0

    def measured(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join("" if token == 0 else chr(token) for token in ids)

    detokenizer = Detokenizer(measured)

    assert "".join(detokenizer.push(token) for token in [65, *[0] * 4000, 66]) == "AB"
    assert longest < 50


def test_tokens_that_come_together_are_decoded_together() -> None:
    decoded = 0

    def counted(ids: list[int]) -> str:
        nonlocal decoded
        decoded += 1
        return decode(ids)

    assert Detokenizer(counted).push(*b"together") == "together"
    assert decoded == 2


def test_without_stops_everything_passes_at_once() -> None:
    assert filtered(["a", "b"], []) == (["a", "b", ""], False)


@pytest.mark.parametrize(
    ("pieces", "stops", "out", "stopped"),
    [
        (["one STOP two"], ["STOP"], "one ", True),
        (["one ST", "OP two"], ["STOP"], "one ", True),
        (["S", "T", "O", "P"], ["STOP"], "", True),
        (["one ST", "ART"], ["STOP"], "one START", False),
        (["one ST"], ["STOP"], "one ST", False),
        (["ab", "cd"], ["cd", "bc"], "a", True),
        (["aaab"], ["aab"], "a", True),
        (["a\n", "\nb"], ["\n\n"], "a", True),
    ],
)
def test_text_ends_before_the_first_stop(
    pieces: list[str], stops: list[str], out: str, stopped: bool
) -> None:
    given_out, ended = filtered(pieces, stops)

    assert "".join(given_out) == out
    assert ended is stopped


def test_only_what_may_become_a_stop_is_held_back() -> None:
    stop_filter = StopFilter(["STOP"])

    assert stop_filter.push("one S") == "one "
    assert stop_filter.push("ee") == "See"


@given(
    text=st.text("ab", max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_where_the_text_was_cut_makes_no_difference(text: str, cuts: list[int], stops: list[str]) -> None:
    ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    out, stopped = filtered(pieces, stops)

    joined = "".join(out)
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or joined == text
