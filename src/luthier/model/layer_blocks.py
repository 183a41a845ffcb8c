"""A whole decoder layer, its two halves one after the other: forward, backward, what trains in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from luthier.model.blocks import AttentionBlock, Call, Gradients, Kept, MlpBlock, Mode
from luthier.model.cost import Shape
from luthier.ops.lora_linear import Projection


@dataclass
class Blocks:
    attention: AttentionBlock
    mlp: MlpBlock | None  # None: a mixture of experts, whose stock module runs behind the attention
    parallel: bool = False  # attention and MLP read the same input
    experts: tuple[int, int] = (0, 0)  # of a mixture: how many a token goes to, and the width of one's activation

    def fresh(self) -> Blocks:
        """The same blocks, which have not written anything into the workspace."""
        attention = replace(self.attention, qkv=copy.copy(self.attention.qkv), o=copy.copy(self.attention.o))
        mlp = self.mlp and replace(self.mlp, gate_up=copy.copy(self.mlp.gate_up), down=copy.copy(self.mlp.down))
        return replace(self, attention=attention, mlp=mlp)

    def trained(self) -> list[Tensor]:
        """Every parameter that gets a gradient."""
        halves = (self.attention, self.mlp) if self.mlp else (self.attention,)
        tensors = [tensor for projection in self.projections() for tensor in projection.trained]
        tensors += [norm.weight for half in halves for norm in half.norms() if norm.weight.requires_grad]
        return list({id(tensor): tensor for tensor in tensors}.values())  # parallel halves share a norm, projections an A

    @property
    def are_unique(self) -> bool:
        """Whether they hold what only this pass has: the seeds of masks, adapters put side by side."""
        drops = any(projection.drops for projection in self.projections())
        return drops or not all(tensor.is_leaf for tensor in self.trained())

    def projections(self) -> tuple[Projection, ...]:
        mlp = (self.mlp.gate_up, self.mlp.down) if self.mlp else ()
        return self.attention.qkv, self.attention.o, *mlp

    def forward(self, x: Tensor, call: Call, mode: Mode) -> tuple[Tensor, Kept]:
        """x (n, D) -> (the layer's output (n, D), what its backward needs)."""
        kept = Kept(x, call.is_long)
        x2 = x3 = self.attention.forward(x, call, kept, mode)
        if self.mlp is not None:
            x3 = self.mlp.forward(x if self.parallel else x2, x2, kept, mode)
            kept.x2 = x2 if mode >= Mode.ALL_BUT_GATE_UP and not self.parallel else None
        return x3, kept

    def backward(
        self, grad: Tensor, call: Call, kept: Kept, wants_x: bool, trained: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """grad (n, D) of the output -> (the gradient of x, if wanted, those of ``trained``). Uses up what was kept.

        ``trained``: as the forward found it. What has been frozen since then gets no gradient.
        """
        self.forget()
        gradients = Gradients()
        sequential = self.mlp is not None and not self.parallel
        x2 = self.attention.recompute(call, kept, wants_output=sequential)
        grad_mlp, room = grad, None
        if self.mlp is not None:
            room = self.attention.o.new_gradient(grad.shape[0], grad)
            grad_mlp = room[:, : grad.shape[1]]
            self.mlp.backward(grad, x2 if sequential else kept.x, kept, gradients, sequential, grad_mlp)
        kept.gate_up = kept.mlp_branch = kept.x2 = x2 = None
        attention_grad = (grad, None) if self.parallel else (grad_mlp, room)
        grad_x = self.attention.backward(*attention_grad, call, kept, gradients, wants_x)
        if self.parallel and wants_x:
            grad_x = grad_x + grad_mlp
        return (grad_x if wants_x else None), gradients.of(trained)

    def forget(self) -> None:
        """What the projections wrote into the workspace is another layer's by now."""
        for projection in self.projections():
            projection.forget()

    def shape(self, x: Tensor, compute: str) -> Shape:
        """The widths from which the dial computes what this layer keeps."""
        attention = self.attention
        low = sum(projection.rank for projection in self.projections())
        extra = x.shape[-1] if attention.post_norm else 0
        choices, width = self.experts
        widths = attention.qkv.width_out, attention.o.width_in, self.mlp.down.width_in if self.mlp else choices * width
        return Shape(x.shape[-1], *widths, low, x.element_size(), extra, attention.width, choices, compute)
