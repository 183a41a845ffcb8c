"""The prompts of a dataset: what they may look like, how many tokens they have, and what happens to those too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from luthier import terminal

COLUMN = "prompt"
TOO_LONG = ("drop", "truncate", "raise")


def is_conversation(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of messages."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and all(isinstance(message, Mapping) and "role" in message for message in prompt)


def prompt_token_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, **template: Any) -> list[int]:
    """Token ids of a text, or of a conversation with the header of the answer behind it; never a doubled BOS."""
    if isinstance(prompt, str):
        begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer(prompt, add_special_tokens=not begins)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError("The prompt is a conversation, but the tokenizer has no chat template: set one with get_chat_template")
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template)["input_ids"])


def check_prompts(dataset: Dataset) -> None:
    """Raise ``ValueError`` for a set without prompts, or with a row whose prompt is neither text nor messages like the rest."""
    columns = list(dataset.column_names or next(iter(dataset), {}))
    if COLUMN not in columns:
        raise ValueError(
            f"The dataset has no column {COLUMN!r}, only {', '.join(columns) or 'none at all'}. GRPO needs one that holds the "
            "question as text or as a list of messages without the answer: rename yours with dataset.rename_column"
        )
    if not isinstance(dataset, Dataset):
        return  # a stream: its rows are seen when they come
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: it must hold at least one row")
    kinds = []
    for row, prompt in enumerate(dataset[COLUMN]):
        kinds.append("text" if isinstance(prompt, str) and prompt else "messages" if is_conversation(prompt) else None)
        if kinds[-1] is None:
            raise ValueError(f"Row {row} has the prompt {prompt!r}: it must be a text or a list of messages, and not empty")
        if kinds[-1] != kinds[0]:
            raise ValueError(f"Row {row} has a prompt of {kinds[-1]}, row 0 one of {kinds[0]}: all must be of one kind")
        if kinds[-1] == "messages" and prompt[-1]["role"] == "assistant":
            raise ValueError(f"Row {row} has a prompt that ends with the assistant's answer: take that message off")


@dataclass(frozen=True)
class PromptLedger:
    """What became of the prompts of a dataset: ``rows_in == kept + dropped``; lengths in tokens, of prompts as they came."""

    rows_in: int
    kept: int
    dropped: int
    truncated: int
    tokens: int
    longest: int
    limit: int | None

    def __post_init__(self) -> None:
        assert self.rows_in == self.kept + self.dropped and self.truncated <= self.kept, f"rows are unaccounted for: {self}"

    def to_dict(self) -> dict[str, int | None]:
        """For JSON."""
        return asdict(self)

    def table(self, title: str = "Prompts") -> None:
        """Print it to the terminal."""
        limit = "no limit" if self.limit is None else f"the limit is {self.limit:,}"
        rows = [("rows in", f"{self.rows_in:,}"), ("rows used", f"{self.kept:,}")]
        rows += [("dropped: too long", f"{self.dropped:,}")] if self.dropped else []
        rows += [("truncated", f"{self.truncated:,}")] if self.truncated else []
        rows += [("tokens", f"{self.tokens:,}"), ("longest prompt", f"{self.longest:,} tokens ({limit})")]
        terminal.table(title, ("", "count"), rows)


def fit_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None, too_long: str, **template: Any
) -> tuple[Dataset, PromptLedger]:
    """The rows whose prompts have at most ``limit`` tokens, and the account of all.

    ``too_long``: "drop" leaves longer rows out, "truncate" keeps them (their first tokens are cut when they are used),
    "raise" is an error. Raises ``ValueError`` where a row is too long under "raise", and where none is left.
    """
    lengths = []
    with terminal.progress("Measuring prompts", len(dataset)) as bar:
        for prompt in dataset[COLUMN]:
            lengths.append(len(prompt_token_ids(prompt, tokenizer, **template)))
            bar.advance()
    long = [row for row, length in enumerate(lengths) if limit is not None and length > limit]
    worst = f"{len(long)} of {len(lengths)} prompts are longer than {limit} tokens (the longest has {max(lengths)}"
    if long and too_long == "raise":
        raise ValueError(f"{worst}; the first is row {long[0]}): raise max_prompt_length, or set too_long='drop'")
    if too_long == "drop" and len(long) == len(lengths):
        raise ValueError(f"{worst}): none is left to train on. Raise max_prompt_length or shorten the prompts")
    dropped = set(long) if too_long == "drop" else set()
    ledger = PromptLedger(
        rows_in=len(lengths),
        kept=len(lengths) - len(dropped),
        dropped=len(dropped),
        truncated=len(long) - len(dropped),
        tokens=sum(lengths),
        longest=max(lengths),
        limit=limit,
    )
    return dataset.select([row for row in range(len(lengths)) if row not in dropped]) if dropped else dataset, ledger
