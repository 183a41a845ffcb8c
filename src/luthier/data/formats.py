"""Whatever shape a dataset of conversations comes in, give it one: a ``messages`` column of {role, content}.

=================  ==========================================================================================
ShareGPT           ``conversations`` of {from, value}
ChatML             ``messages`` or ``conversations`` of {role, content}
Alpaca             ``instruction``, optionally ``input``, and ``output``
prompt/completion  two columns, of text or of messages; also under the other names in ``PAIRS``
=================  ==========================================================================================

All may have a column ``system``. A bad row is an error that gives its number, counted from 1, and the reason.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Json

from luthier.data.chat import get_chat_template
from luthier.data.conversation import SYSTEM_COLUMNS, as_text, row_messages, row_tools
from luthier.data.merged_prompt import PromptPart, parse_merged_prompt
from luthier.data.placeholders import from_placeholders
from luthier.data.render import render
from luthier.data.rows import AnyDataset, Row, column_names, map_rows
from luthier.errors import suggesting_names, unknown

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (  # the columns that hold a question and its answer
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)


@suggesting_names
def standardize_sharegpt(dataset: AnyDataset, column: str = "messages") -> AnyDataset:
    """Give every row of ``dataset`` a column ``column`` of messages ``{"role": ..., "content": ...}``.

    The columns that the messages were made from are removed, all others are kept. A message keeps its further keys
    (``tool_calls``, ``name``, ...). A dataset of ``text`` or ``input_ids`` without a conversation is given back as it is.

    Raises:
        TypeError: not a dataset.
        ValueError: the format is not recognised or ambiguous, or rows are malformed: their numbers and why.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return type(dataset)({name: standardize_sharegpt(part, column) for name, part in dataset.items()})
    columns = column_names(dataset)
    source = find_format(columns)
    if source is None:
        return dataset
    used = [name for name in (*source, *SYSTEM_COLUMNS, *["input"] * (source[0] == "instruction")) if name in columns]
    features = dataset.features
    if features:
        features = Features({**{name: kind for name, kind in features.items() if name not in used}, column: Json()})
    convert = partial(_standardized, source=source, column=column, exact=keeps_keys(dataset, source))
    return map_rows(dataset, convert, remove_columns=used, features=features, desc="Reading conversations")


standardize_data_formats = standardize_sharegpt


def find_format(columns: list[str]) -> tuple[str, ...] | None:
    """Where the conversation is: (column of messages,) or (column of questions, column of answers); None: text or ids.

    Raises:
        ValueError: no known format, or two pairs that both could be it.
    """
    for name in CONVERSATION_COLUMNS:
        if name in columns:
            return (name,)
    pairs = [pair for pair in PAIRS if set(pair) <= set(columns)]
    if "instruction" in columns:
        pairs = [pair for pair in pairs if pair[0] != "input"]  # Alpaca's input is a part of the question
    if len(pairs) > 1:
        raise ValueError(
            f"The dataset has mixed formats: its columns {columns} hold {' and '.join('/'.join(pair) for pair in pairs)}. "
            "Remove or rename the columns that are not to be trained on."
        )
    if pairs:
        return pairs[0]
    if "text" in columns or "input_ids" in columns:
        return None
    known = [*CONVERSATION_COLUMNS[:2], *("/".join(pair) for pair in PAIRS), "text", "input_ids"]
    answers = [repr(answer) for question, answer in PAIRS if question in columns and question != "input"]
    hint = f" Its rows have no answer: a column {' or '.join(answers)} is missing." if answers else ""
    raise ValueError(f"The dataset has no known format: its columns are {columns}.{hint} Known: {', '.join(known)}.")


def keeps_keys(dataset: Dataset | IterableDataset, source: tuple[str, ...]) -> bool:
    """Whether messages come with just the keys that were written, not with those of all rows (None where absent)."""
    return bool(dataset.features) and all(isinstance(dataset.features[name], Json) for name in source)


def _standardized(row: Row, source: tuple[str, ...], column: str, exact: bool) -> dict[str, Any]:
    return {column: row_messages(row, source, exact)}


