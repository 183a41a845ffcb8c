"""How completions are sampled: the fields of vLLM's ``SamplingParams``, each honoured or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import UnsupportedError, unknown

# Fields of vLLM that the engine here does not have. Given at vLLM's default they say nothing and are let through.
REFUSED = {
    "best_of": (None, "ask for n completions and choose among them"),
    "prompt_logprobs": (None, "call the model on the prompt"),
    "logits_processors": (None, "use allowed_token_ids, bad_words or logit_bias where they do, else model.generate"),
    "guided_decoding": (None, "use vLLM for guided decoding"),
    "structured_outputs": (None, "use vLLM for structured outputs"),
    "truncate_prompt_tokens": (None, "cut the prompt yourself: nothing here truncates"),
    "logit_bias": (None, "use allowed_token_ids or bad_words"),
    "detokenize": (True, "token ids come with the text: ignore the text"),
    "spaces_between_special_tokens": (True, "decode token_ids yourself"),
    "output_kind": (None, "outputs come when they are complete"),
    "extra_args": (None, "give the fields of SamplingParams"),
    "use_beam_search": (False, "use model.generate(num_beams=...)"),
}


@dataclass(init=False)
class SamplingParams:
    """Sampling of one request. Raises ``ValueError`` for a value out of range, ``TypeError``/``UnsupportedError`` for a
    field that does not exist / is not supported here, naming it."""

    n: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability mass, in (0, 1]."""
    top_k: int = 0
    """Number of most probable tokens to choose from; 0 or -1 for all."""
    min_p: float = 0.0
    """Least probability relative to the most probable token's, in [0, 1]."""
    max_tokens: int | None = 16
    """Most tokens of a completion; None for all that fit the model's context."""
    min_tokens: int = 0
    """Tokens before which no stop token is sampled."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the completion less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the completion holds."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once per occurrence in the completion."""
    stop: str | list[str] | None = None
    """Texts that end a completion; not part of its text unless ``include_stop_str_in_output``."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a completion, beside the model's own stop tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop text at the end of the completion's text."""
    ignore_eos: bool = False
    """Go on past the model's own stop tokens."""
    bad_words: list[str] | None = None
    """Texts that are never completed."""
    allowed_token_ids: list[int] | None = None
    """The only tokens that may be sampled."""
    logprobs: int | None = None
    """Return log-probabilities of the sampled token and so many of the most probable ones, before temperature."""
    seed: int | None = None
    """Seed of this request; None draws from torch's global generator."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            self._refuse_foreign(name, value)
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, given.get(entry.name, entry.default))
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids, self.bad_words = list(self.stop_token_ids or ()), list(self.bad_words or ())
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self._check()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken each time."""
        return self.temperature == 0

    @classmethod
    def _refuse_foreign(cls, name: str, value: Any) -> None:
        names = [entry.name for entry in dataclasses.fields(cls)]
        if name in names:
            return
        if name not in REFUSED:
            raise TypeError(str(unknown("sampling parameter", name, names)))
        default, remedy = REFUSED[name]
        if value != default:
            raise UnsupportedError(f"SamplingParams({name}={value!r}) is not supported by this engine: {remedy}")

    def _check(self) -> None:
        ranges: Sequence[tuple[str, bool, str]] = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "a number of tokens, or 0 or -1 for all"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            ("bad_words", all(isinstance(text, str) and text for text in self.bad_words), "texts that are not empty"),
            ("allowed_token_ids", self.allowed_token_ids is None or bool(self.allowed_token_ids), "None or at least one token"),
        )
        for name, fits, allowed in ranges:
            if not fits:
                raise ValueError(f"SamplingParams({name}={getattr(self, name)!r}): it must be {allowed}")
        if self.greedy and self.n > 1:
            raise ValueError(f"SamplingParams(n={self.n}, temperature=0): greedy completions are all the same, so n must be 1")
