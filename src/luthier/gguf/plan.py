"""What becomes of a checkpoint's tensors: names, order of rows, experts, all decided from names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from luthier.errors import UnsupportedError
from luthier.gguf import architectures
from luthier.gguf.architectures import Architecture
from luthier.gguf.metadata import head_size, is_tied, kv_heads, rope_tensors

# parts of a name that only say where the language model sits in a larger model
PREFIX = re.compile(r"^(model\.|language_model\.)*")
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry
VISION = re.compile(r"^(?:model\.)?(?P<name>(?:visual|vision_tower|vision_model|multi_modal_projector)\..+)$")


@dataclass(frozen=True)
class Piece:
    """What becomes of a checkpoint's tensor: ``transform`` of it is the GGUF tensor ``name``, or its part for one expert."""

    name: str
    expert: int | None
    transform: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """A checkpoint's tensors and what becomes of each, with the shapes of the GGUF tensors."""

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def plan_tensors(architecture: Architecture, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Decide what becomes of every tensor of the language model; those of a vision part are left out (see ``mmproj.py``).

    ``UnsupportedError`` for tensors that are not known, ``ValueError`` for tensors that are missing or too many.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    unknown: list[str] = []
    for name in shapes:
        found = route(architecture, config, name)
        if found is None:
            unknown.append(name)
        else:
            pieces[name] = found
    if unknown:
        raise UnsupportedError(
            f"GGUF export does not know these tensors of the checkpoint: {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}. A quantised or adapter checkpoint must be merged first."
        )
    result: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in rope_tensors(config).items()}
    experts: dict[str, set[int]] = defaultdict(set)
    for name, found in pieces.items():
        for piece in found:
            shape = tuple(piece.transform(torch.empty(shapes[name], device="meta")).shape)
            if piece.expert is not None:
                experts[piece.name].add(piece.expert)
                shape = (_expert_count(architecture, config), *shape)
            if result.setdefault(piece.name, shape) != shape:
                raise ValueError(f"The checkpoint's experts differ in shape: {piece.name} is {result[piece.name]} and {shape}.")
    _check_complete(architecture, config, result, experts)
    return Plan(pieces, result)


def route(architecture: Architecture, config: PreTrainedConfig, name: str) -> tuple[Piece, ...] | None:
    """What becomes of one tensor: nothing (an empty tuple), some pieces, or None for a name that is not known."""
    short = PREFIX.sub("", name)
    if VISION.match(name) or DERIVED.search(short) or (short == "lm_head.weight" and is_tied(config)):
        return ()
    config = config.get_text_config()
    module, _, leaf = short.rpartition(".")
    if module in architectures.OUTSIDE and leaf == "weight":
        return (Piece(f"{architectures.OUTSIDE[module]}.{leaf}", None, _norm_offset(architecture, module)),)
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", short)
    if match is None:
        return None
    layer, path = match.groups()
    if path in architecture.split:
        return tuple(Piece(f"blk.{layer}.{target}", None, function) for target, function in architecture.split[path])
    stem = architecture.layer.get(path)  # a parameter that is not a module's weight or bias, such as attention sinks
    if stem is not None:
        return (Piece(f"blk.{layer}.{stem}.weight", None, same),)
    module, _, leaf = path.rpartition(".")
    expert = re.search(r"(?<=experts\.)\d+(?=\.)", module)
    if expert:
        module = f"{module[: expert.start()]}{{e}}{module[expert.end() :]}"
    if module not in architecture.layer or leaf not in ("weight", "bias"):
        return None
    transform = _rope_order(architecture, config, module) or _norm_offset(architecture, module)
    return (Piece(f"blk.{layer}.{architecture.layer[module]}.{leaf}", int(expert[0]) if expert else None, transform),)


def _norm_offset(architecture: Architecture, module: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if architecture.norm_offset and module.endswith("norm"):
        return lambda tensor: tensor.float() + architecture.norm_offset
    return same


def _rope_order(
    architecture: Architecture, config: PreTrainedConfig, module: str
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """For q and k: rows of a head from (first half, second half) to pairs (one of each), as llama.cpp rotates them."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": kv_heads(config)}.get(module)
    if heads is None or not architecture.interleaved_rope:
        return None
    return lambda tensor: tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _expert_count(architecture: Architecture, config: PreTrainedConfig) -> int:
    return getattr(config.get_text_config(), architecture.keys["expert_count"]) if "expert_count" in architecture.keys else 0


def _check_complete(
    architecture: Architecture,
    config: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    experts: Mapping[str, set[int]],
) -> None:
    """Collect what the checkpoint lacks and raise once."""
    layers = config.get_text_config().num_hidden_layers
    targets = [f"{stem}.weight" for stem in architecture.layer.values()]
    targets += [target for row in architecture.split.values() for target, _ in row]
    wanted = [f"blk.{i}.{target}" for i in range(layers) for target in targets]
    wanted += ["token_embd.weight", "output_norm.weight"] + ([] if is_tied(config) else ["output.weight"])
    missing = [name for name in wanted if name not in shapes]
    count = _expert_count(architecture, config)
    missing += [f"an expert of {name}" for name, found in experts.items() if found != set(range(count))]
    sizes = _expected_shapes(architecture, config.get_text_config())
    odd = []
    for name, shape in shapes.items():
        expected = sizes.get(re.sub(r"^blk\.\d+\.", "", name), shape)
        odd += [f"{name} {shape} instead of {expected}"] if shape != expected else []
    extra = [name for name in shapes if name.startswith("blk.") and int(name.split(".")[1]) >= layers]
    if missing or extra or odd:
        raise ValueError(
            "The checkpoint does not fit its config.json: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
                for what, names in (("it lacks", missing), ("it has layers too many:", extra), ("it has", odd))
                if names
            )
        )


def _expected_shapes(architecture: Architecture, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """What the configuration says of the shapes of matrices, by their names without the layer."""
    hidden, heads, size = config.hidden_size, config.num_attention_heads, head_size(config)
    queries, values, width = heads * size, kv_heads(config) * size, config.intermediate_size
    shapes = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (values, hidden),
        "attn_v.weight": (values, hidden),
        "attn_qkv.weight": (queries + 2 * values, hidden),
        "attn_output.weight": (hidden, queries),
    }
    if "expert_count" not in architecture.keys:
        up = width if "mlp.gate_proj" in architecture.layer else 2 * width  # gate and up in one
        shapes |= {"ffn_gate.weight": (width, hidden), "ffn_up.weight": (up, hidden), "ffn_down.weight": (hidden, width)}
    return shapes
