"""The GRPO demo: a model that answers the main demo's questions half right, and a reward that rises.

No answer is shown to it here. It samples several answers to each question, a function in Python scores them, and what
scored better than its siblings becomes more likely.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from luthier.config import GRPORecipe, SFTRecipe
from luthier.data.read import read_dataset
from luthier.demo.sft import BASE, HELD_OUT, TRAIN, loaded, score
from luthier.files import atomic_file
from luthier.rl.rewards import text_of
from luthier.terminal import say, table
from luthier.training.grpo import reward_change
from luthier.workflows import grpo, sft

PROMPTS = 48  # 8 a step: every fifth of the 30 steps goes over all of them once, so first and last are comparable
SMALL = {"learning_rate": 3e-4, "max_steps": 30, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
LARGE = {"learning_rate": 1e-5, "max_steps": 60, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}


def exactly(completions: list, answer: list) -> list[float]:
    """1 for the right answer to the letter."""
    return [float(text_of(completion).strip() == right) for completion, right in zip(completions, answer, strict=True)]


def names(completions: list, answer: list) -> list[float]:
    """How well the names in the answer match the right ones: harmonic mean of precision and recall, 0 to 1."""
    return [_overlap(text_of(completion), right) for completion, right in zip(completions, answer, strict=True)]


def _overlap(given: str, right: str) -> float:
    given_names, right_names = set(re.findall(r"\w+", given)), set(re.findall(r"\w+", right))
    return 2 * len(given_names & right_names) / (len(given_names) + len(right_names))


def run(output: str | Path = "outputs/demo-grpo", model: str | None = None) -> dict[str, float]:
    """Train the embedded base, or ``model``, with GRPO; gives rewards and held-out scores before and after."""
    output = Path(output)

    # 1. A model that answers at all: without one right answer among its samples nothing can be learned
    start = model or str(_beginner(output / "beginner"))
    held_out = read_dataset(HELD_OUT)
    before = score(held_out, *loaded(start))

    # 2. Questions without answers for the model; the answers go to the rewards
    rows = [{"prompt": row["messages"][:-1], "answer": row["messages"][-1]["content"]} for row in read_dataset(TRAIN)]
    with atomic_file(output / "prompts.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:PROMPTS]), encoding="utf-8")

    # 3. The same run as `luthier grpo` makes of a recipe
    say(f"2. GRPO on {PROMPTS} questions")
    recipe = GRPORecipe(
        model=start,
        data=str(output / "prompts.jsonl"),
        output=str(output),
        rewards=["luthier.demo.grpo:exactly", "luthier.demo.grpo:names"],
        num_generations=4,
        max_seq_length=512,
        max_completion_length=32,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        logging_steps=1,
        **(LARGE if model else SMALL),
    )
    written = grpo.run(recipe)

    # 4. Before and after
    say("3. The trained adapter is read back")
    after = score(held_out, *loaded(str(written["adapter"])))
    log = json.loads((output / grpo.LOG).read_text(encoding="utf-8"))["log_history"]
    changes = {f"mean {name}, sampled": change for name, change in reward_change(log).items()}
    changes["held-out rows answered exactly, greedy"] = (before, after)
    table("GRPO", ("", "before", "after"), [(name, f"{first:.2f}", f"{last:.2f}") for name, (first, last) in changes.items()])
    say(f"adapter: {written['adapter']}")
    return {
        f"{name}, {when}": value
        for name, change in changes.items()
        for when, value in zip(("before", "after"), change, strict=True)
    }


def _beginner(output: Path) -> Path:
    """The embedded base after a short fine-tuning: it knows what an answer looks like, and is often wrong."""
    say("1. The embedded base is fine-tuned for a moment, so that it answers at all")
    recipe = SFTRecipe(
        model=str(BASE),
        data=str(TRAIN),
        output=str(output),
        max_seq_length=512,
        chat_template="chatml",
        learning_rate=2e-3,
        max_steps=50,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        logging_steps=10,
    )
    return sft.run(recipe)["adapter"]
