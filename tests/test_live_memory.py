"""What the dial says a step takes, beside what the layers allocate: counted on tensors without memory, kernels left out."""

from __future__ import annotations

import types

import pytest
import torch
from test_dial import LLAMA_8B
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.model import blocks
from luthier.model.blocks import AttentionBlock, Call, MlpBlock, Mode, Norm
from luthier.model.cost import SCRATCH, Cost, LayerPlan
from luthier.model.layer_blocks import Blocks
from luthier.model.offload import Host, Offload, Parked
from luthier.ops import gated_mlp, lora_linear, nf4, rms_norm, rotary
from luthier.ops.attention import AttentionState
from luthier.ops.linear_cross_entropy import rows_per_chunk
from luthier.ops.lora_linear import Part, Projection
from luthier.ops.nf4 import Quantised
from luthier.ops.workspace import Workspace

LAYERS, HEADS, PAIRS, WIDTH, HIDDEN, MLP, RANK, VOCAB = 4, 32, 8, 128, 4096, 14336, 16, 128256


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Live(TorchDispatchMode):
    """Bytes of the tensors on "meta" that are alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (value.untyped_storage() for value in tree_leaves(out) if isinstance(value, Tensor) and value.is_meta):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.bytes += storage.nbytes()
        if self.bytes > self.peak:
            self.peak = max(self.peak, self.swept())
        return out

    def swept(self) -> int:
        """The bytes that are alive now."""
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.bytes -= self.alive.pop(key)[1]
        return self.bytes


def attend(q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, AttentionState]:
    return torch.empty_like(q), AttentionState("cudnn", empty(*q.shape[:3], 1, dtype=torch.float32))


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, ...]:
    """With what cuDNN's takes for itself."""
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    empty(q.shape[0] * q.shape[2], 2 * HEADS * WIDTH + (HEADS + 2 * PAIRS) * WIDTH)
    return gradients


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    for op in (lora_linear, nf4, gated_mlp, rms_norm, rotary):
        monkeypatch.setattr(op, "has_kernels", lambda x: True)
    monkeypatch.setattr(nf4, "launch", lambda weight, out: out)
    monkeypatch.setattr(lora_linear, "launch_adapter", lambda *arguments: None)
    monkeypatch.setattr(lora_linear, "launch_gradient", lambda grad, b, *others: empty(grad.shape[0], b.shape[1]))
    monkeypatch.setattr(lora_linear, "launch_sum", lambda residual, *others: torch.empty_like(residual))
    monkeypatch.setattr(lora_linear, "product", lambda x, y, *how: empty(x.shape[1], y.shape[1], dtype=torch.float32))
    monkeypatch.setattr(gated_mlp, "launch_forward", lambda gate, up, activation, out, rounded: out)
    monkeypatch.setattr(gated_mlp, "launch_backward_", lambda grad, *others: grad)
    monkeypatch.setattr(rms_norm, "launch_forward", lambda x, weight, eps, flavour, out: out)
    monkeypatch.setattr(rms_norm, "launch_backward", lambda grad, x, weight, eps, flavour, residual, out: out)
    monkeypatch.setattr(rotary, "launch", lambda x, cos, sin, interleaved, out, inverse: out)
    monkeypatch.setattr(blocks, "attend", attend)
    monkeypatch.setattr(blocks, "attend_backward", attend_backward)


class Copies(Offload):
    """Copies that are under way until somebody has to wait for them."""

    def _copy_out(self, tensors: dict, parked: Parked, depth: int) -> None:
        self.under_way.append((None, list(tensors.values())))
        self.settle(depth)

    def settle(self, depth: int = 0) -> None:
        while len(self.under_way) > depth:
            self.under_way.pop(0)

    def _start(self, kept: blocks.Kept) -> None:
        if kept.parked is not None and kept.parked.back is None:
            self.settle()
            kept.parked.back = {name: torch.empty_like(value, device="meta") for name, value in kept.parked.host.items()}


