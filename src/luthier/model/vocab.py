"""A larger vocabulary: new rows in embeddings and head, and what they start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft import PeftModel
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from luthier.errors import UnsupportedError, suggesting_names, unknown

METHODS = ("mean", "interpolation")


def require_rows(old: int, rows: int | None) -> None:
    """Raise ``ValueError`` if a vocabulary of ``old`` rows was asked to have fewer."""
    if rows is not None and rows < old:
        raise ValueError(
            f"The vocabulary has {old} rows and {rows} were asked for: it is never made smaller, since checkpoints pad it on "
            "purpose. Ask for at least as many, or leave it out."
        )


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow embeddings and head to ``rows``; the new rows are the mean of the old ones. Never shrinks."""
    old = model.get_input_embeddings().weight.shape[0]
    require_rows(old, rows)
    if rows == old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for table in _tables(model):
        table[old:] = table[:old].float().mean(0).to(table.dtype)


@suggesting_names
def add_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str],
    method: Literal["mean", "interpolation"] = "mean",
    interpolation: float = 0.5,
) -> list[int]:
    """Add tokens to tokenizer and model, before ``get_peft_model``, which then trains embeddings and head -> their ids.

    ``mean``: a new row is the mean of all old ones. ``interpolation``: ``interpolation`` of it is the mean of the rows of
    the pieces that the token was split into until now, the rest the mean of all rows.
    """
    if isinstance(model, PeftModel):
        raise UnsupportedError("add_new_tokens changes the base model: call it before get_peft_model, not after.")
    if isinstance(new_tokens, str) or not new_tokens or not all(isinstance(token, str) and token for token in new_tokens):
        raise TypeError(f"new_tokens must be a list of non-empty strings, not {new_tokens!r}.")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not 0 <= interpolation <= 1:
        raise ValueError(f"interpolation is {interpolation}: it must be between 0 and 1.")
    known = sorted(set(new_tokens) & set(tokenizer.get_vocab()))
    if known:
        raise ValueError(f"Already in the vocabulary: {', '.join(map(repr, known))}. Leave them out of new_tokens.")
    pieces = [tokenizer(token, add_special_tokens=False).input_ids for token in new_tokens]
    old = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])  # found wherever they stand
    ids = tokenizer.convert_tokens_to_ids(list(new_tokens))
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        resize_embeddings(model, max(ids) + 1)
    for table in _tables(model):
        mean = table[:old].float().mean(0)
        for id, parts in zip(ids, pieces, strict=True):
            own = table[parts].float().mean(0) if method == "interpolation" and parts else mean
            share = interpolation if method == "interpolation" else 0.0
            table[id] = (share * own + (1 - share) * mean).to(table.dtype)
    model.luthier_new_tokens = ids
    return ids


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """The data of the embeddings and, where it is another tensor, of the head: (vocabulary, hidden) each."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embeddings.weight.data]
    if head is not None and head.weight is not embeddings.weight:
        tables.append(head.weight.data)
    return tables
