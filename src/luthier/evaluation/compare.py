"""Base against tuned: the same measurements with the adapter off and on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from luthier.evaluation.perplexity import perplexity
from luthier.rl.engine import fast_generate
from luthier.rl.rewards import Reward, checked, reward_name
from luthier.rl.sampling import SamplingParams
from luthier.terminal import table

Scores = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Scores by name, before and after."""

    base: Scores
    tuned: Scores

    def table(self, title: str = "Base against tuned") -> None:
        """Print both and the difference to standard error."""
        rows = [(name, f"{self.base[name]:.4f}", f"{self.tuned[name]:.4f}", f"{self.change(name):+.4f}") for name in self.tuned]
        table(title, ("score", "base", "tuned", "change"), rows)

    def change(self, name: str) -> float:
        """Tuned minus base."""
        return self.tuned[name] - self.base[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"base": self.base, "tuned": self.tuned}


def compare(model: Any, measure: Callable[[Any], Scores], base: Any | None = None) -> Comparison:
    """Call ``measure(model)`` for the base and for the tuned model.

    The base is the model with its adapter switched off, or ``base`` where one is given (a model without an adapter
    needs it). Raises ``ValueError`` where there is nothing to compare with.
    """
    if base is not None:
        before = measure(base)
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            before = measure(model)
    else:
        raise ValueError(f"{type(model).__name__} has no adapter to switch off: give the model it came from as base=")
    after = measure(model)
    if before.keys() != after.keys():
        raise ValueError(f"The two measurements have different names: {sorted(before)} and {sorted(after)}")
    return Comparison(before, after)


def measure_loss(dataset: Iterable[Mapping[str, Any]], batch_size: int = 8) -> Callable[[Any], Scores]:
    """A measurement for ``compare``: loss and perplexity on tokenised rows."""
    rows = list(dataset)

    def measure(model: Any) -> Scores:
        result = perplexity(model, rows, batch_size)
        return {"loss": result.loss, "perplexity": result.value}

    return measure


def measure_rewards(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    rewards: list[Reward],
    params: SamplingParams | None = None,
    batch_size: int = 32,
) -> Callable[[Any], Scores]:
    """A measurement for ``compare``: the mean of each reward over completions of the prompts of ``rows``, greedy by default."""
    rows = list(rows)
    params = params or SamplingParams(temperature=0, max_tokens=256)

    def measure(model: Any) -> Scores:
        prompts = [row["prompt"] for row in rows]
        outputs = fast_generate(model, prompts, params, tokenizer=tokenizer, batch_size=batch_size)
        pairs = [(row, completion) for row, output in zip(rows, outputs, strict=True) for completion in output.outputs]
        return {reward_name(reward): _mean(checked(reward)(**_batch(pairs))) for reward in rewards}

    return measure


def _batch(pairs: list[tuple[Mapping[str, Any], Any]]) -> dict[str, list[Any]]:
    conversational = not isinstance(pairs[0][0]["prompt"], str)
    texts = [completion.text for _, completion in pairs]
    columns = {key: [row[key] for row, _ in pairs] for key in pairs[0][0] if key != "prompt"}
    return {
        **columns,
        "prompts": [row["prompt"] for row, _ in pairs],
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        "completion_ids": [completion.token_ids for _, completion in pairs],
    }


def _mean(values: list[float | None]) -> float:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else float("nan")
