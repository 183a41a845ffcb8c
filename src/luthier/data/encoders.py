"""One function a format, from a row to its token ids and labels (-100 where a token does not train).

They return None for a row whose answers are all empty: trained on, it would teach the model to say nothing.
"""

from __future__ import annotations

import operator
import os.path
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset

from luthier.data.conversation import Message, row_messages, row_tools
from luthier.data.formats import find_format, keeps_keys
from luthier.data.masks import IGNORED, ResponseMask, stop_tokens
from luthier.data.render import encode
from luthier.data.rows import Row, shown

Encoded = tuple[list[int], list[int]]
Encoder = Callable[[Row], Encoded | None]
MASK_COLUMNS = ("completion_mask", "assistant_masks")  # 0 and 1 a token, as TRL's datasets have them


def encoder_for(dataset: Dataset, columns: list[str], tokenizer: Any, everything: bool) -> Encoder:
    """The encoder of the format that ``columns`` show; ``everything``: all tokens train, not only the answers'."""
    if "input_ids" in columns:
        known = everything or any(name in columns for name in ("labels", *MASK_COLUMNS))
        return partial(_encode_ids, mask=None if known else ResponseMask(tokenizer))
    if "text" in columns:
        mask = None if everything else _text_mask(tokenizer)
        return partial(_encode_text, tokenizer=tokenizer, mask=mask, stops=tuple(stop_tokens(_inner(tokenizer))))
    source = find_format(columns)
    assert source is not None  # there is neither text nor input_ids
    if source == ("prompt", "completion") and isinstance(dataset[0]["prompt"], str):
        return partial(_encode_completion, tokenizer=tokenizer, everything=everything)
    exact = keeps_keys(dataset, source)
    return partial(_encode_conversation, tokenizer=tokenizer, source=source, exact=exact, everything=everything)


def _text_mask(tokenizer: Any) -> ResponseMask:
    if not _inner(tokenizer).chat_template:
        raise ValueError(
            "The rows are plain text and the tokenizer has no chat template, so there are no answers to tell from the rest: "
            "set train_on='all', or give the tokenizer the template that the text was made with (get_chat_template)."
        )
    return ResponseMask(tokenizer)


def _encode_ids(row: Row, mask: ResponseMask | None) -> Encoded:
    """Rows that were tokenised elsewhere, with labels or masks, or what ``mask`` finds, or all tokens."""
    ids = _token_ids(row["input_ids"])
    labels = row["labels"] if row.get("labels") is not None else mask(ids) if mask else ids
    masks = [row[name] for name in MASK_COLUMNS if row.get(name) is not None]
    for name, values in [("labels", labels), *zip(MASK_COLUMNS, masks, strict=False)]:
        if len(values) != len(ids):
            raise ValueError(f"it has {len(ids)} input_ids but {len(values)} values in {name}")
    strange = next((label for label in labels if label < 0 and label != IGNORED), None)
    if strange is not None:
        raise ValueError(f"its labels hold {strange}: give the id of a token, or {IGNORED} for one that does not train")
    return ids, [label if all(bits) else IGNORED for label, *bits in zip(labels, *masks, strict=True)]


def _token_ids(ids: Any) -> list[int]:
    try:
        ids = [*map(operator.index, ids)]
    except TypeError as error:
        raise ValueError(f"its input_ids must be a list of whole numbers, but are {shown(ids)}") from error
    if ids and not 0 <= min(ids) <= max(ids) < 2**31:
        raise ValueError(f"its input_ids go from {min(ids)} to {max(ids)}, which are no token ids")
    return ids


def _encode_text(row: Row, tokenizer: Any, mask: ResponseMask | None, stops: tuple[str, ...]) -> Encoded:
    """A text that a stop token does not end gets the EOS token; an empty one stays empty."""
    ids, _ = _tokens(row["text"], "text", tokenizer)
    text = row["text"].rstrip()
    if not text:
        return [], []
    if not text.endswith(stops):
        ids = _with_eos(ids, tokenizer)
    return ids, mask(ids) if mask else ids


def _encode_completion(row: Row, tokenizer: Any, everything: bool) -> Encoded | None:
    """``prompt`` and ``completion`` as one text; a token with a character of the completion trains."""
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            raise ValueError(f"{name!r} must be text in every row, as in the first, but is {shown(row[name])}")
    if not row["completion"].strip():
        return None
    ids, ends = _tokens(row["prompt"] + row["completion"], "prompt", tokenizer)
    labels = [token if everything or end > len(row["prompt"]) else IGNORED for token, end in zip(ids, ends, strict=True)]
    whole = _with_eos(ids, tokenizer)
    return whole, labels + whole[len(ids) :]


def _encode_conversation(row: Row, tokenizer: Any, source: tuple[str, ...], exact: bool, everything: bool) -> Encoded | None:
    messages = row_messages(row, source, exact)
    if not any(_says_something(message) for message in messages if message["role"] == "assistant"):
        return None
    options = {"tools": row_tools(row), **(row.get("chat_template_kwargs") or {})}
    ids, trained = encode(tokenizer, messages, **options)
    if len(source) == 2 and isinstance(row[source[0]], list):  # answers in the prompt are a part of the question
        question, _ = encode(tokenizer, messages[: len(messages) - len(row[source[1]])], **options)
        same = len(os.path.commonprefix([question, ids]))
        trained = [False] * same + trained[same:]
    return ids, ids if everything else [token if train else IGNORED for token, train in zip(ids, trained, strict=True)]


def _says_something(message: Message) -> bool:
    content = message["content"]
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def _tokens(text: object, column: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of a text, with the tokenizer's own special tokens but no second BOS, and where each ends in the text."""
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is missing" if text is None else f"{column!r} must be text, but is {shown(text)}")
    inner = _inner(tokenizer)
    has_bos = bool(inner.bos_token) and text.startswith(inner.bos_token)
    encoding = inner(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
    return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = _inner(tokenizer).eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _inner(tokenizer: Any) -> Any:
    return getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
