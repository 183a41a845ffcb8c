"""From what a user hands the trainer to rows of token ids and labels, every row accounted for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedTokenizerBase, ProcessorMixin

from luthier.data.conversation import row_tools
from luthier.data.formats import standardize_sharegpt
from luthier.data.ledger import Ledger
from luthier.data.masks import IGNORED
from luthier.data.prepare import prepare_chat
from luthier.data.render import encode
from luthier.data.rows import column_names
from luthier.data.vision import VisionDataCollator, without_images
from luthier.terminal import say
from luthier.training.arguments import TrainingArguments

AnyTokenizer = PreTrainedTokenizerBase | ProcessorMixin
AnyDataset = Dataset | IterableDataset
FormattingFunction = Callable[[Any], str | list[str]]
Labelled = {"labels", "completion_mask", "assistant_masks"}


def takes_raw_rows(data_collator: DataCollator | None) -> bool:
    """Whether a collator renders and tokenises rows itself, so that nothing is to be prepared."""
    return isinstance(data_collator, VisionDataCollator)


def as_dataset(rows: Any, name: str, raw: bool = False) -> AnyDataset:
    """A dataset or a stream as it is, or a list of rows as a dataset; anything else, or none, is an error.

    ``raw`` rows (images among them) are not copied into a table, but handed out as they are.
    """
    if rows is None:
        raise ValueError(f"{name} is missing: give a datasets.Dataset or a list of rows")
    if not isinstance(rows, list | Dataset | IterableDataset):
        choose = f" (choose one of {', '.join(map(repr, rows))})" if isinstance(rows, Mapping) else ""
        raise TypeError(f"{name} must be a datasets.Dataset, a stream or a list of rows, not {type(rows).__name__}{choose}")
    if (next(iter(rows), None) is None) if isinstance(rows, IterableDataset) else len(rows) == 0:
        raise ValueError(f"{name} has no rows")
    if isinstance(rows, list):
        strange = next((row for row in rows if not isinstance(row, Mapping)), None)
        if strange is not None:
            raise TypeError(f"{name} must hold rows that are dicts of columns, but holds {strange!r}")
        return _lazily(rows) if raw else Dataset.from_list(rows)
    return rows


def each(datasets: Any, name: str, convert: Callable[[Any, str], Any]) -> Any:
    """``convert(rows, name)`` of a dataset, or of each of several by name; None of none."""
    if datasets is None:
        return None
    if isinstance(datasets, Mapping):
        return {key: convert(rows, f"{name} {key!r}") for key, rows in datasets.items()}
    return convert(datasets, name)


def as_text(rows: Any, name: str) -> AnyDataset:
    """``as_dataset``, of rows without images, which would be left out without a word."""
    return without_images(as_dataset(rows, name), name)


def prepare_rows(
    dataset: Dataset,
    tokenizer: AnyTokenizer,
    args: TrainingArguments,
    max_length: int | None,
    formatting_func: FormattingFunction | None,
) -> tuple[Dataset, Ledger]:
    """Rows of ``input_ids`` and ``labels``, none longer than ``max_length`` tokens, and what became of every row.

    Chat data trains as ``args.train_on`` says. A formatting function, or a column ``args.dataset_text_field``, gives text
    that trains whole, as with TRL; ``train_on_responses_only`` narrows it down afterwards.
    """
    columns = column_names(dataset)
    train_on = args.train_on
    if "input_ids" in columns:
        train_on = "responses" if Labelled & set(columns) else "all"
    elif formatting_func is not None:
        dataset, train_on = formatted(dataset, formatting_func), "all"
    elif args.dataset_text_field in columns:
        unread = sorted(set(columns) & {"messages", "conversations"})
        if unread:
            say(f"Column {args.dataset_text_field!r} is trained on as it stands; {' and '.join(unread)} is not looked at.")
        dataset = dataset.select_columns([args.dataset_text_field])
        if args.dataset_text_field != "text":
            dataset = dataset.rename_column(args.dataset_text_field, "text")
        train_on = "all"
    elif args.completion_only_loss is False and {"prompt", "completion"} <= set(columns):
        train_on = "all"
    return prepare_chat(dataset, tokenizer, max_length, train_on, args.too_long, args.dataset_num_proc)


def require_known_tokens(rows: Dataset, known: int) -> None:
    """Raise ``ValueError`` for a token id that the model has no embedding for; a GPU would only say "device-side assert"."""
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        largest = max(pc.max(pc.list_flatten(batch[column])).as_py() for column in ("input_ids", "labels"))
        if largest >= known:
            raise ValueError(
                f"The dataset holds the token id {largest}, but the model knows only {known} tokens. Load it with "
                "resize_model_vocab, or add the tokens with add_new_tokens before get_peft_model."
            )


def formatted(dataset: Dataset, formatting_func: FormattingFunction) -> Dataset:
    """``dataset`` as a column ``text``. The function takes a row and gives its text, or a batch and gives a list of texts."""
    columns = dataset.column_names
    if isinstance(formatting_func(dataset[0]), str):
        return dataset.map(lambda row: {"text": formatting_func(row)}, remove_columns=columns)
    texts = formatting_func(dataset[:1])
    if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
        raise TypeError(f"formatting_func must give the text of a row, or the list of the texts of a batch, not {texts!r}")
    return dataset.map(lambda batch: {"text": formatting_func(batch)}, batched=True, remove_columns=columns)


def prepare_stream(
    stream: IterableDataset,
    tokenizer: AnyTokenizer,
    args: TrainingArguments,
    max_length: int | None,
    formatting_func: FormattingFunction | None,
    by_trl: Callable[[IterableDataset], IterableDataset],
) -> IterableDataset:
    """As ``prepare_rows``, row by row as the stream flows: what is dropped cannot be counted beforehand.

    Text and token ids are TRL's to tokenise and label (``by_trl``).
    """
    columns = column_names(stream)
    is_text = formatting_func is not None or "input_ids" in columns or args.dataset_text_field in columns
    if not is_text and tokenizer.chat_template:
        stream = standardize_sharegpt(stream)
        stream = stream.map(lambda row: _encoded(row, tokenizer, args.train_on), remove_columns=column_names(stream))
    return by_trl(stream).map(lambda row: _cut(row, max_length, args.too_long)).filter(lambda row: _trains(row, max_length))


def _encoded(row: Mapping[str, Any], tokenizer: AnyTokenizer, train_on: str) -> dict[str, list[int]]:
    ids, trained = encode(tokenizer, row["messages"], tools=row_tools(row))
    if train_on == "all":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": [token if trains else IGNORED for token, trains in zip(ids, trained, strict=True)]}


def _cut(row: Mapping[str, Any], max_length: int | None, too_long: str) -> dict[str, list[int]]:
    length = len(row["input_ids"])
    if max_length is None or length <= max_length or too_long == "drop":
        return {}
    if too_long == "raise":
        raise ValueError(f"A row of the stream has {length} tokens, more than max_length={max_length}")
    return {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}


def _trains(row: Mapping[str, Any], max_length: int | None) -> bool:
    fits = max_length is None or len(row["input_ids"]) <= max_length
    return fits and any(label != IGNORED for label in row["labels"][1:])


def _lazily(rows: list[Mapping[str, Any]]) -> Dataset:
    """A dataset that hands out ``rows`` themselves."""
    return Dataset.from_dict({"row": range(len(rows))}).with_transform(_Rows(rows))


class _Rows:
    """The rows of a list by their numbers.

    datasets pickles a transform to tell it from others, and copies it with every view: here that is a name for it, not
    gigabytes of pictures. The name means something in this process and its forks only.
    """

    known: WeakValueDictionary[str, _Rows] = WeakValueDictionary()

    def __init__(self, rows: list[Mapping[str, Any]]) -> None:
        self.rows, self.name = rows, uuid.uuid4().hex
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.known[self.name] = self

    def __call__(self, batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        return {column: [self.rows[index].get(column) for index in batch["row"]] for column in self.columns}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rows_named, (self.name,)


def _rows_named(name: str) -> _Rows:
    return _Rows.known[name]
