"""Which tensor gets which type: the tables behind names like q4_k_m, the same as llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier.gguf.types import F16, F32, Q8_0, TENSOR_TYPES, FileType, TensorType


@dataclass(frozen=True)
class ModelShape:
    """What the choice depends on besides the tensor."""

    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    imatrix: bool = False

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.heads // self.kv_heads


def _more(layer: int, shape: ModelShape) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = shape.layers // 8
    return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2


def _early(share: int) -> Callable[[int, ModelShape], bool]:
    return lambda layer, shape: layer < shape.layers // share


def _first(count: int) -> Callable[[int, ModelShape], bool]:
    return lambda layer, shape: layer < count


def _always(layer: int, shape: ModelShape) -> bool:
    return True


def _grouped(layer: int, shape: ModelShape) -> bool:
    return shape.group >= 4


def _imatrix_early(layer: int, shape: ModelShape) -> bool:
    return shape.imatrix and layer < shape.layers // 8


Rule = tuple[Callable[[int, ModelShape], bool], str]

# file type -> tensor -> the first rule that holds names its type; without one the file type's default stands
MIXTURES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "q2_k": {
        "attn_v": ((_grouped, "Q4_K"), (_always, "Q3_K")),
        "attn_output": ((_always, "Q3_K"),),
        "ffn_down": ((_always, "Q3_K"),),
    },
    "q2_k_s": {"attn_v": ((_grouped, "Q4_K"),), "ffn_down": ((_early(8), "Q4_K"),)},
    "q3_k_m": {
        "attn_v": ((_first(2), "Q5_K"), (_always, "Q4_K")),
        "attn_output": ((_always, "Q4_K"),),
        "ffn_down": ((_early(16), "Q5_K"), (_always, "Q4_K")),
    },
    "q3_k_l": {name: ((_always, "Q5_K"),) for name in ("attn_v", "attn_output", "ffn_down")},
    "q4_0": {"ffn_down": ((_imatrix_early, "Q4_1"),)},
    "q5_0": {"ffn_down": ((_imatrix_early, "Q5_1"),)},
    "q4_k_s": {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_early(8), "Q5_K"),)},
    "q4_k_m": {"attn_v": ((_more, "Q6_K"),), "ffn_down": ((_more, "Q6_K"),)},
    "q5_k_m": {"attn_v": ((_more, "Q6_K"),), "ffn_down": ((_more, "Q6_K"),)},
}
# where eight experts share an attention, the attention is worth more bits
EIGHT_EXPERTS = {"attn_v": "Q8_0", "attn_k": "Q8_0", "attn_output": "Q5_K"}
EIGHT_EXPERTS_OUTPUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
# for rows that cannot be cut into blocks of 256
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# tensors that stay in 32 bits: small, and decisive
KEPT = ("_norm", "ffn_gate_inp", "attn_sinks", "rope_freqs", "rope_factors")


def tensor_type(name: str, shape: tuple[int, ...], target: FileType, model: ModelShape) -> TensorType:
    """The type of the tensor ``name`` (GGUF name; torch shape) in a file of type ``target``."""
    stem = name.removesuffix(".weight")
    if len(shape) < 2 or stem == name or any(kept in stem for kept in KEPT):
        return F32
    if target.name in ("f32", "f16", "bf16"):
        return target.default
    chosen = TENSOR_TYPES[_choice(stem, shape[-1], target, model)]
    if shape[-1] % chosen.block:
        chosen = TENSOR_TYPES.get(FALLBACK.get(chosen.name, ""), chosen)
    return F16 if shape[-1] % chosen.block else chosen


def _choice(stem: str, columns: int, target: FileType, model: ModelShape) -> str:
    default = target.default.name
    if stem == "output" or (stem == "token_embd" and model.tied):
        return Q8_0.name if default == "Q8_0" or columns % target.default.block else "Q6_K"
    if not stem.startswith("blk."):
        return default
    _, layer, part = stem.split(".", 2)
    part = part.removesuffix("_exps").replace("attn_qkv", "attn_v")
    if model.experts == 8 and part in EIGHT_EXPERTS and (part != "attn_output" or target.name in EIGHT_EXPERTS_OUTPUT):
        return EIGHT_EXPERTS[part]
    rules = MIXTURES.get(target.name, {}).get(part, ())
    if model.experts == 8 and part == "attn_output":
        rules = ()
    chosen = next((kind for holds, kind in rules if holds(int(layer), model)), default)
    if part == "attn_v" and model.layers == 80 and model.group > 1 and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"  # Llama 70B: eight times as many weights share this one
    return chosen
