"""What a training run will take on the device, from a config alone: arithmetic, before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from luthier import adapters
from luthier.errors import unknown
from luthier.gguf.metadata import is_tied
from luthier.model.blocks import Mode
from luthier.model.checkpointing import checkpointing_mode
from luthier.model.cost import Cost, LayerPlan, Shape, offload_plan, plan_for
from luthier.model.device_memory import GIB
from luthier.model.dial import HOST_SHARE
from luthier.model.experts import BLOCK, expert_stacks, routed
from luthier.model.host_memory import free_host_memory
from luthier.model.precision import has_experts
from luthier.model.targets import LAYER_INDEX, require_targets
from luthier.ops.experts import WRITTEN_BYTES

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: its code, a share of a byte of scale, and of that scale's own
PRECISIONS = {"nf4": NF4_BYTES, "int8": 1.0, "16bit": 2.0, "full": 2.0}
MOMENTS = {"8bit": 2, "sgd": 0, "adafactor": 0}  # bytes a parameter by part of the optimizer's name; else two fp32 numbers


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for; ``plan`` says what each layer keeps."""

    parts: dict[str, int]
    plan: tuple[LayerPlan, ...]
    tokens: int
    host: int = 0  # bytes of pinned host memory

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """Bytes that do not grow with the batch."""
        return sum(size for name, size in self.parts.items() if name != "activations")

    def rows(self) -> list[tuple[str, str]]:
        """The lines of a table, in GiB."""
        return [
            *((name, f"{size / GIB:.2f} GiB") for name, size in self.parts.items()),
            ("total", f"{self.total / GIB:.2f} GiB"),
        ]

    def to_dict(self) -> dict[str, int]:
        return {**self.parts, "total": self.total}


def estimate(
    config: PreTrainedConfig,
    precision: str = "nf4",
    r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    use_gradient_checkpointing: bool | str = "auto",
    memory_budget: float | None = None,
    optim: str = "adamw_torch",
    dtype: torch.dtype = torch.bfloat16,
    compute: str = "bf16",
) -> Estimate:
    """The memory of one training step on ``batch_tokens`` tokens (rows times length) of a model with this config.

    ``memory_budget`` (GiB) is what "auto" fits the layers into; without one it recomputes every layer.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    model = _skeleton(config)
    require_targets(model, target_modules)
    linears = _linear_layers(model)
    stacks = expert_stacks(model)
    parts = _weights(model, linears, stacks, precision, dtype)
    trainable = _trainable(model, linears, stacks, precision, r, target_modules, modules_to_save)
    moments = next((size for part, size in MOMENTS.items() if part in optim.lower()), 8)
    if precision == "full":
        parts |= {"gradients": trainable * dtype.itemsize, "optimizer": trainable * min(moments, 2 * dtype.itemsize)}
    else:
        parts |= {"adapter": trainable * 4, "gradients": trainable * 4, "optimizer": trainable * moments}
    if precision in ("nf4", "int8"):
        parts["one expanded layer"] = _largest_layer(model, dtype)

    text = config.get_text_config()
    shape = replace(_shape(text, r if precision != "full" else 0, dtype), compute=compute)
    if "one expanded layer" in parts:
        parts["one expanded layer"] *= shape.written() / replace(shape, compute="bf16").written()
    layers, host = text.num_hidden_layers, free_host_memory() * HOST_SHARE
    taken = sum(parts.values())
    if checkpointing_mode(use_gradient_checkpointing) == "offload" and precision != "full" and not is_tied(config):
        parts["embeddings, head and norms"] -= text.vocab_size * text.hidden_size * dtype.itemsize  # they wait there too
    plan = _plan(shape, batch_tokens, layers, use_gradient_checkpointing, memory_budget, taken, host)
    cost = Cost(shape, batch_tokens)
    parts["activations"] = cost.device(plan)
    return Estimate({name: int(size) for name, size in parts.items()}, tuple(plan), batch_tokens, cost.host(plan))


def _skeleton(config: PreTrainedConfig) -> nn.Module:
    """The model without weights."""
    vision = getattr(config, "vision_config", None) is not None
    with torch.device("meta"):
        return (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised: all but the head, and what is not the language model."""
    head, spec = model.get_output_embeddings(), adapters.find(model.config)
    vision = spec.vision if spec is not None else None
    outside = (vision.vision_prefix, *vision.projector_prefixes) if vision is not None else ()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(outside)
    }


def _weights(
    model: nn.Module, linears: dict[str, nn.Linear], stacks: dict[str, nn.Parameter], precision: str, dtype: torch.dtype
) -> dict[str, float]:
    packed = sum(layer.weight.numel() for layer in linears.values())
    if precision == "nf4":
        packed += sum(stack.numel() for stack in stacks.values() if math.prod(stack.shape[1:]) % BLOCK == 0)
    everything = sum(parameter.numel() for parameter in model.parameters())
    if precision in ("16bit", "full"):
        return {"weights": everything * dtype.itemsize}
    return {
        f"weights in {precision}": packed * PRECISIONS[precision],
        "embeddings, head and norms": (everything - packed) * dtype.itemsize,
    }


def _trainable(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    stacks: dict[str, nn.Parameter],
    precision: str,
    r: int,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str] | None,
) -> int:
    """How many numbers train."""
    if precision == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    every = targets is None or isinstance(targets, str)
    chosen = [layer for name, layer in linears.items() if every or name.rpartition(".")[2] in targets]
    count = sum(r * (layer.in_features + layer.out_features) for layer in chosen)
    if every:
        count += sum(r * stack.shape[0] * (stack.shape[1] + stack.shape[2]) for stack in stacks.values())
    saved = {
        id(parameter): parameter.numel()
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in (modules_to_save or ())
        for parameter in module.parameters()
    }
    return count + sum(saved.values())


def _largest_layer(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the linear layers of one block, the most that is expanded at a time, and of experts beside them."""
    blocks: Counter[str] = Counter()
    for name, layer in _linear_layers(model).items():
        match = LAYER_INDEX.search(name)
        blocks[name[: match.end()] if match else name] += layer.weight.numel() * dtype.itemsize
    experts = max((stack.numel() * dtype.itemsize for stack in expert_stacks(model).values()), default=0)
    return max(blocks.values(), default=0) + min(experts, WRITTEN_BYTES)


def _shape(text: PreTrainedConfig, r: int, dtype: torch.dtype) -> Shape:
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    choices, mlp = routed(text) if has_experts(text) else (0, text.intermediate_size)
    widths = (heads + 2 * pairs) * width, heads * width, mlp * (choices or 1)
    return Shape(text.hidden_size, *widths, 7 * r, dtype.itemsize, head_width=width, choices=choices)


def _plan(
    shape: Shape, tokens: int, layers: int, checkpointing: bool | str, budget: float | None, taken: float, host: float
) -> list[LayerPlan]:
    mode = checkpointing_mode(checkpointing)
    if mode is False:
        return [LayerPlan(Mode.KEEP)] * layers
    if mode == "offload":
        return offload_plan(shape, tokens, layers, host)
    if mode == "auto" and budget is not None:
        return plan_for(Cost(shape, tokens), layers, budget * GIB - taken, host)
    return [LayerPlan(Mode.RECOMPUTE)] * layers
