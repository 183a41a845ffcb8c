"""The words in which an architecture is described: what differs between models is data, not code.

A file of this package is named after a ``model_type`` of transformers. It holds a ``SPEC`` (a text decoder) or a
``VISION`` (what stands around a text decoder, whose own file is found through the text config).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Norm = Literal["cast_then_scale", "scale_then_cast", "one_plus_scale", "layer_norm"]
"""How a norm rounds: ``w * x.to(bf16)`` (Llama), ``(w * x).to(bf16)`` (OLMo), ``((1 + w) * x).to(bf16)`` (Gemma),
or a mean-centred LayerNorm without bias (Cohere). Only a comparison in bf16 tells the first two apart."""

Rotary = Literal["half", "half_width", "interleaved", "interleaved_pairs"]
"""Which elements turn together, and what the model's cos/sin tables look like. ``half``: element i with i + r/2, tables
of width r (r below the head's width rotates only the first r elements). ``half_width``: the same with tables of r/2.
``interleaved``: element 2i with 2i + 1, tables as for ``half``. ``interleaved_pairs``: the same, each angle twice in a row."""

Mlp = Literal["separate", "fused", "experts"]
"""``gate_proj`` and ``up_proj`` apart, one ``gate_up_proj``, or a router with experts as 3-D parameters."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What happens to ``lm_head(hidden)`` before it is called logits; each is the name of a config attribute or None."""

    softcap: str | None = None  # logits = cap * tanh(logits / cap)
    scale: str | None = None  # logits = logits * scale
    divisor: str | None = None  # logits = logits / divisor


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Module paths and the last parts of the names of the linear layers, in a model with a vision tower."""

    vision_prefix: str  # the tower, as a path from the ForConditionalGeneration model
    projector_prefixes: tuple[str, ...]  # from the tower's width to the decoder's
    attention_targets: tuple[str, ...]  # inside the tower
    mlp_targets: tuple[str, ...]
    head: Head = field(default_factory=Head)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A text decoder. Class names are those of transformers, module names those inside one decoder layer."""

    prefix: str  # of the class names: LlamaDecoderLayer, LlamaRMSNorm
    layers: tuple[str, ...] = ("DecoderLayer",)
    norms: tuple[str, ...] = ("RMSNorm",)
    norm: Norm = "cast_then_scale"
    rotary: Rotary = "half"
    rotary_switch: str | None = None  # attribute of the attention module; falsy: this layer does not rotate
    mlp: Mlp = "separate"
    qkv: Literal["separate", "fused"] = "separate"
    qk_norm: Literal["head", "width"] | None = None  # over one head, or over all heads at once, before the rotation
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)  # before and after the attention
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    parallel: bool = False  # attention and MLP read the same norm and are added together
    residual_scale: str | None = None  # attribute of the layer: x + scale * branch
    window: Literal["attention", "config"] | None = None  # whose ``sliding_window`` (None: none) a layer obeys
    sinks: str | None = None  # attribute of the attention module: one learned logit per head in every softmax
    softcap: str | None = None  # attribute of the attention module: scores = cap * tanh(scores / cap)
    attention_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    expert_gate: Literal["clamped"] | None = None  # gpt_oss's activation, gate and up alternating; None: as ``hidden_act`` says
    head: Head = field(default_factory=Head)
    vision: Vision | None = None

    @property
    def layer_classes(self) -> frozenset[str]:
        return frozenset(self.prefix + name for name in self.layers)

    @property
    def norm_classes(self) -> frozenset[str]:
        return frozenset(self.prefix + name for name in self.norms)
