"""The parts of one decoding batch: what is done to the logits, when a row ends, and which log-probabilities are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.rl.sampling import SamplingParams


def logits_processors(
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    prompt_width: int,
    stop_ids: list[int],
    recorder: LogitsProcessor | None,
    device: torch.device,
) -> LogitsProcessorList:
    """What ``params`` does to the logits, in vLLM's order: masks, penalties, temperature, min_p, top_k, top_p.

    ``recorder`` comes first and sees the model's own logits.
    """
    chain = LogitsProcessorList([recorder] if recorder is not None else [])
    if params.allowed_token_ids is not None:
        chain.append(Allowed(params.allowed_token_ids))
    if params.bad_words:
        chain.append(NoBadWordsLogitsProcessor(_spellings(params.bad_words, tokenizer)))
    if params.min_tokens and stop_ids:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_width, params.min_tokens, stop_ids, device=device))
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(OccurrencePenalty(prompt_width, params.presence_penalty, params.frequency_penalty))
    if params.greedy:
        return chain
    if params.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain


def _spellings(words: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each word, at the start of a text and behind a blank."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    return [ids for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts) if ids]


class Allowed(LogitsProcessor):
    """Leaves only the given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


class OccurrencePenalty(LogitsProcessor):
    """Presence and frequency penalties over the tokens of the completion, not of the prompt."""

    def __init__(self, prompt_width: int, presence: float, frequency: float) -> None:
        self.prompt_width, self.presence, self.frequency = prompt_width, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        completion = input_ids[:, self.prompt_width :]
        counts = torch.zeros_like(scores).scatter_add_(1, completion, torch.ones_like(completion, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


@dataclass(frozen=True)
class End:
    """Where a row ended: its number of tokens, and the stop token or text that ended it (None: its limit)."""

    length: int
    stopped_by: int | str | None


class Ends(StoppingCriteria):
    """Ends each row at its stop token, its stop text or its own limit, and remembers where."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_width: int, limits: list[int], stop_ids: list[int], stops: list[str]
    ) -> None:
        self.tokenizer, self.prompt_width, self.limits = tokenizer, prompt_width, limits
        self.stop_ids, self.stops = set(stop_ids), stops
        # A character takes at most four byte-level tokens, so this tail holds every stop text that just ended.
        self.tail = 4 * max(map(len, stops)) + 4 if stops else 0
        self.ends: list[End | None] = [None] * len(limits)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        completions = input_ids[:, self.prompt_width :]
        length = completions.shape[1]
        for row, (tokens, end) in enumerate(zip(completions[:, -max(self.tail, 1) :].tolist(), self.ends, strict=True)):
            if end is None:
                self.ends[row] = self._end(tokens, length, self.limits[row])
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _end(self, tokens: list[int], length: int, limit: int) -> End | None:
        if tokens[-1] in self.stop_ids:
            return End(length, tokens[-1])
        if self.stops:
            text = self.tokenizer.decode(tokens, skip_special_tokens=False)
            found = [(text.find(stop), stop) for stop in self.stops if stop in text]
            if found:
                return End(length, min(found)[1])
        return End(length, None) if length >= limit else None

    def found(self) -> list[End]:
        """The end of each row; call when generation is over."""
        assert all(end is not None for end in self.ends), "generation stopped before every row had ended"
        return [end for end in self.ends if end is not None]


@dataclass(frozen=True)
class LogProb:
    """Log-probability of a token under the model's own distribution, and its rank (1 is the most probable)."""

    logprob: float
    rank: int
    decoded_token: str


class LogProbRecorder(LogitsProcessor):
    """Keeps the log-probabilities of each sampled token and of the ``top`` most probable ones."""

    def __init__(self, top: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.top, self.tokenizer = top, tokenizer
        self.pending: torch.Tensor | None = None  # (batch, vocabulary), of the step whose token is not sampled yet
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (batch, 1 + top): tokens, log-probs, ranks

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.settle(input_ids)
        self.pending = scores.float().log_softmax(-1)
        return scores

    def settle(self, input_ids: torch.Tensor) -> None:
        """Note the token that was sampled last; call once more when generation is over."""
        if self.pending is None:
            return
        sampled = input_ids[:, -1:]
        chosen = self.pending.gather(1, sampled)
        best = self.pending.topk(self.top, dim=1)
        ranks = torch.arange(1, self.top + 1, device=chosen.device).expand(len(chosen), -1)
        rank = (self.pending > chosen).sum(1, keepdim=True) + 1
        self.steps.append(
            tuple(torch.cat(pair, 1).cpu() for pair in ((best.indices, sampled), (best.values, chosen), (ranks, rank)))
        )
        self.pending = None

    def row(self, row: int, length: int) -> list[dict[int, LogProb]]:
        """Per token of a row: the log-probabilities kept, by token id."""
        return [
            {
                token: LogProb(logprob, rank, self.tokenizer.decode([token]))
                for token, logprob, rank in zip(*(part[row].tolist() for part in step), strict=True)
            }
            for step in self.steps[:length]
        ]
