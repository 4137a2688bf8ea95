"""Token ids to text as they come, and stop strings across token borders.

A character can span tokens and a stop string can span steps, so text that might still change is held back: an
unfinished UTF-8 sequence, and any tail that could be the beginning of a stop string. Special tokens are left out of the
text, but a stop string may be one, contain one or overlap with one; then the search for stop strings sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from trtllm_redrafter.prompts.sampling import SamplingParams

if TYPE_CHECKING:
    from trtllm_redrafter.backends.tokenizer import EngineTokenizer

_UNFINISHED = "\ufffd"
_CONTEXT = 6
"""Tokens before the new ones that are decoded along: some tokenizers write a token differently at the start."""

MAX_HELD = 32
"""Tokens whose bytes may stay without a whole character; a character has at most four bytes."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that decoding needs."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class TextStream:
    """Text of one request. Feed tokens one at a time; `push` says whether a stop string is complete."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        *,
        special_tokens: Mapping[int, str] = MappingProxyType({}),
        skip_special_tokens: bool = True,
    ) -> None:
        """`special_tokens`: texts of the tokens that are left out of the text, by id."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        self._unseen = _overlapping(self._stop, special_tokens) if skip_special_tokens else {}
        self._token_ids: list[int] = []
        self._start = 0  # decoding begins here, at a token whose text is settled
        self._read = 0  # tokens before this are in `text`
        self._given = 0
        self._searched = ""  # `text` with the special tokens that overlap with stop strings, if there are any
        self._gaps: list[tuple[int, int, int]] = []  # their place in `_searched`, their size, and their place in `text`
        self.text = ""
        self.stop_reason: str | None = None

    @classmethod
    def of(cls, tokenizer: EngineTokenizer | None, sampling: SamplingParams) -> TextStream:
        """The stream of one request of an engine."""
        special = {} if tokenizer is None else tokenizer.special_tokens
        return cls(tokenizer, sampling.stop, special_tokens=special, skip_special_tokens=sampling.skip_special_tokens)

    def push(self, token_id: int, *, ends: bool = False) -> bool:
        """Add a token; True when it completes a stop string, whose text (and all after it) is cut off.

        `ends`: the token ends the text. As a special token it is then never part of it, skipped or not.
        """
        if ends and not self._skip:
            return False
        self._token_ids.append(token_id)
        if self._tokenizer is None or not self._stop:
            return False  # without stop strings, decoding can wait until someone takes the text
        before, special = len(self._seen), self._unseen.get(token_id)
        self._settle(final=special is not None)  # no character continues after a special token
        if special is not None:
            self._gaps.append((len(self._searched), len(special), len(self.text)))
            self._searched += special
        return self._cut(before)

    def finish(self) -> None:
        """No more tokens: settle what was held back, replacement characters included."""
        if self._tokenizer is not None and self.stop_reason is None:
            self._settle(final=True)

    def take(self, *, final: bool) -> str:
        """Text not given out yet, less what could still become a stop string unless `final`."""
        if self._tokenizer is not None and self.stop_reason is None:
            self._settle(final=final)
        end = len(self.text) if final else self._place(len(self._seen) - self._possible_stop())
        piece = self.text[self._given : max(end, self._given)]
        self._given = max(end, self._given)
        return piece

    def _settle(self, *, final: bool) -> None:
        if self._read == len(self._token_ids):
            return
        known = self._decode(self._token_ids[self._start : self._read])
        whole = self._decode(self._token_ids[self._start :])
        if whole.endswith(_UNFINISHED) and not final and len(self._token_ids) - self._read <= MAX_HELD:
            return
        self.text += whole[len(known) :]
        if self._unseen:
            self._searched += whole[len(known) :]
        self._read = len(self._token_ids)
        lowest = max(0, self._read - _CONTEXT - MAX_HELD)
        self._start = max(self._start, self._read - _CONTEXT)
        while self._start > lowest and self._decode(self._token_ids[self._start : self._read]).startswith(_UNFINISHED):
            self._start -= 1  # not in the middle of a character

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    @property
    def _seen(self) -> str:
        """What stop strings are looked for in."""
        return self._searched if self._unseen else self.text

    def _cut(self, before: int) -> bool:
        longest = max((len(s) for s in self._stop), default=0)
        found = [(self._seen.find(s, max(0, before - longest)), s) for s in self._stop]
        found = [(place, s) for place, s in found if place >= 0]
        if not found:
            return False
        place, self.stop_reason = min(found)
        self.text = self.text[: self._place(place)]
        return True

    def _place(self, seen: int) -> int:
        """The place in `text` of one in `_seen`; that of a special token is where it was left out."""
        for start, size, place in reversed(self._gaps):
            if start <= seen:
                return place + max(0, seen - start - size)
        return seen

    def _possible_stop(self) -> int:
        """Length of the longest tail of `_seen` that begins some stop string."""
        longest, seen = 0, self._seen
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(seen)), longest, -1):
                if seen.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def _overlapping(stops: Sequence[str], special_tokens: Mapping[int, str]) -> dict[int, str]:
    """The special tokens that overlap with a stop string: equal to it, contained in it, or sharing its start or end.

    A stop string inside a special token's text does not count: "<" is not meant to match a token that is not shown.
    """
    return {token: text for token, text in special_tokens.items() if any(_overlap(stop, text) for stop in stops)}


def _overlap(stop: str, special: str) -> bool:
    if special in stop:
        return bool(special)
    sizes = range(1, min(len(stop), len(special)))
    return any(stop.endswith(special[:n]) or stop.startswith(special[-n:]) for n in sizes)
