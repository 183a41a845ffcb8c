"""``luthier demo``: the whole pipeline on an embedded model, or on any other."""

from __future__ import annotations

import importlib
import json as json_format

from luthier.errors import UnsupportedError


def demo(
    model: str | None = None, grpo: bool = False, vision: bool = False, output: str | None = None, json: bool = False
) -> None:
    """Fine-tune a small embedded model on real rows, and read back everything that was written.

    Args:
        model: Hub id or local directory to use instead of the embedded model.
        grpo: Reinforcement learning instead: a reward that rises.
        vision: A vision-language model instead: a word error rate that falls.
        output: Directory for everything that is written. Default: outputs/demo, -grpo or -vision behind it.
        json: Print the scores as JSON on standard output.
    """
    if grpo and vision:
        raise UnsupportedError("--grpo and --vision are two demos: choose one")
    name = "grpo" if grpo else "vision" if vision else "sft"
    place = output or ("outputs/demo" if name == "sft" else f"outputs/demo-{name}")
    scores = importlib.import_module(f"luthier.demo.{name}").run(output=place, model=model)
    if json:
        print(json_format.dumps(scores, indent=1))
