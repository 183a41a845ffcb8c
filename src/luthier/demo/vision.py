"""The vision demo: a model that reads print learns to read signs at night, in a chat.

The base (``vision_base``, a Qwen2.5-VL of about 3 M parameters) was pretrained on clear, straight, printed words and on nothing
else: no chat, no tilt, no blur. A few hundred labelled signs later it answers a question about a picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

from luthier.config import VisionRecipe
from luthier.data.read import read_dataset
from luthier.demo.text_images import SIGN, draw, sign_text
from luthier.evaluation.ocr import OCRReport, ocr
from luthier.fast import FastVisionModel
from luthier.files import atomic_file
from luthier.terminal import say, table
from luthier.workflows import vision

BASE = Path(__file__).parent / "vision_base"
QUESTION = "Read it."
ROWS, HELD_OUT, SEED = 600, 100, 3407
SMALL = {"learning_rate": 2e-3, "max_steps": 300, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
LARGE = {"learning_rate": 2e-4, "max_steps": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def run(output: str | Path = "outputs/demo-vision", model: str | None = None) -> dict[str, float]:
    """Fine-tune the embedded base, or ``model``; gives the word error rate on held-out signs, by stage."""
    output = Path(output)
    base = model or str(BASE)
    train = write_rows(output / "data", "train", ROWS, SEED)
    test = write_rows(output / "data", "test", HELD_OUT, SEED + 1)
    signs = read_dataset(test)
    reports: dict[str, OCRReport] = {}

    def read(model, processor) -> OCRReport:
        return ocr(model, processor, signs, max_new_tokens=24, batch_size=25, image_root=test.parent)

    # 1. What the base can do, in NF4
    say(f"1. {base} reads {HELD_OUT} signs")
    reports["base"] = read(*FastVisionModel.from_pretrained(base, max_seq_length=256))

    # 2. The same run as `luthier vision` makes of a recipe
    say(f"2. It is fine-tuned on {ROWS} other signs")
    recipe = VisionRecipe(
        model=base,
        data=str(train),
        output=str(output),
        max_seq_length=256,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_method="merged_16bit",
        base="nf4",
        **(LARGE if model else SMALL),
    )
    written = vision.run(recipe)

    # 3. What was written, each read back: the adapter, and the merged model in plain transformers
    say("3. What was written is read back")
    reports["adapter"] = read(*FastVisionModel.from_pretrained(str(written["adapter"]), max_seq_length=256))
    reports["merged, in plain transformers"] = read(
        AutoModelForImageTextToText.from_pretrained(written["merged_16bit"], dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(written["merged_16bit"]),
    )

    example = reports["base"].samples[0].reference
    rows = [(name, f"{report.wer:.0%}", f"{report.cer:.0%}", report.samples[0].answer) for name, report in reports.items()]
    table("Held-out signs", ("model", "word errors", "character errors", f"reads {example!r} as"), rows)
    for kind, path in {"data": test.parent, **written}.items():
        say(f"{kind}: {path}")
    return {name: report.wer for name, report in reports.items()}


def write_rows(directory: Path, name: str, count: int, seed: int) -> Path:
    """``count`` signs as PNG files below ``directory`` and a JSONL file of chat rows about them -> the JSONL file."""
    rng = np.random.default_rng(seed)
    pictures = directory / name
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        text = sign_text(rng)
        draw(text, SIGN, rng).save(pictures / f"{index:03}.png")
        question = [{"type": "image", "image": f"{name}/{index:03}.png"}, {"type": "text", "text": QUESTION}]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]})
    with atomic_file(directory / f"{name}.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory / f"{name}.jsonl"