@suggesting_names
def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    output_column_name: str = "output",
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Make a table of columns into ``conversations`` of {from, value}: a question merged from columns, and its answer.

    ``merged_prompt`` as in merged_prompt.py; empty: the column ``instruction``, with ``input`` behind it where there is
    one. ``conversation_extension`` n makes conversations of n different rows, the first in order, the others at random:
    as many conversations as rows. Other columns are removed.

    Raises:
        ValueError: unmatched brackets, an unknown column, a missing value or answer, an extension by no or too many rows.
    """
    columns = column_names(dataset)
    if isinstance(dataset, IterableDataset):
        raise TypeError("to_sharegpt needs all rows at once, not a stream: give a datasets.Dataset.")
    if not merged_prompt and "instruction" not in columns:
        raise ValueError(f"merged_prompt is needed: name in braces the columns that make the question. Columns: {columns}.")
    parts = parse_merged_prompt(merged_prompt or "{instruction}" + "[[\n\n{input}]]" * ("input" in columns))
    for name in [*(name for part in parts for name in part.columns), output_column_name]:
        if name not in columns:
            raise unknown("column", name, columns)
    if not 1 <= conversation_extension <= max(len(dataset), 1):
        raise ValueError(f"conversation_extension must be from 1 to the {len(dataset)} rows, but is {conversation_extension}.")

    convert = partial(_one_turn, parts=parts, answer=output_column_name)
    single = map_rows(dataset, convert, remove_columns=columns)["conversations"][:]
    order = random.Random(random_state).sample(range(len(single)), len(single))
    place = {row: position for position, row in enumerate(order)}
    joined = []
    for row in range(len(single)):  # a row and those that follow it in a random circle: all different
        circle = [single[order[(place[row] + step) % len(order)]] for step in range(conversation_extension)]
        joined.append([turn for turns in circle for turn in turns])
    return Dataset.from_dict({"conversations": joined})


def _one_turn(row: Row, parts: list[PromptPart], answer: str) -> dict[str, Any]:
    if row[answer] is None:
        raise ValueError(f"it has no answer: {answer!r} is missing")
    question = "".join(part.fill(row) for part in parts)
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": as_text(row[answer], answer)}]}


@suggesting_names
def apply_chat_template(
    dataset: AnyDataset, tokenizer: Any, chat_template: str | None = None, default_system_message: str | None = None
) -> AnyDataset:
    """Render every conversation of ``dataset`` as ``text``, which takes the place of the conversation's column.

    ``chat_template`` is a name of ``CHAT_TEMPLATES``, a Jinja template, or a text with ``{INPUT}`` and ``{OUTPUT}`` (and
    ``{SYSTEM}``) as in placeholders.py. It becomes the tokenizer's own, so that the model is prompted later as it was
    trained. None is the template that the tokenizer has, and Alpaca's where it has none.

    Raises:
        ValueError: an unknown name, wrong placeholders, no conversations; malformed rows, by their number.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        rendered = {
            k: apply_chat_template(part, tokenizer, chat_template, default_system_message) for k, part in dataset.items()
        }
        return type(dataset)(rendered)
    dataset = standardize_sharegpt(dataset)
    columns = column_names(dataset)
    if "messages" not in columns:
        raise ValueError(f"The dataset has no conversations to render: its columns are {columns}.")
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if chat_template and "{INPUT}" in chat_template:
        inner.chat_template = from_placeholders(chat_template, inner.bos_token, inner.eos_token, default_system_message)
    elif chat_template or not inner.chat_template:
        tokenizer = get_chat_template(tokenizer, chat_template or "alpaca", system_message=default_system_message)
    return map_rows(
        dataset, partial(_rendered, tokenizer=tokenizer), remove_columns=["messages"], desc="Rendering conversations"
    )


def _rendered(row: Row, tokenizer: Any) -> dict[str, str]:
    return {"text": render(tokenizer, row["messages"], tools=row_tools(row))}
