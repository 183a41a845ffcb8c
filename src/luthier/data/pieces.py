"""The text of single tokens, such that the texts of a row's tokens together spell the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Pieces:
    """``Pieces(tokenizer)(input_ids)``: the text of each token, special ones included; of a byte of a character, "\\ufffd"."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        self._known: dict[int, str] = {}
        self._anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def __call__(self, input_ids: Sequence[int]) -> list[str]:
        for token in set(input_ids) - self._known.keys():
            self._known[token] = self._piece(token)
        return [self._known[token] for token in input_ids]

    def _piece(self, token: int) -> str:
        # behind another token, since a sentencepiece decoder drops the space before the first word
        behind = self._decode([*self._anchor, token])
        return behind.removeprefix(self._anchor_text) if behind.startswith(self._anchor_text) else self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
