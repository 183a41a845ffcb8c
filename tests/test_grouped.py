"""Grouped products and the experts made of them: every kernel against its definition, and the whole against plain autograd."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Params4bit
from op_checks import BOTH_WAYS, DEVICE, DTYPES, also_in_a_row, assert_as_good, randn, running_kernels, unwritten
from torch import Tensor

from luthier.ops import expert_gate, experts, grouped
from luthier.ops.expert_gate import Gate
from luthier.ops.experts import ExpertLinear
from luthier.ops.nf4 import Quantised, dequantise_reference, quantised

OPS = (grouped, expert_gate, experts)
EXPERTS = 5
GATES = {
    "silu": Gate("silu"),
    "clamped": Gate("clamped", alternates=True, limit=4.0),
    "any": Gate(function=lambda both: both.chunk(2, dim=1)[0].sin() * both.chunk(2, dim=1)[1]),
}


@pytest.fixture(params=BOTH_WAYS)
def path(request, monkeypatch):
    with running_kernels(request.param, monkeypatch, *OPS):
        yield request.param


def choices(kind: str, tokens: int = 140, top_k: int = 2) -> Tensor:
    """(n, k) experts of every token; the last one of EXPERTS is nobody's."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(1)
    index = {
        "mixed": ranks[:, :top_k],
        "one takes all": torch.full((tokens, 1), 2),
        "every expert": torch.rand(tokens, EXPERTS, generator=generator).argsort(1),
        "of another device": torch.where(ranks[:, :top_k] == 1, EXPERTS, ranks[:, :top_k]),
        "few": torch.where(ranks[:1, :top_k] == 1, EXPERTS, ranks[:1, :top_k]),
    }[kind]
    return index.to(DEVICE)


