"""``luthier eval``: what a model is worth on rows it has not seen, and what its adapter changed."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Literal

from peft import PeftModel
from tyro.conf import Positional, arg

from luthier.data.images import image_root
from luthier.data.prepare import prepare_chat
from luthier.data.read import read_dataset
from luthier.data.vision import without_images
from luthier.evaluation.aime import aime
from luthier.evaluation.compare import compare, measure_loss
from luthier.evaluation.ocr import ocr
from luthier.fast import FastLanguageModel, FastVisionModel
from luthier.terminal import table
from luthier.workflows.templates import with_template


def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    data: str = "",
    task: Literal["loss", "aime", "ocr"] = "loss",
    split: str = "train",
    chat_template: str | None = None,
    max_seq_length: int | None = None,
    max_new_tokens: int | None = None,
    n: int = 8,
    temperature: float = 0.6,
    batch_size: int = 8,
    load_in_16bit: bool = False,
    resize: Literal["min", "max"] | int = "min",
    seed: int = 3407,
    json: bool = False,
) -> None:
    """Loss on held-out rows (base against tuned, for an adapter), AIME accuracy, or OCR errors.

    Args:
        model: Hub id, directory of a model, or directory of an adapter.
        data: Held-out rows: a file, a directory of files, or a hub dataset.
        task: loss: mean loss and perplexity of the answers. aime: mean@n and pass@n. ocr: word and character error rates.
        split: Split of a hub dataset.
        chat_template: Chat template by name or .jinja file. Default: the tokenizer's own, else chatml.
        max_seq_length: Longest row in tokens. Default: 2048, or the model's native length if that is shorter.
        max_new_tokens: Longest answer in tokens. Default: what fits (aime), 128 (ocr).
        n: Samples per AIME problem.
        temperature: Sampling temperature for AIME.
        batch_size: Rows at a time.
        load_in_16bit: 16-bit weights instead of NF4.
        resize: Size of the pictures (ocr), as in the training: min, max, or pixels on the longer side.
        seed: Seed of the sampling.
        json: Print the result as JSON on standard output.
    """
    if not data:
        raise ValueError("There is nothing to evaluate on: give --data a file, a directory of files, or a hub dataset")
    rows = read_dataset(data, split)
    if task == "loss":
        without_images(rows, data)
    kind = FastVisionModel if task == "ocr" else FastLanguageModel
    loaded, processor = kind.from_pretrained(model, max_seq_length, load_in_16bit=load_in_16bit)
    kind.for_inference(loaded)
    if task != "ocr":
        processor = with_template(processor, chat_template)

    if task == "ocr":
        report = ocr(loaded, processor, rows, max_new_tokens or 128, batch_size, resize, image_root=image_root(data))
    elif task == "aime":
        sampling = {"temperature": temperature, "max_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
        report = aime(loaded, processor, rows, n, **sampling)
    else:
        prepared, _ = prepare_chat(rows, processor, loaded.luthier.max_seq_length)
        measure = measure_loss(prepared, batch_size)
        report = compare(loaded, measure) if isinstance(loaded, PeftModel) else measure(loaded)
    if json:
        print(json_format.dumps(report if isinstance(report, dict) else report.to_dict(), indent=1))
    elif isinstance(report, dict):
        table(f"{model} on {data}", ("score", "value"), [(name, f"{value:.4f}") for name, value in report.items()])
    else:
        report.table()
