"""Token ids to text as they come, and stop strings across token borders.

A character can span tokens and a stop string can span steps, so text that might still change is held back: an
unfinished UTF-8 sequence, and any tail that could be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_redrafter.backends.base import Tokenizer

_UNFINISHED = "\ufffd"
_CONTEXT = 6
"""Tokens before the new ones that are decoded along: some tokenizers write a token differently at the start."""


class TextStream:
    """Text of one request. Feed tokens one at a time; `push` says whether a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._start = 0  # decoding begins here, at a token whose text is settled
        self._read = 0  # tokens before this are in `text`
        self._given = 0
        self.text = ""
        self.stop_reason: str | None = None

    def push(self, token_id: int) -> bool:
        """Add a token; True when it completes a stop string, whose text (and all after it) is cut off."""
        self._token_ids.append(token_id)
        if self._tokenizer is None or not self._stop:
            return False  # without stop strings, decoding can wait until someone takes the text
        before = len(self.text)
        self._settle(final=False)
        return self._cut(before)

    def finish(self) -> None:
        """No more tokens: settle what was held back, replacement characters included."""
        if self._tokenizer is not None and self.stop_reason is None:
            self._settle(final=True)

    def take(self, *, final: bool) -> str:
        """Text not given out yet, less what could still become a stop string unless `final`."""
        if self._tokenizer is not None and self.stop_reason is None:
            self._settle(final=final)
        end = len(self.text) if final else len(self.text) - self._possible_stop()
        piece = self.text[self._given : max(end, self._given)]
        self._given = max(end, self._given)
        return piece

    def _settle(self, *, final: bool) -> None:
        assert self._tokenizer is not None
        if self._read == len(self._token_ids):
            return
        known = self._tokenizer.decode(self._token_ids[self._start : self._read], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._token_ids[self._start :], skip_special_tokens=True)
        if whole.endswith(_UNFINISHED) and not final:
            return
        self.text += whole[len(known) :]
        self._read = len(self._token_ids)
        self._start = max(self._start, self._read - _CONTEXT)
        while self._start and self._tokenizer.decode(
            self._token_ids[self._start : self._read], skip_special_tokens=True
        ).startswith(_UNFINISHED):
            self._start -= 1  # not in the middle of a character

    def _cut(self, before: int) -> bool:
        longest = max((len(s) for s in self._stop), default=0)
        found = [(self.text.find(s, max(0, before - longest)), s) for s in self._stop]
        found = [(place, s) for place, s in found if place >= 0]
        if not found:
            return False
        place, self.stop_reason = min(found)
        self.text = self.text[:place]
        return True

    def _possible_stop(self) -> int:
        """Length of the longest tail of the text that begins some stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
