"""What the trained model says, for the files that are proved against it: its logits, and what its layers compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.data.render import render
from luthier.gguf.architectures import find
from luthier.gguf.chat import load_tokenizer
from luthier.gguf.imatrix import Importance
from luthier.gguf.metadata import context_length
from luthier.proof.deviation import as_llama_cpp, measured
from luthier.proof.probes import Probes, probe
from luthier.proof.vision import VisionReference, vision_reference_of

LONGEST = 128  # tokens of a prompt
BATCH = 8  # prompts that the trained model computes at once
TEXTS = (
    "A luthier builds and repairs lutes, violins and guitars; the word comes from the French for lute.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2))  # 12.56636\n",
    "In 1644 the workshop sold 27 instruments, at 1,250 lire each; what did it earn, less 15% for wood?",
    "Die Straße führt über die Brücke. ¿Qué hora es? 你好,世界。Привет, мир! 🎻",
    "  two spaces,\ttab,\n\nblank line; it's we'll they've DON'T\r\n",
)
QUESTIONS = ("What does a luthier do?", "Name three instruments with strings.")


@dataclass(frozen=True)
class Reference:
    """What the trained model says: prompts as token ids, and its logits float32 ``[length, vocabulary]`` for each.

    ``deviation``: what no file can say; the logits are then those of the model with it.
    """

    config: Any
    tokenizer: Any
    template: str | None
    sequences: list[list[int]]
    logits: list[torch.Tensor]
    exact: bool  # computed in 32 bits
    deviation: str = ""
    vision: VisionReference | None = None
    probes: Probes | None = None
    importance: Importance = field(default_factory=dict)  # what its files were rounded with
    texts: Sequence[str] = ()  # of the user's own, whose tokens are compared
    slack: float = 0.0  # what weights may be off by, as those that were in 16 bits on the way


def reference_of(
    model: Any, tokenizer: Any, prompts: Sequence[str] | None = None, importance: Importance | None = None
) -> Reference:
    """What ``model`` says to ``prompts``, by default a few texts and questions in its chat template.

    The model must stay as it is while files are compared with it. ``importance``: what they were rounded with.
    """
    processor, tokenizer = tokenizer, load_tokenizer(tokenizer)
    texts = list(prompts) if prompts else [*TEXTS, *conversations(tokenizer)]
    longest = min(LONGEST, context_length(find(model.config), model.config.get_text_config()))
    sequences = [ids for text in texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"][:longest])]
    training = model.training
    model.eval()

    logits: list[torch.Tensor] = []

    def answer() -> None:
        batches = [sequences[first : first + BATCH] for first in range(0, len(sequences), BATCH)]
        logits[:] = [row for batch in batches for row in _logits(model, batch)]

    lengths = [len(sequence) for sequence in sequences[:BATCH]]
    with as_llama_cpp(model) as deviation:
        probes = probe(model, answer, lengths.index(max(lengths)), max(lengths))
    if deviation:
        as_there = list(logits)
        answer()
        deviation = measured(deviation, logits, as_there)
        logits = as_there
    vision = vision_reference_of(model, processor, tokenizer)
    model.train(training)
    in_32_bits = all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.is_floating_point())
    exact = in_32_bits and probes.rounding <= 1e-3
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return Reference(
        model.config, tokenizer, template, sequences, logits, exact, deviation, vision, probes, importance or {}, prompts or ()
    )


@torch.no_grad()
def _logits(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Float32 ``[length, vocabulary]`` for each sequence, on the CPU; all in one forward, which may read the weights anew."""
    device, longest = next(model.parameters()).device, max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    logits = model(ids, attention_mask=mask.long()).logits
    return [row[: len(sequence)].float().cpu() for row, sequence in zip(logits, sequences, strict=True)]


def conversations(tokenizer: Any) -> list[str]:
    """Questions in the tokenizer's chat template; none without one."""
    if not tokenizer.chat_template:
        return []
    return [render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True) for text in QUESTIONS]
