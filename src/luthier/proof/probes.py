"""What the trained model's own layers make of made inputs: every matrix of it, seen through a few vectors.

While the model answers the prompts, a few rows are put behind what goes into each of its layers and taken off what comes
out: random signs, and the directions that the layer's adapter reads. So the adapter is seen as the model computes it, over
the weights that it is exported over, and nothing is asked of the code that merges, renames and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import normalize

from luthier.gguf.experts import expert_biases, expert_tensors, experts_of
from luthier.model.targets import plain_name

RANDOM = 32  # random inputs of a matrix
ROWS = 1 << 13  # of the embeddings at a time
IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?(\w+)$")
OUTSIDE = re.compile(r"(?:^|\.)(embed_tokens|norm|lm_head)$")
VISION = re.compile(r"(?:^|\.)(visual|vision_tower|vision_model|multi_modal_projector)\.")

# module of the trained model -> the tensor that llama.cpp computes in its place; of two, the first that a file has
TENSORS = {
    "q_proj": ("attn_q",), "k_proj": ("attn_k",), "v_proj": ("attn_v",), "qkv_proj": ("attn_qkv",), "o_proj": ("attn_output",),
    "gate_proj": ("ffn_gate",), "up_proj": ("ffn_up",), "gate_up_proj": ("ffn_up",), "down_proj": ("ffn_down",),
    "q_norm": ("attn_q_norm",), "k_norm": ("attn_k_norm",), "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("post_attention_norm", "ffn_norm"), "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("post_ffw_norm",), "gate": ("ffn_gate_inp",), "router": ("ffn_gate_inp",),
    "embed_tokens": ("token_embd",), "norm": ("output_norm",), "lm_head": ("output", "token_embd"),
}  # fmt: skip
ROUTERS = ("gate", "router")

Names = tuple[str, ...]  # what a file may call a tensor


@dataclass
class Probe:
    """A matrix ``[out, in]`` of the trained model: ``outputs`` ``[n, out]`` of ``inputs`` ``[n, in]``, without its bias.

    The first ``random`` inputs are random signs, the others unit vectors along what the adapter reads. ``base``: what
    comes out without the adapter, where there is one.
    """

    inputs: Tensor
    outputs: Tensor
    base: Tensor | None = None
    random: int = RANDOM


@dataclass
class Probes:
    """Of the language part of a model: its matrices, its norms and biases as they are, and what its attention computes."""

    matrices: dict[Names, Probe] = field(default_factory=dict)
    vectors: dict[Names, Tensor] = field(default_factory=dict)
    # of one prompt, by layer: what attention's matrices give (attn_q...) and what goes into the last (attn_output)
    attention: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    rounding: float = 0.0  # what an output may be off by for the precision it was computed in, as a share of it
    whole: Callable[[Names], Tensor] | None = None  # one of the matrices, float32; the model computes for it


@torch.no_grad()
def probe(model: nn.Module, run: Callable[[], None], row: int, length: int) -> Probes:
    """Call ``run``, which must compute the model, and note meanwhile what its layers make of made inputs.

    ``row``, ``length``: of the prompt, in what is computed first, that attention is noted of.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    found = Probes()
    layers = {names: module for names, module in _layers(model) if not names[0].startswith("token_embd")}
    found.whole = lambda names: _whole(model, names, layers.get(names), found.matrices[names].inputs)
    watches = [_Watch(found, names, module, row, length) for names, module in layers.items()]
    try:
        run()
    finally:
        for watch in watches:
            watch.remove()
    for names, layer in layers.items():
        if names in found.matrices and _biased(layer):
            found.matrices[names] = _probed_without_bias(layer, found.matrices[names])
    for names, value, base in _held(model):
        if value.ndim == 1 or names[0].endswith(".bias"):
            found.vectors[names] = value.flatten()
        else:
            rows, plain = (part if part is None else part.reshape(-1, part.shape[-1]) for part in (value, base))
            inputs = _signs(rows.shape[-1], rows.device, rows.dtype)
            found.matrices[names] = Probe(inputs, inputs @ rows.T, None if plain is None else inputs.to(plain.dtype) @ plain.T)
    found.rounding = max(_rounding(model, dtype) for dtype in {probe.inputs.dtype for probe in found.matrices.values()})
    return found