class Slabs:
    def take(self, size: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(memory=torch.empty(size, dtype=torch.uint8), views={}, read=None, waits=None)

    def give(self, slab: types.SimpleNamespace) -> None:
        """It is gone."""


def part(rows: int, columns: int) -> Part:
    size, how = rows * columns, {"kind": "nf4", "dtype": torch.bfloat16, "blocksize": 64, "shape": torch.Size((rows, columns))}
    packed, absmax, code = (empty(n, dtype=torch.uint8) for n in (size // 2, size // 64, 16))
    a, b = empty(RANK, columns, dtype=torch.float32), empty(rows, RANK, dtype=torch.float32)
    return Part(Quantised(packed, absmax, code, **how), None, a.requires_grad_(), b.requires_grad_())


def layer(workspace: Workspace) -> Blocks:
    heads, norm = HEADS * WIDTH, Norm(empty(HIDDEN), 1e-5, "cast_then_scale")
    parts = {
        "qkv": [part(heads, HIDDEN), part(PAIRS * WIDTH, HIDDEN), part(PAIRS * WIDTH, HIDDEN)],
        "o": [part(HIDDEN, heads)],
        "gate_up": [part(MLP, HIDDEN), part(MLP, HIDDEN)],
        "down": [part(HIDDEN, MLP)],
    }
    qkv, o, gate_up, down = (Projection(role, own, workspace) for role, own in parts.items())
    attention = AttentionBlock(qkv, o, HEADS, PAIRS, WIDTH, 1.0, norm, None, None, None, rotates=True, interleaved=False)
    return Blocks(attention, MlpBlock(gate_up, down, "silu", norm, None))


@torch.no_grad()
def peak(plan: list[LayerPlan], batch: int, length: int) -> int:
    """Bytes that one step of ``plan`` takes beside weights and buffers; the head's part is played."""
    workspace, copies, waiting, rows = Workspace(), Copies(), [], batch * length
    copies.pool = Slabs()
    with Live() as live:
        (cos, sin), head = empty(2, 1, length, WIDTH // 2), empty(VOCAB, HIDDEN)
        call, layers = Call(batch, cos, sin), [layer(workspace) for _ in plan]
        for projection in layers[0].projections():
            projection.written(head)
        fixed = live.swept()
        x = empty(rows, HIDDEN)
        first = x  # whoever calls the layers holds it
        for index, (own, planned) in enumerate(zip(layers, plan, strict=True)):
            x, kept = own.forward(x, call, planned.mode)
            copies.park(index, kept, planned.host)
            waiting.append(kept)
            del kept
        copies.settle()
        del first
        hidden = torch.empty_like(x)
        grad = torch.empty_like(x)
        chunk = empty(rows_per_chunk(head), HIDDEN)
        logits = chunk @ head.T
        gradient = logits @ head
        del chunk, logits, gradient
        scaled = torch.empty_like(grad)
        grad = torch.empty_like(scaled)
        del hidden, x, scaled
        for index in reversed(range(len(layers))):
            kept = waiting.pop()
            copies.fetch(kept)
            grad, gradients = layers[index].backward(grad, call, kept, index > 0, layers[index].trained())
            del kept, gradients
    return live.peak - fixed


@pytest.mark.parametrize(("batch", "length"), [(2, 2048), (8, 2048), (1, 8192)])
@pytest.mark.parametrize("host", [Host.NOTHING, Host.NARROW])
@pytest.mark.parametrize("mode", Mode)
def test_the_dial_counts_what_the_layers_allocate(mode, host, batch, length):
    """The dial's own scratch is for what libraries take: up to a fourth of it may go to what it does not count."""
    plan = [LayerPlan(mode, host)] * (LAYERS - 1) + [LayerPlan(mode)]
    counted = Cost(LLAMA_8B, batch * length, length).device(plan) - SCRATCH
    assert counted - SCRATCH < peak(plan, batch, length) < counted + SCRATCH / 4


def test_the_dial_counts_a_mixed_plan():
    plan = [LayerPlan(Mode.ALL_BUT_GATE_UP, Host.NARROW), LayerPlan(Mode.KEEP, Host.NARROW)] * 2
    plan[-1] = LayerPlan(Mode.KEEP)
    counted = Cost(LLAMA_8B, 16384, 2048).device(plan) - SCRATCH
    assert counted - SCRATCH < peak(plan, 8, 2048) < counted + SCRATCH / 4