KINDS = ["mixed", "one takes all", "every expert", "of another device", "few"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_routing_sorts_the_choices(path, kind):
    index = choices(kind)
    routing = grouped.route(index, EXPERTS)
    sorted_experts = index.reshape(-1)[routing.order.long()]
    assert torch.equal(sorted_experts, index.reshape(-1).sort().values)
    assert torch.equal(routing.order[routing.position.long()].reshape(-1), torch.arange(index.numel(), device=DEVICE).int())
    covered = [expert for expert, rows in routing.spans() for _ in range(rows.start, rows.stop)]
    assert covered == [expert for expert in sorted_experts.tolist() if expert < EXPERTS]
    tiles, rows = routing.tiles.tolist(), routing.offsets.diff().tolist()
    assert [tiles[e + 1] - tiles[e] for e in range(EXPERTS)] == [-(-count // grouped.ROWS) for count in rows]
    mine = [expert for expert in range(EXPERTS) for _ in range(tiles[expert], tiles[expert + 1])]
    assert routing.tile_expert[: len(mine)].tolist() == mine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["(N, K)", "(K, N)"])
@pytest.mark.parametrize("kind", ["one takes all", "of another device", "few"])
def test_product(path, kind, transposed, dtype):
    """Gathered or sorted inputs, a thin product and a bias on top, in two launches of some experts each."""
    routing = grouped.route(choices(kind), EXPERTS)
    rows = routing.order.shape[0]
    weight = randn(EXPERTS, 72, 40, seed=1, dtype=dtype) if transposed else randn(EXPERTS, 40, 72, seed=1, dtype=dtype).mT
    low, other = randn(rows, 16, seed=2, dtype=dtype), randn(EXPERTS, 40, 16, seed=3, dtype=dtype).mT
    bias = randn(EXPERTS, 40, seed=4, dtype=dtype)
    valid = int(routing.offsets[-1])

    def results(function, wide: torch.dtype) -> dict[str, Tensor]:
        def widened(*tensors):
            return [tensor.to(wide) for tensor in tensors]

        found = {}
        for gather in (False, True):
            x = randn(routing.position.shape[0] if gather else rows, 72, dtype=dtype)
            plain, full = (unwritten(rows, 40, dtype=wide) for _ in range(2))
            for part in (slice(0, 2), slice(2, EXPERTS)):
                matrix = weight[part].to(wide)
                function(x.to(wide), matrix, routing, plain, part.start, gather)
                function(x.to(wide), matrix, routing, full, part.start, gather, *widened(low, other, bias))
            found |= {f"plain, {gather}": plain[:valid], f"full, {gather}": full[:valid]}
        return found

    truth = results(grouped.product_reference, torch.float64)
    torchs = also_in_a_row(truth, lambda: results(grouped.product_reference, dtype))
    assert_as_good(results(grouped.product, dtype), torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_combine(path, kind, dtype):
    routing = grouped.route(choices(kind, tokens=20 if kind == "every expert" else 70), EXPERTS)
    rows, tokens = routing.order.shape[0], routing.position.shape[0]
    valid = int(routing.offsets[-1])
    x, by_token, y = randn(rows, 72, dtype=dtype), randn(tokens, 72, dtype=dtype), randn(rows, 16, seed=1, dtype=dtype)
    for tensor in (x, y):
        tensor[valid:] = float("nan")
    weights = randn(*routing.position.shape, seed=2, dtype=dtype)

    def results(gradient, combine, wide: torch.dtype) -> dict[str, Tensor]:
        return {
            "sorted": gradient(x.to(wide), y.to(wide), routing, scale=0.5),
            "gathered": gradient(by_token.to(wide), y.to(wide), routing, gather=True),
            "sum": combine(x.to(wide), routing),
            "weighted sum": combine(x.to(wide), routing, weights.to(wide)),
        }

    torchs = results(grouped.gradient_reference, grouped.combine_reference, dtype)
    truth = results(wide_gradient, wide_combine, torch.float64)
    assert_as_good(results(grouped.gradient, grouped.combine, dtype), torchs, truth)


def wide_gradient(x: Tensor, y: Tensor, routing: grouped.Routing, gather: bool = False, scale: float = 1.0) -> Tensor:
    out = torch.zeros(EXPERTS, x.shape[1], y.shape[1], dtype=torch.float64, device=DEVICE)
    for expert, rows in routing.spans():
        out[expert] = scale * (x[routing.token[rows]] if gather else x[rows]).T @ y[rows]
    return out


def wide_combine(y: Tensor, routing: grouped.Routing, weights: Tensor | None = None) -> Tensor:
    out = torch.zeros(routing.position.shape[0], y.shape[1], dtype=torch.float64, device=DEVICE)
    factors = torch.ones(routing.position.shape, device=DEVICE).double() if weights is None else weights
    for _, rows in routing.spans():
        out.index_add_(0, routing.token[rows], y[rows] * factors.reshape(-1)[routing.order[rows].long()][:, None])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "of another device"])
@pytest.mark.parametrize("gate", [*GATES.values(), Gate("clamped", alternates=False, limit=0.7)], ids=[*GATES, "side by side"])
def test_gate(path, gate, kind, dtype):
    routing = grouped.route(choices(kind, tokens=10), EXPERTS)
    rows, valid = routing.order.shape[0], int(routing.offsets[-1])
    both, u = randn(rows, 2 * 37, dtype=dtype) * 2, randn(rows, 37, seed=1, dtype=dtype)
    both[0, :2] = gate.limit  # where the derivative is what torch at hand makes it: 1 up to 2.13, 0 from 2.14 on
    weights = randn(*routing.position.shape, seed=2, dtype=dtype)

    def results(forward, backward, wide: torch.dtype) -> dict[str, Tensor]:
        gate_up, grad = both.to(wide, copy=True), u.to(wide, copy=True)
        act = forward(gate_up, gate)
        router = backward(grad, gate_up, weights.to(wide), routing, gate)
        return {"act": act[:valid], "router": router, "weighted": grad[:valid], "gradient": gate_up[:valid]}

    def autograd(grad, gate_up, weights, routing, gate):
        """In the dtype of its inputs, where the definition computes in fp32."""
        leaf, scale = gate_up[:valid].clone().requires_grad_(), weights.reshape(-1)[routing.order[:valid].long()][:, None]
        act = expert_gate.gated_reference(leaf, gate)
        router = torch.zeros_like(weights).reshape(-1)
        router[routing.order[:valid].long()] = (act.detach() * grad[:valid]).sum(1)
        gate_up[:valid] = torch.autograd.grad(act, leaf, scale * grad[:valid])[0]
        grad[:valid] = scale * act.detach()
        return router.view(weights.shape).to(torch.float32 if weights.dtype == torch.bfloat16 else weights.dtype)

    ours = results(expert_gate.gated, expert_gate.gated_backward_, dtype)
    plain, truth = (results(expert_gate.gated_reference, autograd, wide) for wide in (dtype, torch.float64))
    assert_as_good(ours, plain, truth)


def nf4_stack(*shape: int, seed: int = 0) -> Quantised:
    weight = Params4bit(randn(*shape, seed=seed), requires_grad=False, quant_type="nf4", compress_statistics=True)
    weight.data = weight.data.cpu()  # it quantises when it moves
    return quantised(weight.to(DEVICE))


@pytest.mark.parametrize("shape", [(5, 24, 64), (3, 256, 64)], ids=["shared scales", "whole scales"])
def test_some_experts_of_a_stack(shape):
    """256 scales share a scale of their own, which a stack may be cut in the middle of."""
    stack = nf4_stack(*shape)
    whole = dequantise_reference(stack)
    for first, last in ((0, 2), (1, 2), (1, shape[0]), (2, 3)):
        assert torch.equal(dequantise_reference(stack.experts(first, last)), whole[first:last])
    chosen = torch.tensor([2, 0, 2], device=DEVICE)
    assert torch.equal(dequantise_reference(stack.chosen(chosen)), whole[chosen])


@pytest.mark.parametrize("transposed", [False, True], ids=["(N, K)", "(K, N)"])
def test_4bit_experts_are_expanded_a_few_at_a_time(path, transposed, monkeypatch):
    """The same, bit for bit, as experts that are there in 16 bits."""
    index, inner, hidden = choices("mixed", tokens=12), 64, 64
    monkeypatch.setattr(experts, "WRITTEN_BYTES", 2 * 4 * inner * hidden * 2)  # two experts of the first layer, in fp32
    inputs = inputs_of(index, transposed, torch.float32, hidden, inner)
    stacks = {f"{name}_weight": nf4_stack(*inputs[f"{name}_weight"].shape) for name in ("up", "down")}
    expanded = {name: dequantise_reference(stack, torch.float32) for name, stack in stacks.items()}

    def ours(weights_of):
        def function(x, weights, **tensors):
            return experts.experts(x, index, weights, *layers_of(transposed, tensors | weights_of), GATES["silu"])

        return function

    small = {name: value for name, value in inputs.items() if name not in stacks}
    found, expected = outcome(ours(stacks), small), outcome(ours(expanded), small)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_few_tokens_expand_only_their_experts(path, monkeypatch):
    """The same, bit for bit, as with all of them; one choice is of another device."""
    index, sizes = torch.tensor([[3, EXPERTS]], device=DEVICE), []
    inputs = inputs_of(index, False, torch.float32, 64, 64)
    stacks = {f"{name}_weight": nf4_stack(*inputs[f"{name}_weight"].shape) for name in ("up", "down")}
    small = {name: value for name, value in inputs.items() if name not in stacks}
    expand = experts._expand
    monkeypatch.setattr(experts, "_expand", lambda *a: sizes.append(a[2] - a[1]) or expand(*a))

    def ours(x, weights, **tensors):
        return experts.experts(x, index, weights, *layers_of(False, tensors | stacks), GATES["silu"])

    found = outcome(ours, small)
    assert max(sizes) <= index.numel()
    monkeypatch.setattr(experts, "_only_chosen", lambda *arguments: arguments)
    expected = outcome(ours, small)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def plain_experts(index, gate, transposed, x, weights, **tensors) -> Tensor:
    """The definition of ``experts``, for autograd: every expert over every token."""
    out = torch.zeros_like(x)

    def linear(name: str, h: Tensor, expert: int) -> Tensor:
        weight, bias, a, b = (tensors[f"{name}_{part}"][expert] for part in ("weight", "bias", "a", "b"))
        return h @ (weight if transposed else weight.T) + bias + 0.5 * (h @ a.T) @ b.T

    for expert in range(EXPERTS):
        scale = torch.where(index == expert, weights, 0.0).sum(1, keepdim=True)
        y = linear("down", expert_gate.gated_reference(linear("up", x, expert), gate), expert)
        out = out + torch.where((index == expert).any(1, keepdim=True), scale * y, 0.0)
    return out


def inputs_of(index: Tensor, transposed: bool, dtype: torch.dtype, hidden: int = 40, inner: int = 24) -> dict[str, Tensor]:
    shapes = {"up": (2 * inner, hidden), "down": (hidden, inner)}
    tensors = {"x": randn(len(index), hidden, dtype=dtype), "weights": randn(*index.shape, seed=1, dtype=dtype).abs()}
    for seed, (name, (n, k)) in enumerate(shapes.items(), 2):
        tensors[f"{name}_weight"] = randn(EXPERTS, *((k, n) if transposed else (n, k)), seed=seed, dtype=dtype) / k**0.5
        tensors[f"{name}_bias"] = randn(EXPERTS, n, seed=seed + 10, dtype=dtype)
        tensors[f"{name}_a"] = randn(EXPERTS, 3, k, seed=seed + 20) / k**0.5
        tensors[f"{name}_b"] = randn(EXPERTS, n, 3, seed=seed + 30) / 3**0.5
    return tensors


def outcome(function, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of what trains, under a fixed gradient of the output."""
    trained = [name for name in inputs if name in ("x", "weights") or name.endswith(("_a", "_b"))]
    leaves = {name: value.detach().to(dtype or value.dtype) for name, value in inputs.items()}
    for name in trained:
        leaves[name].requires_grad_()
    output = function(**leaves)
    gradients = torch.autograd.grad(output, [leaves[name] for name in trained], randn(*output.shape, seed=9).to(output.dtype))
    return {"output": output.detach(), **dict(zip(trained, gradients, strict=True))}


def layers_of(transposed: bool, tensors: dict[str, Tensor]) -> list[ExpertLinear]:
    parts = ("weight", "bias", "a", "b")
    return [
        ExpertLinear(weight, transposed, bias, a, b, 0.5)
        for weight, bias, a, b in ([tensors[f"{name}_{part}"] for part in parts] for name in ("up", "down"))
    ]


CASES = {
    **{gate: (gate, "mixed", True) for gate in GATES},
    "recompute": ("clamped", "mixed", False),
    **{kind: ("clamped", kind, True) for kind in ("one takes all", "every expert", "of another device")},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gate", "kind", "keeps"), CASES.values(), ids=CASES)
def test_experts(path, gate, kind, keeps, dtype):
    index = choices(kind, tokens={"one takes all": 40, "every expert": 12}.get(kind, 24))  # of about as many choices
    transposed, gate = gate == "clamped", GATES[gate]

    def ours(x, weights, **tensors):
        layers = layers_of(transposed, tensors)
        if keeps:
            return experts.experts(x, index, weights, *layers, gate)
        return experts.checkpoint_experts(lambda x: experts.experts(x, index, weights, *layers, gate), x)

    def in_one_dtype(x, weights, **tensors):
        return plain_experts(index, gate, transposed, x, weights, **{name: t.to(x.dtype) for name, t in tensors.items()})

    inputs = inputs_of(index, transposed, dtype)
    if kind == "of another device":
        inputs["weights"] = torch.where(index < EXPERTS, inputs["weights"], 0.0)
    truth = outcome(in_one_dtype, inputs, torch.float64)
    assert_as_good(outcome(ours, inputs), also_in_a_row(truth, lambda: outcome(in_one_dtype, inputs)), truth)
