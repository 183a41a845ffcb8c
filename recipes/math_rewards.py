"""Rewards of recipes/grpo.yaml. Columns of the dataset come by their names; each list has one entry per completion."""

from luthier.rl.answers import final_answer, last_boxed, normalised
from luthier.rl.rewards import text_of


def right_answer(completions, solution, **columns):
    """1 where the final answer is the solution's."""
    return [
        float(final_answer(text_of(completion)) == normalised(right))
        for completion, right in zip(completions, solution, strict=True)
    ]


def boxed(completions, **columns):
    """1 where there is an answer in a box at all."""
    return [float(last_boxed(text_of(completion)) is not None) for completion in completions]
