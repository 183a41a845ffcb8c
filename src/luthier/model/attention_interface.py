"""Our attention under a name of its own in transformers, for what runs outside of the fused blocks.

transformers' "sdpa" computes neither soft caps nor sinks: it drops the first without a word and is refused for the second,
and its "eager" holds every score. A model with either gets ``attn_implementation="luthier"``, exact in evaluation and
generation too, and equal to what the fused blocks train.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier import adapters
from luthier.ops.attention import attention
from luthier.ops.bands import Segments

NAME = "luthier"


def implementation_for(config: PreTrainedConfig) -> str | None:
    """``attn_implementation`` of a model whose attention has soft caps or sinks; None for others. Makes the name known."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    spec = adapters.find(config)
    capped = spec is not None and spec.softcap is not None and getattr(config.get_text_config(), spec.softcap) is not None
    return NAME if capped or (spec is not None and spec.sinks is not None) else None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, Hkv, S, D) -> ((B, T, H, D), None)."""
    packed = kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    packed = packed and module.is_causal and not dropout
    if softcap is None and s_aux is None and not packed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}: Luthier's attention with soft caps or sinks has none. Set it to 0.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, segments = None, None
    if packed:  # without the dense mask; that of gpt_oss does not know of packed sequences at all
        attention_mask, window = None, sliding_window
        segments = Segments(kwargs["cu_seq_lens_q"].int(), int(kwargs["max_length_q"]))
    causal = query.shape[2] == key.shape[2]  # without a mask; one new token sees all
    out = attention(query, key, value, scale, causal, attention_mask, window, segments, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None
