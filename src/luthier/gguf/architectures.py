"""How each family of checkpoints is written in GGUF: one row a family. A new family costs one row here.

llama.cpp keeps the graph of each architecture in its own code; a file only names the architecture and brings its numbers.
So a row also lists what that code takes for granted (``fixed``): a checkpoint that differs is refused, because it would
load and give wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from luthier.errors import UnsupportedError

CLASSES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}  # of a configuration never saved

# module outside of the layers -> GGUF tensor
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}

# module in a layer -> GGUF tensor; {e} is the number of an expert
PRE_NORM = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORM = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
SANDWICH_NORM = {"input_layernorm": "attn_norm", **POST_NORM, "pre_feedforward_layernorm": "ffn_norm"}
ATTENTION = {f"self_attn.{hf}_proj": f"attn_{name}" for hf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))}
QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP = {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
EXPERTS = {f"mlp.experts.{{e}}.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")}
MIXTRAL_EXPERTS = {
    f"block_sparse_moe.experts.{{e}}.{hf}": f"ffn_{name}_exps" for hf, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
}

# GGUF key (after the architecture's name) -> attribute of the configuration; written where the attribute is set
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
SLIDING = {"attention.sliding_window": "sliding_window"}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
MOE = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
LOCAL_MOE = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}


@dataclass(frozen=True)
class Architecture:
    """One family.

    ``name``: llama.cpp's name of it. ``layer``: modules of a layer and their GGUF tensors. ``interleaved_rope``: llama.cpp
    rotates neighbouring pairs, so rows of q and k are reordered. ``norm_offset``: added to every norm weight, for
    models that multiply by 1 + w. ``keys``: numbers of the configuration to write. ``split``: tensors that become several,
    each by a function. ``windowed``: llama.cpp honours the sliding window. ``partly_rotated``: transformers honours
    partial_rotary_factor. ``rope_types``: kinds of rotary scaling that llama.cpp has there. ``fixed``: (what llama.cpp takes
    for granted, a test of the configuration).
    """

    name: str
    layer: Mapping[str, str]
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...]] = field(default_factory=dict)
    windowed: bool = False
    partly_rotated: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    fixed: tuple[tuple[str, Callable[[object], bool]], ...] = ()


def _every(n: int, config: object) -> bool:
    """Whether layer types are n - 1 sliding layers, then a full one, and so on."""
    expected = ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    return list(config.layer_types) == expected


def _gemma_scale(layers_of_27b: int) -> Callable[[object], bool]:
    """Queries are scaled by the head's size, in the 27B model by the hidden size over the heads."""

    def fits(config: object) -> bool:
        big = config.num_hidden_layers == layers_of_27b
        size = config.hidden_size // config.num_attention_heads if big else config.head_dim
        return config.query_pre_attn_scalar == size

    return fits


def _gelu(config: object) -> bool:
    return (getattr(config, "hidden_activation", None) or config.hidden_act) in (
        "gelu_pytorch_tanh",
        "gelu_tanh",
        "gelu_new",
        "gelu",
    )


def _silu(config: object) -> bool:
    return config.hidden_act in ("silu", "swish")


