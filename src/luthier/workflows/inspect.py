"""Looking before training: the rows as the model will see them, and the memory that a run will take."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase
from tyro.conf import Positional, arg

import luthier
from luthier.data.prepare import prepare_chat
from luthier.data.preview import preview, preview_rows
from luthier.data.read import read_dataset
from luthier.data.vision import IMAGE_COLUMNS
from luthier.model import checkpoint, memory
from luthier.model.source import read_config
from luthier.model.tokenizer import load_tokenizer
from luthier.terminal import say, table
from luthier.workflows.templates import with_template

EMBEDDED = Path(luthier.__file__).parent / "demo" / "base"


def inspect(
    file: Annotated[Positional[str], arg(metavar="FILE")],
    model: str | None = None,
    chat_template: str | None = None,
    rows: int = 3,
    max_seq_length: int | None = None,
    train_on: Literal["responses", "all"] = "responses",
    split: str = "train",
    json: bool = False,
) -> None:
    """Show a dataset as the model will see it: its tokens, which of them train, and what became of every row.

    Args:
        file: Rows: a .json, .jsonl, .csv or .parquet file, a directory of them, or a hub dataset.
        model: Hub id or directory whose tokenizer is used. Default: the tokenizer of the embedded demo model.
        chat_template: Chat template by name or .jinja file. Default: the tokenizer's own, else chatml.
        rows: Number of rows to show.
        max_seq_length: Rows longer than so many tokens are counted as dropped.
        train_on: Which tokens train: the assistant's answers, or everything.
        split: Split of a hub dataset.
        json: Print rows and counts as JSON on standard output.
    """
    if rows < 0:
        raise ValueError(f"rows is {rows}: give the number of rows to show, or 0 for the counts alone")
    dataset = read_dataset(file, split)
    for name in set(IMAGE_COLUMNS).intersection(dataset.column_names):
        say(f"The column {name!r} is not shown: these are the rows as text. `luthier vision` trains with their images.")
    if model is None:
        say("No --model was given: the tokens are those of the embedded demo model.")
    tokenizer = tokenizer_of(model or str(EMBEDDED), chat_template)
    prepared, ledger = prepare_chat(dataset, tokenizer, max_seq_length, train_on)
    if json:
        print(json_format.dumps({"ledger": ledger.to_dict(), "rows": preview_rows(prepared, tokenizer, rows)}, indent=1))
        return
    preview(prepared, tokenizer, rows, Console(highlight=False))
    ledger.table(f"Data: {file}")


def estimate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    load_in_16bit: bool = False,
    load_in_8bit: bool = False,
    full_finetuning: bool = False,
    r: int = 16,
    max_seq_length: int = 2048,
    per_device_train_batch_size: int = 2,
    use_gradient_checkpointing: Literal["auto", "offload", "true", "false"] = "auto",
    memory_budget: float | None = None,
    optim: str = "adamw_torch",
    compute: Literal["bf16", "fp8-backward", "fp8"] = "bf16",
    json: bool = False,
) -> None:
    """Memory that a training run will take on the device, from the model's config alone.

    Args:
        model: Hub id or directory; no weights are read.
        load_in_16bit: 16-bit base weights instead of NF4.
        load_in_8bit: 8-bit base weights instead of NF4.
        full_finetuning: Train every weight.
        r: Rank of the adapter.
        max_seq_length: Length of a row in tokens.
        per_device_train_batch_size: Rows per micro-batch.
        use_gradient_checkpointing: What the backward recomputes.
        memory_budget: GiB that "auto" may fill.
        optim: Optimizer, by its name in transformers.
        compute: How frozen weights multiply.
        json: Print the result as JSON on standard output.
    """
    asked = [name for name, on in (("full", full_finetuning), ("16bit", load_in_16bit), ("int8", load_in_8bit)) if on]
    if len(asked) > 1:
        raise ValueError(f"Two precisions were asked for ({' and '.join(asked)}): choose one")
    counts = {"r": r, "max_seq_length": max_seq_length, "per_device_train_batch_size": per_device_train_batch_size}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")
    found = memory.estimate(
        config_of(model),
        precision=asked[0] if asked else "nf4",
        r=r,
        batch_tokens=max_seq_length * per_device_train_batch_size,
        use_gradient_checkpointing=use_gradient_checkpointing,
        memory_budget=memory_budget,
        optim=optim,
        compute=compute,
    )
    if json:
        print(json_format.dumps(found.to_dict(), indent=1))
    else:
        table(f"{model}: {per_device_train_batch_size} rows of {max_seq_length} tokens", ("what", "size"), found.rows())


def small_files(name: str, **hub: Any) -> Path:
    """The directory with config and tokenizer of a model, or of the base of an adapter; no weights are downloaded."""
    return checkpoint.locate(name, with_weights=False, **hub)


def config_of(name: str, trust_remote_code: bool = False, **hub: Any):
    """The config of a model, or of the base model of an adapter."""
    directory = small_files(name, **hub)
    if checkpoint.is_adapter(directory):
        directory = small_files(checkpoint.base_of_adapter(directory))
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"{name} has no config.json: give the directory of a model, or a hub name")
    return read_config(directory, trust_remote_code)


def tokenizer_of(
    name: str, chat_template: str | None = None, system_message: str | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model with the template that a run would use."""
    return with_template(load_tokenizer(small_files(name, **hub)), chat_template, system_message)
