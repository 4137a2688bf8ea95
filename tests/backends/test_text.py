"""Text that comes in pieces: characters over tokens, stop strings over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_redrafter.backends.base import FinishReason, Request, Result, SamplingParams
from trtllm_redrafter.backends.running import RunningRequest
from trtllm_redrafter.backends.text import MAX_HELD, TextStream


class Bytes:
    """One token per byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


def feed(stream: TextStream, text: str) -> tuple[list[str], bool]:
    """Pieces as a caller sees them, and whether a stop string ended the text."""
    pieces = []
    for token in text.encode():
        ended = stream.push(token)
        pieces.append(stream.take(final=ended))
        if ended:
            return pieces, True
    stream.finish()
    pieces.append(stream.take(final=True))
    return pieces, False


def test_half_characters_are_held_back() -> None:
    pieces, _ = feed(TextStream(Bytes()), "aé€😀z")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_a_stop_strings_beginning_is_held_back() -> None:
    pieces, ended = feed(TextStream(Bytes(), ["END"]), "a EN b EEND c")
    assert ended
    assert "".join(pieces) == "a EN b E"
    assert "E" not in pieces[2]


def test_the_earliest_stop_wins() -> None:
    stream = TextStream(Bytes(), ["cd", "bcd"])
    feed(stream, "abcd")
    assert (stream.text, stream.stop_reason) == ("a", "bcd")


@pytest.mark.parametrize("text", ["", "plain", "naïve", "日本語テキスト"])
def test_without_stops_everything_comes_out(text: str) -> None:
    stream = TextStream(Bytes())
    pieces, ended = feed(stream, text)
    assert "".join(pieces) == text == stream.text
    assert not ended


def test_unfinished_bytes_at_the_end_are_shown_as_such() -> None:
    stream = TextStream(Bytes())
    for token in b"ab\xe2\x82":
        stream.push(token)
    stream.finish()
    assert stream.take(final=True) == "ab\ufffd"


@given(st.text(alphabet="abEé😀", max_size=30), st.lists(st.text(alphabet="abEé", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_complete_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), stops)
    pieces, ended = feed(stream, text)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    assert ended == bool(ends)
    if ends:
        seen = text[: min(ends)]
        expected = text[: min(len(seen) - len(s) for s in stops if seen.endswith(s))]
    else:
        expected = text
    assert "".join(pieces) == expected


SPECIAL = {256: "<end>", 257: "<turn>"}


class WithSpecial(Bytes):
    """Bytes, and two special tokens."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        parts = [SPECIAL[t].encode() if t in SPECIAL else bytes([t]) for t in token_ids]
        shown = [p for p, t in zip(parts, token_ids, strict=True) if t not in SPECIAL or not skip_special_tokens]
        return b"".join(shown).decode(errors="replace")


def until_stop(tokens: Sequence[int], *stop: str, skip: bool = True) -> tuple[str, str, str | None]:
    """Text in pieces, whole text and the stop that ended it."""
    stream = TextStream(WithSpecial(), stop, special_tokens=SPECIAL, skip_special_tokens=skip)
    pieces, ended = [], False
    for token in tokens:
        ended = stream.push(token)
        pieces.append(stream.take(final=ended))
        if ended:
            break
    stream.finish()
    pieces.append(stream.take(final=True))
    return "".join(pieces), stream.text, stream.stop_reason


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<turn>", "ab"),  # a special token
        ("b<turn>", "a"),  # runs into one
        ("b<turn>c", "a"),  # has one in it
        ("<turn>cd", "ab"),  # begins with one
        ("rn>c", "ab"),  # begins within one
        ("cd<e", "abcd"),  # could run into another one, which does not come
        ("urn", "abcd"),  # lies within one: nobody sees it
        ("<", "abcd"),
        ("d", "abc"),
    ],
)
def test_stops_and_special_tokens(stop: str, text: str) -> None:
    tokens = [*b"ab", 257, *b"cd"]
    stopped = text != "abcd"
    assert until_stop(tokens, stop) == (text, text, stop if stopped else None)
    assert until_stop(tokens, "never", stop)[1:] == (text, stop if stopped else None)


def test_special_tokens_that_are_kept_are_text() -> None:
    tokens = [*b"ab", 257, *b"cd"]
    assert until_stop(tokens, skip=False) == ("ab<turn>cd", "ab<turn>cd", None)
    assert until_stop(tokens, "urn", skip=False) == ("ab<t", "ab<t", "urn")


def test_half_a_character_before_a_special_token() -> None:
    assert until_stop([*b"a\xe2\x82", 257, *b"b"], "<turn>b") == ("a\ufffd", "a\ufffd", "<turn>b")


@given(
    st.lists(st.sampled_from([*b"abE", 256, 257]), max_size=20), st.sampled_from(["b<turn>a", "<end>", "E<en", "ab"])
)
def test_stops_are_found_where_the_text_they_meet_has_them(tokens: list[int], stop: str) -> None:
    met = {"b<turn>a": 257, "<end>": 256, "E<en": 256}.get(stop)
    searched = WithSpecial().decode([t for t in tokens if t not in SPECIAL or t == met])
    place = searched.find(stop)
    _, text, reason = until_stop(tokens, stop)
    assert reason == (stop if place >= 0 else None)
    visible = searched[:place] if place >= 0 else searched
    assert text == (visible if met is None else visible.replace(SPECIAL[met], ""))


def test_text_that_never_becomes_a_character_is_given_out_and_costs_no_more_and_more() -> None:
    decoded = 0

    class Counting(Bytes):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
            nonlocal decoded
            decoded += len(token_ids)
            return super().decode(token_ids)

    stream, given_out = TextStream(Counting()), 0
    for i in range(1000):
        stream.push(0xE2)
        given_out += len(stream.take(final=False))
        assert i + 1 - given_out <= MAX_HELD + 1
    assert decoded < 1000 * 40 * MAX_HELD


def test_what_ends_a_text_and_what_it_leaves() -> None:
    def end(token: int, **changes: object) -> tuple[bool, object, str]:
        sampling = SamplingParams(9, **changes)  # type: ignore[arg-type]
        text = TextStream(
            WithSpecial(), sampling.stop, special_tokens=SPECIAL, skip_special_tokens=sampling.skip_special_tokens
        )
        running = RunningRequest(Request((1,), sampling), Result("r", 1), text, 0.0)
        count, reason = running.add((*b"hi", token), {256})
        assert count == 3
        running.finish(reason or FinishReason.LENGTH)
        return reason is FinishReason.STOP, running.result.stop_reason, running.result.text

    assert end(256) == (True, None, "hi")
    assert end(256, skip_special_tokens=False) == (True, None, "hi")
    assert end(256, ignore_eos=True) == (False, None, "hi")
    assert end(256, ignore_eos=True, skip_special_tokens=False) == (False, None, "hi<end>")
    assert end(256, stop=("<end>",)) == (True, "<end>", "hi")
    assert end(256, stop=("<end>",), ignore_eos=True) == (True, "<end>", "hi")
    assert end(ord("!"), stop_token_ids=(33,), ignore_eos=True) == (True, 33, "hi")
    assert end(ord("!")) == (False, None, "hi!")
