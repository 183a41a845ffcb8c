"""Rollouts through transformers' ``generate``: vLLM's way of asking and answering, on the model that trains.

No second copy of the weights and no server: a completion is sampled from the modules that are trained, adapter included.
Prompts are left-padded, every stop token of the model and its template ends a completion, and no sampling setting of the
checkpoint's ``generation_config.json`` leaks in.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier.data.chat import template_parts
from luthier.files import atomic_directory
from luthier.model.accelerate import base_model
from luthier.model.generation import evaluating
from luthier.rl.decoding import End, Ends, LogProb, LogProbRecorder, logits_processors
from luthier.rl.prompts import is_conversation, prompt_token_ids
from luthier.rl.sampling import SamplingParams
from luthier.terminal import progress

REQUEST_ADAPTER = "luthier_request"


@dataclass(frozen=True)
class LoraRequest:
    """An adapter directory to generate with."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class CompletionOutput:
    """One completion. ``token_ids`` holds the stop token, ``text`` does not (special tokens are left out)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    """"stop" or "length"."""
    stop_reason: int | str | None = None
    """The text or extra token that ended it; None where the model's own stop token did."""
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, LogProb]] | None = None


@dataclass
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    lora_request: LoraRequest | None = None


def fast_generate(
    model: PreTrainedModel | PeftModel,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    lora_request: LoraRequest | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    use_tqdm: bool = True,
) -> list[RequestOutput]:
    """Sample completions, one ``RequestOutput`` per prompt, in order.

    ``prompts``: a text, a conversation (list of messages), ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or a list
    of those. Without ``lora_request`` the model answers as it stands, its active adapter included (inside
    ``model.disable_adapter()``: the base). ``batch_size`` completions are decoded at a time.
    Raises ``ValueError`` for an empty prompt or one that fills the model's context.
    """
    requests = [_tokenised(number, prompt, tokenizer) for number, prompt in enumerate(_listed(prompts))]
    params = _one_each(sampling_params, len(requests))
    context = context_length(model)
    for request in requests:
        _require_room(request, context)
        request.lora_request = lora_request
    rows = [(request, param, index) for request, param in zip(requests, params, strict=True) for index in range(param.n)]
    stops = stop_token_ids(model, tokenizer)
    with using_adapter(model, lora_request) as ready, generating(ready), _bar(use_tqdm, len(rows)) as bar:
        for group in _batches(rows, batch_size):
            for (request, _, index), output in zip(group, _decode(ready, tokenizer, group, stops, context), strict=True):
                output.index = index
                request.outputs.append(output)
            bar.advance(len(group))
    for request in requests:
        request.outputs.sort(key=lambda output: output.index)
    return requests


def stop_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the checkpoint's, the tokenizer's EOS, and the chat template's stop tokens."""
    declared = getattr(model, "generation_config", None)
    declared = declared.eos_token_id if declared is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids += tokenizer.convert_tokens_to_ids(list(template_stop_tokens(tokenizer)))
    return list(dict.fromkeys(ids))


def template_stop_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The stop tokens of the tokenizer's chat template that are single tokens; none where they cannot be derived."""
    if tokenizer.chat_template is None:
        return ()
    try:
        stops = template_parts(tokenizer).stop_tokens
    except ValueError:  # an unusual template: the checkpoint's own EOS list has to do
        return ()
    return tuple(stop for stop in stops if stop in tokenizer.get_vocab())


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens that fit: the ``max_seq_length`` the model was loaded with, else its native length; None if it has none."""
    info = getattr(model, "luthier", None)
    if info is not None and info.max_seq_length is not None:
        return info.max_seq_length
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextlib.contextmanager
def generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Evaluation mode, no gradients, and a blank generation config: what the caller asks for is all that applies."""
    base = base_model(model)
    kept = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        base.generation_config = kept


# --- adapters --------------------------------------------------------------------------------------------------------