@torch.no_grad()
def _whole(model: nn.Module, names: Names, layer: nn.Module | None, like: Tensor) -> Tensor:
    """A matrix as the model computes with it now: what its layer, if it has one, makes of every unit vector of the kind of
    ``like``.
    """
    if layer is None:
        return next(
            value.detach().reshape(-1, value.shape[-1]).float() for held, value, _ in _held(model, names) if held == names
        )
    training = layer.training
    layer.eval()
    try:
        with _without_bias(layer):
            unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
            return (layer(unit) - layer(torch.zeros_like(unit[:1]))).T.float()
    finally:
        layer.train(training)


def _probed_without_bias(layer: nn.Module, probe: Probe) -> Probe:
    """``probe`` once more: in 16 bits, a bias that is large beside what the weights give leaves little of that."""
    with _without_bias(layer):
        plain = layer.get_base_layer() if isinstance(layer, LoraLayer) else getattr(layer, "original_module", layer)
        base = None if probe.base is None else plain(probe.inputs)
        return dataclasses.replace(probe, outputs=layer(probe.inputs), base=base)


def _biased(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if "bias" in dict(module.named_parameters(recurse=False))]


@contextlib.contextmanager
def _without_bias(layer: nn.Module) -> Iterator[None]:
    held = [(module, module.bias) for module in _biased(layer)]
    try:
        for module, _ in held:
            module.bias = None
        yield
    finally:
        for module, bias in held:
            module.bias = bias


def _layers(model: nn.Module) -> Iterator[tuple[Names, nn.Module]]:
    """Every layer that takes vectors to vectors, and the embeddings, with what is wrapped around them."""
    seen = set()
    for path, module in model.named_modules():
        names, leaf = _names(path)
        if names and leaf not in ROUTERS and names not in seen:
            seen.add(names)
            yield names, module


def _names(path: str) -> tuple[Names, str]:
    """What a file may call the weight of the module at ``path``, and the module's own name; nothing for other modules."""
    plain = plain_name(path)
    if plain is None or VISION.search(plain):
        return (), ""
    inside, outside = IN_LAYER.search(plain), OUTSIDE.search(plain)
    prefix, leaf = (f"blk.{inside[1]}.", inside[2]) if inside else ("", outside[1] if outside else "")
    return tuple(f"{prefix}{name}.weight" for name in TENSORS.get(leaf, ())), leaf


def _rounding(model: nn.Module, dtype: torch.dtype) -> float:
    """What an output of a layer that takes ``dtype`` may be off by: in 8 or 16 bits; in 32, of which a GPU may take 19."""
    modules = [module for path, module in model.named_modules() if not VISION.search(path)]
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in modules):
        return 0.02
    if {dtype, *(getattr(module, "compute_dtype", None) for module in modules)} <= {torch.float32, None}:
        return 1e-3 if next(model.parameters()).is_cuda else 1e-5
    return 4e-3