NO_MLP_BIAS = ("mlp_bias must be false", lambda c: not getattr(c, "mlp_bias", False))
TIED = ("the head must be the embeddings (tie_word_embeddings)", lambda c: c.tie_word_embeddings)
OWN_HEAD = ("the head must not be the embeddings (tie_word_embeddings)", lambda c: not c.tie_word_embeddings)
NO_BIAS = ("attention_bias must be false", lambda c: not getattr(c, "attention_bias", False))
HEADS_FILL = (
    "head_dim must be hidden_size / num_attention_heads",
    lambda c: (getattr(c, "head_dim", None) or 0) in (0, c.hidden_size // c.num_attention_heads),
)
SILU = ("hidden_act must be silu", _silu)
GELU = ("hidden_act must be gelu_pytorch_tanh", _gelu)
LLAMA_ROPE = ("default", "linear", "yarn", "llama3")
LLAMA = Architecture("llama", PRE_NORM | ATTENTION | MLP, interleaved_rope=True, rope_types=LLAMA_ROPE, fixed=(SILU,))

QWEN2_VL = Architecture("qwen2vl", PRE_NORM | ATTENTION | MLP, fixed=(SILU, HEADS_FILL))
GEMMA_3 = Architecture(
    "gemma3",
    SANDWICH_NORM | ATTENTION | QK_NORM | MLP,
    norm_offset=1.0,
    keys=SOFT_CAPS | SLIDING,
    windowed=True,
    fixed=(
        GELU,
        NO_BIAS,
        ("attention must have no soft cap", lambda c: not c.attn_logit_softcapping),
        ("attention must look back only", lambda c: not getattr(c, "use_bidirectional_attention", False)),
        ("query_pre_attn_scalar must be the head's size", _gemma_scale(62)),
        ("every sixth layer, and no other, must be a full one", lambda c: _every(6, c)),
    ),
)

# class named in config.json -> row
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": Architecture(
        "llama",
        PRE_NORM | ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp"} | MIXTRAL_EXPERTS,
        interleaved_rope=True,
        keys=LOCAL_MOE,
        rope_types=LLAMA_ROPE,
        fixed=(SILU,),
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", PRE_NORM | ATTENTION | MLP, fixed=(SILU, HEADS_FILL)),
    "Qwen2VLForConditionalGeneration": QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN2_VL,
    "Qwen3VLForConditionalGeneration": Architecture("qwen3vl", PRE_NORM | ATTENTION | QK_NORM | MLP, fixed=(SILU, NO_BIAS)),
    "LlavaForConditionalGeneration": LLAMA,
    "Mistral3ForConditionalGeneration": LLAMA,
    "Gemma3ForConditionalGeneration": GEMMA_3,
    "Qwen3ForCausalLM": Architecture("qwen3", PRE_NORM | ATTENTION | QK_NORM | MLP, fixed=(SILU, NO_BIAS)),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3moe",
        PRE_NORM | ATTENTION | QK_NORM | {"mlp.gate": "ffn_gate_inp"} | EXPERTS,
        keys=MOE | {"expert_feed_forward_length": "moe_intermediate_size"},
        fixed=(
            SILU,
            NO_BIAS,
            ("norm_topk_prob must be true", lambda c: c.norm_topk_prob),
            ("every layer must have experts", lambda c: c.decoder_sparse_step == 1 and not c.mlp_only_layers),
        ),
    ),
    "GemmaForCausalLM": Architecture("gemma", PRE_NORM | ATTENTION | MLP, norm_offset=1.0, fixed=(GELU, NO_BIAS, TIED)),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        SANDWICH_NORM | ATTENTION | MLP,
        norm_offset=1.0,
        keys=SOFT_CAPS | SLIDING,
        windowed=True,
        fixed=(
            GELU,
            NO_BIAS,
            TIED,
            ("both soft caps must be set", lambda c: c.attn_logit_softcapping and c.final_logit_softcapping),
            ("query_pre_attn_scalar must be the head's size", _gemma_scale(46)),
            ("sliding and full layers must alternate, sliding first", lambda c: _every(2, c)),
        ),
    ),
    "Gemma3ForCausalLM": GEMMA_3,
    "Phi3ForCausalLM": Architecture(
        "phi3",
        PRE_NORM
        | {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"}
        | {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        partly_rotated=True,
        rope_types=("default", "linear", "longrope"),
        fixed=(SILU, HEADS_FILL),
    ),
    "GraniteForCausalLM": Architecture(
        "granite", PRE_NORM | ATTENTION | MLP, interleaved_rope=True, keys=GRANITE, rope_types=LLAMA_ROPE, fixed=(SILU,)
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        PRE_NORM | ATTENTION | MLP,
        interleaved_rope=True,
        fixed=(
            SILU,
            NO_BIAS,
            NO_MLP_BIAS,
            (
                "every fourth layer, and no other, must be without rotary embedding",
                lambda c: list(c.no_rope_layers) == [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)],
            ),
        ),
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2", POST_NORM | ATTENTION | QK_NORM | MLP, fixed=(SILU, NO_BIAS, HEADS_FILL, OWN_HEAD)
    ),
    "GptOssForCausalLM": Architecture(
        "gpt-oss",
        {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
        | ATTENTION
        | {"self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp"},
        keys=LOCAL_MOE | SLIDING | {"expert_feed_forward_length": "intermediate_size"},
        windowed=True,
        # experts are stored [expert, in, out] with gate and up in turn; GGUF wants [expert, out, in], apart
        split={
            "mlp.experts.gate_up_proj": (
                ("ffn_gate_exps.weight", lambda w: w[..., ::2].transpose(1, 2)),
                ("ffn_up_exps.weight", lambda w: w[..., 1::2].transpose(1, 2)),
            ),
            "mlp.experts.gate_up_proj_bias": (
                ("ffn_gate_exps.bias", lambda b: b[..., ::2]),
                ("ffn_up_exps.bias", lambda b: b[..., 1::2]),
            ),
            "mlp.experts.down_proj": (("ffn_down_exps.weight", lambda w: w.transpose(1, 2)),),
            "mlp.experts.down_proj_bias": (("ffn_down_exps.bias", lambda b: b),),
        },
        fixed=(
            OWN_HEAD,
            ("attention_bias must be true", lambda c: c.attention_bias),
            ("sliding and full layers must alternate, sliding first", lambda c: _every(2, c)),
        ),
    ),
}


def find(config: object) -> Architecture:
    """The row of a configuration, or an ``UnsupportedError`` that says what is not covered, before any work is done."""
    named = getattr(config, "architectures", None) or [CLASSES.get(config.model_type)]
    name = named[0] or config.model_type
    row = ARCHITECTURES.get(name)
    if row is None:
        raise UnsupportedError(
            f"GGUF export does not cover the architecture {name}. Covered: {', '.join(ARCHITECTURES)}. "
            "Save with save_pretrained_merged instead."
        )
    broken = [what for what, holds in row.fixed if not holds(config.get_text_config())]
    if broken:
        raise UnsupportedError(
            f"llama.cpp computes {name} in one way only and this checkpoint differs: {'; '.join(broken)}. "
            "Its GGUF file would give wrong answers. Save with save_pretrained_merged instead."
        )
    return row
