"""The GRPO demo: a model that answers the main demo's questions half right, and a reward that rises.

No answer is shown to it here. It samples eight answers to each question, a function in Python scores them, and what
scored better than its siblings becomes more likely.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from datasets import Dataset

from luthier.config import GRPORecipe, SFTRecipe
from luthier.data.read import read_dataset
from luthier.demo.sft import BASE, HELD_OUT, TRAIN, loaded
from luthier.evaluation.compare import measure_rewards
from luthier.files import atomic_file
from luthier.rl.rewards import text_of
from luthier.rl.sampling import SamplingParams
from luthier.terminal import say, table
from luthier.training.grpo import reward_change
from luthier.workflows import grpo, sft

BEGINNER_STEPS, STEPS, ANSWER_TOKENS = 100, 45, 24
SMALL = {"learning_rate": 3e-4, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
LARGE = {"learning_rate": 2e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
HINT = " Answer in the form 'Required: a, b. Optional: c.' and leave out a part that is empty."  # for models that know no form
PART = re.compile(r"(Required|Optional): ([^.]*)\.")
MEASURED = {
    "sampled": SamplingParams(n=2, seed=0, max_tokens=ANSWER_TOKENS),
    "greedy": SamplingParams(temperature=0, max_tokens=48),
}


def right_parts(completions: list, answer: list) -> list[float]:
    """The share of an answer's parts ("Required: ...", "Optional: ...") that are right to the letter."""
    return [_share(text_of(completion), right) for completion, right in zip(completions, answer, strict=True)]


def _share(given: str, right: str) -> float:
    parts, right_ones = dict(PART.findall(given)), dict(PART.findall(right))
    names = {*parts, *right_ones}
    return sum(parts.get(name) == right_ones.get(name) for name in names) / len(names)


def run(output: str | Path = "outputs/demo-grpo", model: str | None = None) -> dict[str, float]:
    """Train the embedded base, or ``model``, with GRPO; gives mean rewards before and after."""
    output = Path(output)

    # 1. A model that answers at all: without one right answer among its samples nothing can be learned
    start = model or str(_beginner(output / "beginner"))
    hint = HINT if model else ""
    held_out = _questions(HELD_OUT, hint)
    before = rewards(held_out, start)

    # 2. Questions without answers for the model; the answers go to the reward
    with atomic_file(output / "questions.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in _questions(TRAIN, hint)), encoding="utf-8")

    # 3. The same run as `luthier grpo` makes of a recipe
    say(f"2. GRPO: eight answers to each of four questions a step, {STEPS} steps")
    recipe = GRPORecipe(
        model=start,
        data=str(output / "questions.jsonl"),
        output=str(output),
        rewards=["luthier.demo.grpo:right_parts"],
        num_generations=8,
        max_seq_length=512,
        max_completion_length=ANSWER_TOKENS,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        logging_steps=1,
        **(LARGE if model else SMALL),
    )
    written = grpo.run(recipe)

    # 4. Before and after
    say("3. The trained adapter is read back")
    after = rewards(held_out, str(written["adapter"]))
    log = json.loads((output / grpo.LOG).read_text(encoding="utf-8"))["log_history"]
    changes = {"training, first and last fifth of the steps": reward_change(log)["whole reward"]}
    changes |= {f"{len(held_out)} held-out questions, {how}": (before[how], after[how]) for how in MEASURED}
    table("Mean reward", ("", "before", "after"), [(name, f"{old:.2f}", f"{new:.2f}") for name, (old, new) in changes.items()])
    say(f"adapter: {written['adapter']}")
    return {
        f"{name}: {when}": value
        for name, pair in changes.items()
        for when, value in zip(("before", "after"), pair, strict=True)
    }


def rewards(rows: Dataset, name: str) -> dict[str, float]:
    """Mean reward of a model's answers to ``rows``, sampled and greedy."""
    model, tokenizer = loaded(name)
    measured = {how: measure_rewards(tokenizer, rows, [right_parts], params, batch_size=50) for how, params in MEASURED.items()}
    return {how: measure(model)["right_parts"] for how, measure in measured.items()}


def _questions(file: Path, hint: str) -> Dataset:
    """Rows of "prompt" (what the model sees) and "answer" (what only the reward sees)."""
    rows = read_dataset(file)
    asked = [[{**message, "content": message["content"] + hint} for message in row["messages"][:-1]] for row in rows]
    return Dataset.from_dict({"prompt": asked, "answer": [row["messages"][-1]["content"] for row in rows]})


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
        max_steps=BEGINNER_STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        lr_scheduler_type="cosine",
        logging_steps=10,
    )
    return sft.run(recipe)["adapter"]