@functools.lru_cache(8)
def _signs(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random signs ``[RANDOM, width]``, always the same."""
    signs = torch.randint(0, 2, (RANDOM, width), generator=torch.Generator().manual_seed(width))
    return (2 * signs - 1).to(device, dtype)


class _Watch:
    """One layer, until it has been computed once."""

    def __init__(self, found: Probes, names: Names, module: nn.Module, row: int, length: int) -> None:
        self.found, self.names, self.module, self.row, self.length = found, names, module, row, length
        self.base = None
        self.hooks = [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]
        if isinstance(module, LoraLayer):
            self.hooks.append(module.get_base_layer().register_forward_hook(self._after_base))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        self.shape = x.shape
        self._note_attention(("attn_output",), x)
        if self.names[0].endswith("norm.weight"):
            self.rows = x.new_ones(1, x.shape[-1])
        else:
            self.rows = torch.cat([_signs(x.shape[-1], x.device, x.dtype), self._adapter(x), x.new_zeros(1, x.shape[-1])])
        return (torch.cat([x.reshape(-1, x.shape[-1]), self.rows]), *inputs[1:])

    def _note_attention(self, stems: tuple[str, ...], values: Tensor) -> None:
        """Keep ``values`` ``[prompts, length, ...]`` of one prompt, if they are of one of these matrices."""
        _, number, stem, *_ = (*self.names[0].split("."), "", "")
        if stem in stems and values.ndim == 3:
            self.found.attention[int(number)][stem] = values[self.row, : self.length].clone()

    def _adapter(self, x: Tensor) -> Tensor:
        """Unit vectors along what the adapter of this layer reads: ``[ranks, in]``."""
        if not isinstance(self.module, LoraLayer):
            return x.new_empty(0, x.shape[-1])
        reads = [self.module.lora_A[name].weight for name in self.module.active_adapters if name in self.module.lora_A]
        return torch.cat(
            [normalize(rows.to(x.device).float()).to(x.dtype) for rows in reads] or [x[:0].reshape(0, x.shape[-1])]
        )

    def _after_base(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.base = output[-len(self.rows) :]

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        count, names = len(self.rows), self.names
        output, made = output[:-count].reshape(*self.shape[:-1], -1), output[-count:]
        self._note_attention(("attn_q", "attn_k", "attn_v", "attn_qkv"), output)
        original = getattr(module, "original_module", None)
        if original is not None:
            self.base = original(self.rows)
        if names[0].endswith("norm.weight"):
            self.found.vectors[names] = made[0]
        else:
            bias = made[-1]
            self.found.vectors[tuple(name.removesuffix("weight") + "bias" for name in names)] = bias.clone()
            base = None if self.base is None else self.base[:-1] - self.base[-1]
            self.found.matrices[names] = Probe(self.rows[:-1], made[:-1] - bias, base, RANDOM)
        self.remove()
        return output


def _held(model: nn.Module, only: Names | None = None) -> Iterator[tuple[Names, Tensor, Tensor | None]]:
    """What no layer takes vectors through alone: (names, value, what it is without the adapter, where there is one)."""
    wrappers, seen = _wrappers(model), set()
    for names, module in _layers(model):
        if names[0].startswith("token_embd") and only in (None, names):
            yield names, *_embeddings(module)
    for prefix, experts in experts_of(model):
        if only is None or only[0].startswith(f"{prefix}."):
            plain, changes = expert_tensors(prefix, experts), _added(wrappers[experts])
            for name, value in (expert_tensors(prefix, experts, changes) if changes else plain).items():
                yield (name,), value, plain[name] if changes else None
            for name, value in expert_biases(prefix, experts).items():
                yield (name,), value, None
    for path, module in model.named_modules():
        names, leaf = _names(path)
        if leaf in ROUTERS and names not in seen:
            seen.add(names)
            yield from _router(names, module, wrappers)
        layer = IN_LAYER.search(path)
        if layer and isinstance(getattr(module, "sinks", None), nn.Parameter):
            yield (f"blk.{layer[1]}.attn_sinks.weight",), module.sinks, None


def _router(names: Names, module: nn.Module, wrappers: Mapping[nn.Module, list[ParamWrapper]]) -> Iterator[tuple]:
    """What chooses experts, with what is wrapped around it: its weight and its bias, as `_held` has them."""
    if isinstance(module, ModulesToSaveWrapper):
        base, module = module.original_module.weight, module.modules_to_save[module.active_adapters[0]]
        yield names, module.weight, base
    else:
        module = module.get_base_layer() if isinstance(module, ParamWrapper) else module
        changes = _added(wrappers[module])
        yield names, module.weight + changes.get("weight", 0), module.weight if changes else None
    if getattr(module, "bias", None) is not None:
        yield tuple(name.removesuffix("weight") + "bias" for name in names), module.bias, None


def _wrappers(model: nn.Module) -> dict[nn.Module, list[ParamWrapper]]:
    """peft's wrappers of single parameters, such as stacks of experts, by the module that these are of."""
    found: dict[nn.Module, list[ParamWrapper]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, ParamWrapper) and any(name in module.lora_A for name in module.active_adapters):
            found[module.get_base_layer()].append(module)
    return found


def _added(wrappers: list[ParamWrapper]) -> dict[str, Tensor]:
    """What they add to parameters of their module in a forward, by the names of those."""
    return {
        wrapper.parameter_name: sum(
            wrapper.get_delta_weight(name).float() for name in wrapper.active_adapters if name in wrapper.lora_A
        )
        for wrapper in wrappers
    }


def _embeddings(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Every row of the embeddings, without the factor that some models put to them here; and without the adapter."""
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else getattr(module, "original_module", module)
    ids = torch.arange(len(inner.weight), device=inner.weight.device).split(ROWS)
    scale = float(getattr(inner, "embed_scale", 1.0))

    def all_of(part: nn.Module) -> Tensor:
        return torch.cat([part(some) for some in ids]) / scale

    return all_of(module), None if inner is module else all_of(inner)
