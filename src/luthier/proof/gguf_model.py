"""A GGUF file computed in plain torch, from what stands in the file alone: the second opinion of an export's proof.

It reads a layer, runs it, and forgets it, so memory is one layer. It knows nothing of transformers or of the code that
wrote the file; what an architecture takes for granted is the row of `GRAPHS`, as llama.cpp has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from luthier.errors import UnsupportedError
from luthier.gguf.dequantize import dequantize, load_tensor
from luthier.gguf.reader import GGUFFile


@dataclass(frozen=True)
class Graph:
    """What the file does not say. ``pairs``: rotary embedding turns neighbours, not halves. ``every``: each such layer
    attends to everything, those between only to the window (0: no windows). ``unrotated``: each such layer has no rotary
    embedding. ``ffn_norm``: the norm before the feed-forward.
    """

    pairs: bool = False
    gelu: bool = False
    scaled_embedding: bool = False
    every: int = 0
    unrotated: int = 0
    ffn_norm: str = "ffn_norm"
    top_k_first: bool = False  # experts are chosen before the softmax
    clamped: bool = False  # the gate of gpt-oss
    layers_of_27b: int = 0  # the size whose queries are scaled by hidden size over heads


GRAPHS = {
    "llama": Graph(pairs=True),
    "qwen2": Graph(),
    "qwen2vl": Graph(),
    "qwen3": Graph(),
    "qwen3vl": Graph(),
    "qwen3moe": Graph(),
    "gemma": Graph(gelu=True, scaled_embedding=True),
    "gemma2": Graph(gelu=True, scaled_embedding=True, every=2, layers_of_27b=46),
    "gemma3": Graph(gelu=True, scaled_embedding=True, every=6, layers_of_27b=62),
    "phi3": Graph(),
    "granite": Graph(pairs=True),
    "smollm3": Graph(pairs=True, unrotated=4),
    "olmo2": Graph(),
    "gpt-oss": Graph(every=2, ffn_norm="post_attention_norm", top_k_first=True, clamped=True),
}


class GGUFModel:
    """``GGUFModel(file).logits(sequences)``. ``UnsupportedError`` for an architecture without a graph.

    ``tensor``: another source of its tensors, by name. ``jitter``: what every layer's output is off by at random, as a share of
    it. ``watch`` is called with the name and the values of every tensor that is read whole.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: torch.device | str = "cpu",
        tensor: Callable[[str], torch.Tensor] | None = None,
        jitter: float = 0.0,
        watch: Callable[[str, torch.Tensor], None] = lambda name, tensor: None,
    ) -> None:
        self.file, self.device, self.other, self.jitter, self.watch = file, device, tensor, jitter, watch
        self.random = torch.Generator(device).manual_seed(0)
        self.name = file.metadata.get("general.architecture")
        if self.name not in GRAPHS:
            raise UnsupportedError(f"The proof cannot compute the architecture {self.name!r}. It knows {', '.join(GRAPHS)}.")
        self.graph = GRAPHS[self.name]
        self.layers = self._get("block_count")
        self.heads = self._get("attention.head_count")
        self.kv_heads = self._get("attention.head_count_kv", self.heads)
        self.hidden = self._get("embedding_length")
        self.size = self._get("attention.key_length", self.hidden // self.heads)
        self.epsilon = self._get("attention.layer_norm_rms_epsilon")

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits at every position of every sequence, float32 ``[length, vocabulary]`` each, on the CPU."""
        states = [self._embedded(ids) for ids in sequences]
        scale = math.sqrt(self.hidden) if self.graph.scaled_embedding else self._get("embedding_scale", 1.0)
        states = [state * scale for state in states]
        for layer in range(self.layers):
            states = self._layer(layer, states)
        head = self._tensor("output.weight" if "output.weight" in self.file.tensors else "token_embd.weight")
        norm = self._tensor("output_norm.weight")
        return [self._final(self._jittered(F.linear(self._norm(state, norm), head))).cpu() for state in states]

    def _embedded(self, ids: Sequence[int]) -> torch.Tensor:
        """The rows of some tokens; the table itself may be large."""
        if self.other is not None:
            return self.other("token_embd.weight")[list(ids)]
        rows = torch.from_numpy(self.file.data("token_embd.weight")[list(ids)])
        return dequantize(rows, self.file.tensors["token_embd.weight"].type).to(self.device)

    def _final(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits / self._get("logit_scale", 1.0)
        return _softcap(logits, self._get("final_logit_softcapping", None))

    def _layer(self, layer: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        prefix = f"blk.{layer}."
        part = {name.removeprefix(prefix): self._tensor(name) for name in self.file.tensors if name.startswith(prefix)}
        residual = self._get("residual_scale", 1.0)
        after_attention = "post_attention_norm.weight" if self.graph.ffn_norm != "post_attention_norm" else ""
        result = []
        for state in states:
            mixed = self._attention(layer, part, self._norm(state, part.get("attn_norm.weight")))
            state = self._jittered(state + residual * self._norm(mixed, part.get(after_attention)))
            fed = self._feed_forward(part, self._norm(state, part.get(f"{self.graph.ffn_norm}.weight")))
            result.append(self._jittered(state + residual * self._norm(fed, part.get("post_ffw_norm.weight"))))
        return result

    def _attention(self, layer: int, part: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if "attn_qkv.weight" in part:
            q, k, v = self._apart(self._linear(part, "attn_qkv", x))
        else:
            q, k, v = (self._linear(part, f"attn_{name}", x) for name in "qkv")
        return self._linear(part, "attn_output", self._attend(layer, part, q, k, v))

    def _apart(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split([self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size], -1)

    @torch.no_grad()
    def attended(self, layer: int, projected: Mapping[str, torch.Tensor], rounded: bool = False) -> torch.Tensor:
        """What a layer's attention makes of queries, keys and values ``[length, ...]`` in transformers' order, before its last
        matrix. ``projected``: by the stem of the matrix that they come from. ``rounded``: in 16 bits after they are rotated,
        and so are their products.
        """
        projected = {name: values.to(self.device).float() for name, values in projected.items()}
        if "attn_qkv" in projected:
            q, k, v = self._apart(projected["attn_qkv"])
        else:
            q, k, v = (projected[f"attn_{name}"] for name in "qkv")
        if self.graph.pairs:
            q, k = (
                y.view(len(y), heads, 2, -1).transpose(2, 3).reshape(y.shape)
                for y, heads in ((q, self.heads), (k, self.kv_heads))
            )
        prefix = f"blk.{layer}."
        small = [f"{name}.weight" for name in ("attn_q_norm", "attn_k_norm", "attn_sinks")]
        part = {
            name: load_tensor(self.file, prefix + name, self.device) for name in small if prefix + name in self.file.tensors
        }
        return self._attend(layer, part, q, k, v, rounded)

    def _attend(
        self,
        layer: int,
        part: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rounded: bool = False,
    ) -> torch.Tensor:
        length = len(q)
        q, k = (self._head_norm(y, part.get(f"attn_{name}_norm.weight")) for name, y in (("q", q), ("k", k)))
        q, k, v = (y.view(length, -1, self.size).transpose(0, 1) for y in (q, k, v))  # [heads, length, size]
        windowed = bool(self.graph.every) and (layer + 1) % self.graph.every != 0
        if not self.graph.unrotated or (layer + 1) % self.graph.unrotated:
            q, k = self._rotate(q, windowed), self._rotate(k, windowed)
        if rounded:
            q, k = (y.bfloat16().float() for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 0) for y in (k, v))
        scores = _softcap(q @ k.transpose(1, 2) * self._query_scale(), self._get("attn_logit_softcapping", None))
        if rounded:
            scores = scores.bfloat16().float()
        place = torch.arange(length, device=q.device)
        distance = place[:, None] - place[None, :]
        hidden = distance < 0
        if windowed:
            hidden |= distance >= self._get("attention.sliding_window")
        scores = scores.masked_fill(hidden, -math.inf)
        if "attn_sinks.weight" in part:  # a score that takes a share of the attention and gives nothing
            sinks = part["attn_sinks.weight"].view(-1, 1, 1).expand(-1, length, 1)
            shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        return (shares @ v).transpose(0, 1).reshape(length, -1)

    def _query_scale(self) -> float:
        if self.graph.layers_of_27b and self.layers == self.graph.layers_of_27b:
            return (self.hidden / self.heads) ** -0.5
        return self._get("attention.scale", self.size**-0.5)

    def _head_norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The norm of queries or keys: of every head if the weight is as long as one, else of all together."""
        if weight is None:
            return x
        return self._norm(x.view(len(x), -1, len(weight)), weight).reshape(x.shape)

    def _feed_forward(self, part: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if "ffn_gate_inp.weight" in part:
            return self._experts(part, x)
        if "ffn_gate.weight" in part:
            gate, up = self._linear(part, "ffn_gate", x), self._linear(part, "ffn_up", x)
        else:
            gate, up = self._linear(part, "ffn_up", x).chunk(2, -1)
        return self._linear(part, "ffn_down", self._gated(gate, up))

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.graph.clamped:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return (F.gelu(gate, approximate="tanh") if self.graph.gelu else F.silu(gate)) * up

    def _experts(self, part: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        scores, count = self._linear(part, "ffn_gate_inp", x), self._get("expert_used_count")
        if self.graph.top_k_first:
            top, chosen = scores.topk(count, -1)
            weights = top.softmax(-1)
        else:
            weights, chosen = scores.softmax(-1).topk(count, -1)
            weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            row, column = (chosen == expert).nonzero(as_tuple=True)
            own = {name.replace("_exps", ""): tensor[expert] for name, tensor in part.items() if "_exps" in name}
            gate, up = self._linear(own, "ffn_gate", x[row]), self._linear(own, "ffn_up", x[row])
            result.index_add_(0, row, weights[row, column, None] * self._linear(own, "ffn_down", self._gated(gate, up)))
        return result

    def _rotate(self, x: torch.Tensor, windowed: bool) -> torch.Tensor:
        """Rotary embedding of ``[heads, length, size]``."""
        width = self._get("rope.dimension_count", self.size)
        angles, scale = self._angles(x.shape[1], width, windowed)
        cos, sin = angles.cos() * scale, angles.sin() * scale  # [length, width / 2]
        turned, rest = x[..., :width], x[..., width:]
        if self.graph.pairs:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1)

    def _angles(self, length: int, width: int, windowed: bool) -> tuple[torch.Tensor, float]:
        """Angles ``[length, width / 2]`` and the factor of their sines and cosines."""
        base = self._get("rope.freq_base", 10000.0)
        local = self._get("rope.freq_base_swa", None)
        scaling = self._get("rope.scaling.type", "none")
        if windowed and local is not None:
            base, scaling = local, "none"
        half = torch.arange(0, width, 2, dtype=torch.float64, device=self.device)
        frequencies = base ** (-half / width)
        factors = self._factors(length)
        frequencies = frequencies if factors is None else frequencies / factors.double()
        scale = self._get("rope.scaling.attn_factor", 1.0)
        if scaling == "linear":
            frequencies = frequencies / self._get("rope.scaling.factor")
        if scaling == "yarn":
            frequencies, magnitude = self._yarn(frequencies, base, width)
            scale *= magnitude
        return (torch.arange(length, device=self.device)[:, None] * frequencies).float(), scale

    def _factors(self, length: int) -> torch.Tensor | None:
        original = self._get("rope.scaling.original_context_length", 0)
        for name in ("rope_freqs.weight", f"rope_factors_{'long' if length > original else 'short'}.weight"):
            if name in self.file.tensors:
                return self._tensor(name)
        return None

    def _yarn(self, frequencies: torch.Tensor, base: float, width: int) -> tuple[torch.Tensor, float]:
        """Fast waves (32 turns and more) are kept, slow ones (1 turn) stretched, those between a mixture."""
        factor, original = self._get("rope.scaling.factor"), self._get("rope.scaling.original_context_length")

        def turning(turns: float) -> float:  # the dimension that makes so many turns in the original context
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(0, math.floor(turning(32.0)))
        last = min(width - 1, math.ceil(turning(1.0)))
        place = torch.arange(width // 2, dtype=torch.float64, device=self.device)
        stretched = ((place - first) / max(0.001, last - first)).clamp(0, 1)
        return frequencies * (1 - stretched) + frequencies / factor * stretched, 0.1 * math.log(factor) + 1

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else self._jittered(F.rms_norm(x, weight.shape, weight, self.epsilon))

    def _tensor(self, name: str) -> torch.Tensor:
        if self.other is not None:
            return self.other(name)
        found = load_tensor(self.file, name, self.device)
        self.watch(name, found)
        return found

    def _linear(self, part: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return self._jittered(F.linear(x, part[f"{name}.weight"], part.get(f"{name}.bias")))

    def _jittered(self, x: torch.Tensor) -> torch.Tensor:
        if not self.jitter:
            return x
        return x * (1 + self.jitter * torch.randn(x.shape, generator=self.random, device=x.device))

    def _get(self, key: str, *default: Any) -> Any:
        full = f"{self.name}.{key}"
        if full not in self.file.metadata and not default:
            raise ValueError(f"{self.file.path} does not say {full}.")
        return self.file.metadata.get(full, *default)


def _softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if not cap else torch.tanh(x / cap) * cap
