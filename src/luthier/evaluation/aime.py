"""AIME: competition problems whose answers are integers from 000 to 999, sampled n times each.

``mean@n`` is the share of right answers over all samples, ``pass@n`` the share of problems with at least one: they
answer different questions and are reported apart. Intervals are percentile bootstraps over problems (the samples of one
problem are not independent), so they say what another set of problems like this one could give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.read import read_dataset
from luthier.rl.answers import AIME_MAXIMUM, aime_answer
from luthier.rl.engine import LoraRequest, RequestOutput, fast_generate
from luthier.rl.sampling import SamplingParams
from luthier.terminal import table

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PROBLEM_KEYS = ("problem", "question", "prompt")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Rate:
    """A share from 0 to 1 and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class ProblemResult:
    """What the samples of one problem answered."""

    problem: str
    answer: int
    answers: list[int | None]
    """One per sample; None where no integer from 0 to 999 was given."""
    truncated: int
    """Samples that hit the token limit."""

    @property
    def right(self) -> int:
        """Number of right samples."""
        return sum(given == self.answer for given in self.answers)


@dataclass(frozen=True)
class AIMEReport:
    """Scores of a run over a set of problems."""

    n: int
    mean_at_n: Rate
    pass_at_n: Rate
    pass_at_k: dict[int, Rate]
    """Unbiased estimates of pass@k for k = 1, 2, 4, ... n (arXiv:2107.03374); at k = n it is pass@n itself."""
    truncated: int
    unanswered: int
    """Samples without an answer of the right form, truncated ones included."""
    confidence: float
    settings: dict[str, Any]
    problems: list[ProblemResult] = field(repr=False)

    def table(self) -> None:
        """Print the scores to standard error."""
        samples = self.n * len(self.problems)
        rows = [(f"mean@{self.n}", self.mean_at_n), (f"pass@{self.n}", self.pass_at_n)]
        rows += [(f"pass@{k} (unbiased)", rate) for k, rate in self.pass_at_k.items() if 1 < k < self.n]
        rows += [("truncated", f"{self.truncated} of {samples}"), ("no answer", f"{self.unanswered} of {samples}")]
        kind = f"{self.confidence:.0%} bootstrap intervals over problems"
        table(f"AIME: {len(self.problems)} problems x {self.n} samples, {kind}", ("", "score"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def aime(
    model: Any,
    tokenizer: Any,
    problems: str | Path | Iterable[Mapping[str, Any]],
    n: int = 8,
    *,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    seed: int = 3407,
    system_prompt: str | None = None,
    instruction: str = INSTRUCTION,
    batch_size: int = 32,
    confidence: float = 0.95,
    lora_request: LoraRequest | None = None,
    generate: Callable[[list[Any], SamplingParams], Sequence[RequestOutput]] | None = None,
) -> AIMEReport:
    """Sample ``n`` solutions of each problem and score their final answers.

    ``problems``: rows with ``problem`` (or ``question``, ``prompt``) and ``answer``, or a file or hub set of such rows.
    ``max_tokens=None``: as many as fit the model. ``generate``: another engine, called as ``generate(prompts, params)``.
    The same seed, settings and batch size give the same samples. Raises ``ValueError`` for a row that is not a problem.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must be between 0 and 1, for example 0.95")
    rows = _read_problems(problems)
    params = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    prompts = [_prompt(text, tokenizer, system_prompt, instruction) for text, _ in rows]
    if generate is None:
        outputs = fast_generate(model, prompts, params, lora_request, tokenizer=tokenizer, batch_size=batch_size)
    else:
        outputs = generate(prompts, params)
    results = [_result(text, answer, output) for (text, answer), output in zip(rows, outputs, strict=True)]
    settings = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed, "batch_size": batch_size}
    return score(results, n, confidence, settings)


def score(results: Sequence[ProblemResult], n: int, confidence: float, settings: dict[str, Any]) -> AIMEReport:
    """The report on problems that were sampled ``n`` times each."""
    right = np.array([result.right for result in results])
    powers = sorted({2**exponent for exponent in range(n.bit_length()) if 2**exponent <= n} | {n})
    return AIMEReport(
        n=n,
        mean_at_n=_rate(right / n, confidence),
        pass_at_n=_rate((right > 0).astype(float), confidence),
        pass_at_k={k: _rate(np.array([pass_at_k(n, int(count), k) for count in right]), confidence) for k in powers},
        truncated=sum(result.truncated for result in results),
        unanswered=sum(given is None for result in results for given in result.answers),
        confidence=confidence,
        settings=settings,
        problems=list(results),
    )


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of ``k`` samples is right, drawn without replacement from ``n`` of which ``right`` are."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: k must be from 1 to {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _rate(scores: np.ndarray, confidence: float) -> Rate:
    draws = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    low, high = np.quantile(scores[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Rate(float(scores.mean()), float(low), float(high))


def _read_problems(problems: str | Path | Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    rows = read_dataset(str(problems)) if isinstance(problems, str | Path) else list(problems)
    if len(rows) == 0:
        raise ValueError("There are no problems to solve: give at least one row with 'problem' and 'answer'")
    return [_problem(number, row) for number, row in enumerate(rows)]


def _problem(number: int, row: Mapping[str, Any]) -> tuple[str, int]:
    columns = {str(key).lower(): value for key, value in row.items()}
    text = next((columns[key] for key in PROBLEM_KEYS if isinstance(columns.get(key), str)), None)
    if text is None or columns.get("answer") is None:
        raise ValueError(f"Problem {number} has the columns {', '.join(map(str, row))}: it needs 'problem' (text) and 'answer'")
    answer = str(columns["answer"]).strip()
    if not answer.isascii() or not answer.isdigit() or int(answer) > AIME_MAXIMUM:
        raise ValueError(f"Problem {number} has the answer {answer!r}: AIME answers are integers from 0 to {AIME_MAXIMUM}")
    return text, int(answer)


def _prompt(text: str, tokenizer: Any, system_prompt: str | None, instruction: str) -> Any:
    question = f"{text}\n\n{instruction}" if instruction else text
    if tokenizer.chat_template is None:
        return f"{system_prompt}\n\n{question}\n" if system_prompt else f"{question}\n"
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def _result(text: str, answer: int, output: RequestOutput) -> ProblemResult:
    answers = [aime_answer(completion.text) for completion in output.outputs]
    truncated = sum(completion.finish_reason == "length" for completion in output.outputs)
    return ProblemResult(text, answer, answers, truncated)