def save_lora(model: PeftModel, path: str | Path) -> Path:
    """Write the active adapter to the directory ``path``, whole or not at all."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"save_lora needs a model with an adapter, not {type(model).__name__}: call get_peft_model first")
    active = model.active_adapters
    with atomic_directory(path) as temporary:
        model.save_pretrained(temporary, selected_adapters=active, safe_serialization=True)
    return Path(path)


def load_lora(model: PreTrainedModel | PeftModel, path: str | Path) -> LoraRequest:
    """Name the adapter directory ``path`` for ``fast_generate(..., lora_request=...)``; the model itself stays as it is."""
    path = Path(path)
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is not an adapter directory (no {' and no '.join(missing)}): write one with save_lora")
    return LoraRequest(path.name, zlib.crc32(str(path.resolve()).encode()), str(path))


@contextlib.contextmanager
def using_adapter(model: PreTrainedModel | PeftModel, request: LoraRequest | None) -> Iterator[PreTrainedModel | PeftModel]:
    """The model with the adapter of ``request`` active in place of its own; afterwards everything is as before."""
    if request is None:
        yield model
        return
    if not isinstance(model, PeftModel):
        wrapped = PeftModel.from_pretrained(model, request.lora_path, is_trainable=False)
        try:
            yield wrapped
        finally:
            wrapped.unload()
        return
    active = model.active_adapters
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(request.lora_path, REQUEST_ADAPTER, is_trainable=False)
    try:
        model.base_model.set_adapter(REQUEST_ADAPTER)
        yield model
    finally:
        model.base_model.set_adapter(active)
        model.delete_adapter(REQUEST_ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


# --- prompts ---------------------------------------------------------------------------------------------------------


def _listed(prompts: Any) -> list[Any]:
    single = isinstance(prompts, str | Mapping) or is_conversation(prompts)
    listed = [prompts] if single else list(prompts)
    if listed and all(isinstance(entry, int) for entry in listed):
        return [{"prompt_token_ids": listed}]
    return listed


def _tokenised(number: int, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        ids = prompt_token_ids(text, tokenizer) if ids is None and isinstance(text, str) else ids
    elif isinstance(prompt, str) or is_conversation(prompt):
        ids = prompt_token_ids(prompt, tokenizer)
    else:
        ids = prompt if isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt) else None
    if ids is None:
        raise TypeError(
            f"Prompt {number} is {prompt!r}: give a text, a conversation, token ids, "
            "or a dictionary with 'prompt' or 'prompt_token_ids'"
        )
    return RequestOutput(str(number), text, list(ids))


def _require_room(request: RequestOutput, context: int | None) -> None:
    length = len(request.prompt_token_ids)
    if length == 0:
        raise ValueError(f"Prompt {request.request_id} is empty: there is nothing to continue")
    if context is not None and length >= context:
        raise ValueError(
            f"Prompt {request.request_id} has {length} tokens, which leaves no room in the model's {context}: "
            "shorten it or load the model with a larger max_seq_length"
        )


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} SamplingParams were given for {count} prompts: give one, or one each")
    return list(params)


# --- decoding --------------------------------------------------------------------------------------------------------

Row = tuple[RequestOutput, SamplingParams, int]


def _bar(shown: bool, total: int) -> contextlib.AbstractContextManager:
    return progress("Generating", total) if shown and total > 1 else contextlib.nullcontext(_Silent())


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        """Nothing to show."""


def _batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Rows that are sampled alike, prompts of similar length together, at most ``size`` at a time."""
    alike: list[list[Row]] = []
    for row in rows:
        group = next((group for group in alike if group[0][1] == row[1]), None)
        if group is None:
            alike.append([row])
        else:
            group.append(row)
    for group in alike:
        group.sort(key=lambda row: len(row[0].prompt_token_ids))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _decode(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    stops: list[int],
    context: int | None,
) -> list[CompletionOutput]:
    params = copy.copy(rows[0][1])
    prompts = [request.prompt_token_ids for request, _, _ in rows]
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)

    limits = [_limit(params, context, len(ids)) for ids in prompts]
    stop_ids = [*params.stop_token_ids, *([] if params.ignore_eos else stops)]
    ends = Ends(tokenizer, width, limits, stop_ids, params.stop)
    recorder = LogProbRecorder(params.logprobs, tokenizer) if params.logprobs is not None else None
    config = GenerationConfig(
        max_new_tokens=max(limits), do_sample=not params.greedy, use_cache=True, pad_token_id=pad, disable_compile=True
    )
    if not params.greedy:
        config.top_k = 0  # transformers' own default is 50
    with _seeded(_row_seed(params, rows), device):
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=logits_processors(params, tokenizer, width, stop_ids, recorder, device),
            stopping_criteria=[ends],
        )
    if recorder is not None:
        recorder.settle(sequences)
    return [
        _completion(tokenizer, params, sequences[row, width:].tolist(), end, stops, recorder, row)
        for row, end in enumerate(ends.found())
    ]


def _limit(params: SamplingParams, context: int | None, prompt_length: int) -> int:
    """Tokens that a completion may have."""
    limits = [params.max_tokens, None if context is None else context - prompt_length]
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ValueError("max_tokens=None needs a model that says how long its context is: give max_tokens")
    return min(known)


def _row_seed(params: SamplingParams, rows: list[Row]) -> int | None:
    """A seed that differs between the batches of one request, or all of them would draw the same numbers."""
    if params.seed is None:
        return None
    request, _, index = rows[0]
    return params.seed + 7919 * int(request.request_id) + index


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    params: SamplingParams,
    generated: list[int],
    end: End,
    stops: list[int],
    recorder: LogProbRecorder | None,
    row: int,
) -> CompletionOutput:
    ids = generated[: end.length]
    text = tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
    if isinstance(end.stopped_by, str):
        cut = text.find(end.stopped_by)
        text = text[: cut + (len(end.stopped_by) if params.include_stop_str_in_output else 0)] if cut >= 0 else text
    elif end.stopped_by is not None and params.skip_special_tokens and end.stopped_by in stops:
        text = tokenizer.decode(ids[:-1], skip_special_tokens=True)
    logprobs = recorder.row(row, end.length) if recorder is not None else None
    return CompletionOutput(
        index=0,
        text=text,
        token_ids=ids,
        finish_reason="length" if end.stopped_by is None else "stop",
        stop_reason=end.stopped_by if isinstance(end.stopped_by, str) or end.stopped_by in params.stop_token_ids else None,
        cumulative_logprob=logprobs and sum(step[token].logprob for step, token in zip(logprobs, ids, strict=True)),
        logprobs=logprobs,
    )
