"""Text that comes in pieces: characters over tokens, stop strings over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_redrafter.backends.text import TextStream


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
