"""Every kernel against its definition: error at most twice what torch itself makes against fp64, in fp32 and bf16.

What a kernel must write starts as NaN, so that what it leaves unwritten shows.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_checks import (
    BOTH_WAYS,
    DEVICE,
    DTYPES,
    GPU,
    HAS_TRITON,
    KERNELS_RUN,
    RUNS_KERNELS,
    also_in_a_row,
    assert_as_good,
    check,
    differentiable,
    randn,
    running_kernels,
    unwritten,
    with_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from luthier.ops import attention as attention_module
from luthier.ops import (
    backend,
    dropout,
    flash_attention,
    gated_mlp,
    linear_cross_entropy,
    lora_kernels,
    lora_linear,
    nf4,
    rms_norm,
    rotary,
)
from luthier.ops import token_logprobs as token_logprobs_module
from luthier.ops.attention import attention, attention_reference
from luthier.ops.token_logprobs import token_logprobs, token_logprobs_reference

OPS = (rms_norm, rotary, gated_mlp, nf4, linear_cross_entropy, token_logprobs_module, lora_linear, dropout)


@pytest.fixture(params=BOTH_WAYS)
def path(request, monkeypatch):
    with running_kernels(request.param, monkeypatch, *OPS):
        yield "kernel" if request.param else "reference"


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
class TestInterpreter:
    """The repair of the interpreter, without which the bf16 tests would prove nothing."""

    SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, 3.3895e38, 1e-39, 1e-45, float("inf"), float("-inf"), float("nan")]

    def test_conversion_rounds_to_nearest_even(self):
        from triton_interpreter import rounded_to_bf16

        values = torch.cat((torch.tensor(self.SPECIAL), torch.randn(4096, generator=torch.Generator().manual_seed(0))))
        bits = torch.from_numpy(rounded_to_bf16(values.numpy()).view("int16")).view(torch.bfloat16)
        torch.testing.assert_close(bits, values.bfloat16(), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.skipif(GPU or not KERNELS_RUN, reason="nothing is interpreted")
    def test_a_kernel_computes_bf16_like_torch_only_when_repaired(self):
        import triton
        import triton.language as tl
        from triton_interpreter import repaired

        @triton.jit
        def scale(X, OUT, N: tl.constexpr):
            at = tl.arange(0, N)
            tl.store(OUT + at, (tl.load(X + at).to(tl.float32) * 1.7).to(tl.bfloat16))

        x, out = randn(256, dtype=torch.bfloat16), unwritten(256, dtype=torch.bfloat16)
        scale[(1,)](x, out, N=256)
        assert not torch.equal(out, (x.float() * 1.7).bfloat16()), "Triton's interpreter rounds now: drop the repair"
        with repaired():
            scale[(1,)](x, out, N=256)
        assert torch.equal(out, (x.float() * 1.7).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestRMSNorm:
    @pytest.mark.parametrize("flavour", rms_norm.FLAVOURS)
    @pytest.mark.parametrize("shape", [(3, 5, 97), (7, 16)])
    def test_forward_and_gradients(self, path, dtype, flavour, shape):
        inputs = {"x": 3 * randn(*shape, dtype=dtype), "weight": randn(shape[-1], seed=1, dtype=dtype)}
        torchs = with_gradients(lambda x, weight: rms_norm.rms_norm_reference(x, weight, 1e-5, flavour), inputs)
        truth = with_gradients(lambda x, weight: self.exact(x, weight, flavour), inputs, torch.float64)
        assert_as_good(with_gradients(lambda x, weight: rms_norm.rms_norm(x, weight, 1e-5, flavour), inputs), torchs, truth)

    @staticmethod
    def exact(x, weight, flavour):
        x = x - x.mean(-1, keepdim=True) if flavour == "layer_norm" else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + (flavour == "one_plus_scale"))

    def test_it_rounds_where_its_flavour_does(self, path, dtype):
        """In bf16 the order of scaling and rounding shows in the last bit: no other flavour agrees as often."""
        x, weight = 3 * randn(64, 97, dtype=dtype), 1 + 0.1 * randn(97, seed=1, dtype=dtype)
        flavours = ("cast_then_scale", "scale_then_cast")
        references = {flavour: rms_norm.rms_norm_reference(x, weight, 1e-5, flavour) for flavour in flavours}
        for flavour in flavours:
            out = rms_norm.rms_norm(x, weight, 1e-5, flavour)
            differing = {name: int((out != reference).sum()) for name, reference in references.items()}
            assert dtype == torch.float32 or differing.pop(flavour) < min(differing.values())

    def test_what_does_not_lie_row_by_row(self, path, dtype):
        """A transposed input, and the gradient of a sum: one element, seen from everywhere."""
        inputs = {"x": randn(1, 40, 6, dtype=dtype), "weight": randn(40, seed=1, dtype=dtype)}
        outcomes = []
        for norm in (rms_norm.rms_norm, rms_norm.rms_norm_reference):
            leaves = [value.clone().requires_grad_() for value in inputs.values()]
            out = norm(leaves[0].transpose(1, 2), leaves[1], 1e-5, "scale_then_cast")
            outcomes.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
        torch.testing.assert_close(*outcomes)

    def test_into_longer_rows_with_a_residual(self, path, dtype):
        x, weight, grad, residual = (randn(*s, seed=n, dtype=dtype) for n, s in enumerate([(6, 40), (40,), (6, 40), (6, 40)]))
        out = unwritten(6, 56, dtype=dtype)
        rms_norm.rms_norm_forward(x, weight, 1e-5, "scale_then_cast", out[:, :40])
        expected = rms_norm.rms_norm_reference(x, weight, 1e-5, "scale_then_cast")
        torch.testing.assert_close(out[:, :40], expected)
        assert torch.isnan(out[:, 40:]).all()
        wide = torch.cat((grad, unwritten(6, 16, dtype=dtype)), dim=1)[:, :40]
        back = rms_norm.rms_norm_backward(wide, x, weight, 1e-5, "scale_then_cast", residual, out=residual.clone())
        expected, _ = rms_norm.rms_norm_backward_reference(grad, x, weight, 1e-5, "scale_then_cast", residual)
        torch.testing.assert_close(back, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [16, 12])
class TestRotary:
    def tables(self, turned, batch=2):
        angles = 9 * randn(batch, 5, turned // 2, seed=3)
        return angles.cos(), angles.sin()

    def test_forward_and_gradients(self, path, dtype, interleaved, turned):
        cos, sin = (table.to(dtype) for table in self.tables(turned, batch=1))
        op = differentiable(
            lambda x: rotary.rotate(x, cos, sin, interleaved, out=unwritten(*x.shape, dtype=dtype)),
            lambda grad, x: rotary.rotate(grad, cos, sin, interleaved, out=unwritten(*x.shape, dtype=dtype), inverse=True),
        )
        check(
            lambda x: op(x),
            lambda x: self.textbook(x, cos.to(x.dtype), sin.to(x.dtype), interleaved),
            {"x": randn(2, 5, 3, 16, dtype=dtype)},
        )

    @staticmethod
    def textbook(x, cos, sin, interleaved):
        """As transformers writes it: x * cos + rotate_half(x) * sin, in x's dtype."""
        turned = 2 * cos.shape[-1]
        head, rest = x[..., :turned], x[..., turned:]
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos[:, :, None], sin[:, :, None])
        )
        a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
        half = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
        return torch.cat((head * cos + half * sin, rest), -1)

    def test_in_place_on_a_part_of_a_row_and_back(self, path, dtype, interleaved, turned):
        cos, sin = self.tables(turned)
        rows = randn(2, 5, 80, dtype=dtype)
        before, heads = rows.clone(), rows[..., 16:64].unflatten(-1, (3, 16))
        expected = rotary.rotary_reference(heads, cos, sin, interleaved)
        rotary.rotate(heads, cos, sin, interleaved)
        torch.testing.assert_close(heads, expected)
        assert torch.equal(rows[..., :16], before[..., :16]) and torch.equal(rows[..., 64:], before[..., 64:])
        back = unwritten(2, 3, 5, 16, dtype=dtype).transpose(1, 2)
        rotary.rotate(heads, cos, sin, interleaved, out=back, inverse=True)
        torch.testing.assert_close(back, before[..., 16:64].unflatten(-1, (3, 16)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", gated_mlp.KINDS)
class TestGatedActivation:
    def test_forward_and_gradients(self, path, dtype, activation):
        def backward(grad, gate, up):
            of_gate, of_up = gate.clone(), up.clone()
            gated_mlp.gated_backward_(grad.clone(), of_gate, of_up, activation)
            return of_gate, of_up

        op = differentiable(
            lambda gate, up: gated_mlp.gated_forward(gate, up, activation, unwritten(*gate.shape, dtype=dtype)), backward
        )
        check(
            lambda gate, up: op(gate, up),
            lambda gate, up: gated_mlp.gated_activation_reference(gate, up, activation),
            {"gate": 2 * randn(6, 133, dtype=dtype), "up": randn(6, 133, seed=1, dtype=dtype)},
        )

    def test_in_place_on_halves_of_a_row(self, path, dtype, activation):
        both, grad = randn(4, 66, dtype=dtype), randn(4, 33, seed=1, dtype=dtype)
        gate, up = both[:, :33], both[:, 33:]
        wide = unwritten(4, 49, dtype=dtype)
        gated_mlp.gated_forward(gate, up, activation, wide[:, :33])
        torch.testing.assert_close(wide[:, :33], gated_mlp.gated_activation_reference(gate, up, activation))
        expected = gated_mlp.gated_backward_reference(grad, gate, up, activation)
        out = gated_mlp.gated_backward_(grad, gate, up, activation)
        for value, truth in zip((out, gate, up), expected, strict=True):
            torch.testing.assert_close(value, truth)


class TestNF4:
    def quantise(self, *shape, blocksize=64, nested=True, kind="nf4", dtype=torch.bfloat16):
        from bitsandbytes.nn import Params4bit

        weight = randn(*shape, dtype=dtype)
        weight = Params4bit(weight, False, None, blocksize, nested, kind)
        return weight._quantize(torch.device(DEVICE))

    @pytest.mark.parametrize("blocksize", [64, 128, 2048])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("shape", [(48, 128), (5, 96), (3, 64, 96)])
    def test_bit_equal_to_bitsandbytes(self, path, shape, kind, nested, blocksize):
        from bitsandbytes.functional import dequantize_4bit

        weight = self.quantise(*shape, blocksize=blocksize, nested=nested, kind=kind)
        flat = copy.copy(weight.quant_state)  # its CPU kernel takes wrong scales where a block goes over the end of a row
        flat.shape = torch.Size((1, weight.quant_state.shape.numel()))
        expected = dequantize_4bit(weight.data, flat).view(shape)
        assert torch.equal(nf4.dequantise(nf4.quantised(weight)), expected)

    @pytest.mark.parametrize("columns, wide", [(1024, 1040), (7168, 7184), (9216, 9216)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("blocksize", [64, 128])
    def test_by_words(self, path, dtype, columns, wide, nested, blocksize, monkeypatch):
        """Rows of whole steps have a kernel of their own."""
        monkeypatch.setattr(nf4, "_nf4_kernel", None)
        weight = nf4.quantised(self.quantise(3, columns, blocksize=blocksize, nested=nested))
        out = unwritten(4, wide, dtype=dtype)
        nf4.dequantise(weight, out[:3, :columns])
        assert torch.equal(out[:3, :columns], nf4.dequantise_reference(weight, dtype))
        assert torch.isnan(out[3:]).all() and torch.isnan(out[:, columns:]).all()

    @pytest.mark.parametrize("columns, wide", [(128, 144), (128, 145), (4096 + 64, 4192), (96, 112)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_into_longer_rows(self, path, dtype, columns, wide):
        weight = nf4.quantised(self.quantise(9, columns))
        out = unwritten(11, wide, dtype=dtype)
        nf4.dequantise(weight, out[:9, :columns])
        assert torch.equal(out[:9, :columns], nf4.dequantise_reference(weight, dtype))
        assert torch.isnan(out[9:]).all() and torch.isnan(out[:, columns:]).all()


HEADS = {"plain": {}, "capped": {"softcap": 2.0}, "scaled": {"scale": 0.25}, "both": {"softcap": 1.5, "scale": 3.0}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shaping", HEADS.values(), ids=HEADS)
class TestLinearCrossEntropy:
    @pytest.mark.parametrize("bias", [False, True])
    def test_loss_and_gradients(self, path, dtype, shaping, bias):
        inputs = {"hidden": randn(2, 7, 24, dtype=dtype), "weight": randn(131, 24, seed=1, dtype=dtype)}
        inputs |= {"bias": randn(131, seed=2, dtype=dtype)} if bias else {}
        targets = torch.randint(131, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        targets[0, :3] = -100

        def reference(hidden, weight, bias=None):
            logits = linear_cross_entropy.shape_logits(F.linear(hidden, weight, bias), **shaping)
            logits = logits.float() if logits.dtype != torch.float64 else logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

        def op(hidden, weight, bias=None):
            return linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, bias, **shaping, chunk_rows=4)

        check(op, reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shaping", HEADS.values(), ids=HEADS)
class TestTokenLogprobs:
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_log_probs_and_gradients(self, path, dtype, shaping, bias, trained):
        inputs, tokens = self.case(dtype, bias)
        frozen = {} if trained else {name: inputs.pop(name) for name in list(inputs) if name != "hidden"}

        def of(function, **settings):
            def log_probs(hidden, **given):
                others = {name: value.to(hidden.dtype) for name, value in frozen.items()} | given
                return function(hidden, tokens=tokens, **others, **settings).log_probs

            return log_probs

        in_one = {"softcap": shaping["softcap"] / 0.7} if "softcap" in shaping else {}
        in_one["scale"] = shaping.get("scale", 1.0) / 0.7
        op = of(token_logprobs, chunk_rows=4, temperature=0.7, **shaping)
        check(op, of(token_logprobs_reference, temperature=0.7, **shaping), inputs, of(token_logprobs_reference, **in_one))

    def test_entropy_and_what_is_likeliest(self, path, dtype, shaping):
        inputs, tokens = self.case(dtype, bias=False)
        tokens[::2] = (inputs["hidden"] @ inputs["weight"].T).argmax(-1)[::2]

        def entropy(function, wide=dtype, **settings):
            found = function(**{name: value.to(wide) for name, value in inputs.items()}, tokens=tokens, **shaping, **settings)
            return {"entropy": found.entropy}, found.is_top1

        (ours, top1), (torchs, expected) = entropy(token_logprobs, chunk_rows=4), entropy(token_logprobs_reference)
        assert_as_good(ours, torchs, entropy(token_logprobs_reference, torch.float64)[0])
        assert torch.equal(top1, expected) and top1.any() and not top1.all()

    @staticmethod
    def case(dtype, bias):
        inputs = {"hidden": randn(14, 24, dtype=dtype), "weight": randn(131, 24, seed=1, dtype=dtype)}
        inputs |= {"bias": randn(131, seed=2, dtype=dtype)} if bias else {}
        return inputs, torch.randint(131, (14,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_a_sure_token_has_no_entropy(path):
    """Where one logit is far above the others, which are masked out of sight by nothing but their size."""
    hidden, weight = torch.full((1, 2), 50.0, device=DEVICE), torch.tensor([[1.0, 1], [-1, -1], [0, 0]], device=DEVICE)
    scores = token_logprobs(hidden, weight, torch.zeros(1, dtype=torch.long, device=DEVICE))
    assert scores.log_probs.item() == 0 and abs(scores.entropy.item()) < 1e-30 and scores.is_top1.item()


def test_log_probabilities_without_a_token_are_differentiable():
    hidden = randn(3, 8).requires_grad_()
    scores = token_logprobs(hidden[:0], randn(9, 8), torch.zeros(0, dtype=torch.long, device=DEVICE))
    scores.log_probs.sum().backward()
    assert scores.entropy.shape == (0,) and not hidden.grad.any()


def test_a_loss_without_targets_is_a_differentiable_zero():
    hidden, weight = randn(5, 8).requires_grad_(), randn(9, 8).requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(hidden, weight, torch.full((5,), -100, device=DEVICE))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_costs_no_memory_for_one():
    hidden, weight = randn(5, 8).requires_grad_(), randn(9, 8)
    linear_cross_entropy.linear_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.long, device=DEVICE)).backward()
    assert weight.grad is None and hidden.grad.any()


@pytest.mark.parametrize("shaping", HEADS.values(), ids=HEADS)
def test_a_loss_without_a_backward_computes_no_gradient(path, shaping, monkeypatch):
    asked, chunk = [], linear_cross_entropy.loss_and_grad_

    def watched(*arguments, wants_grad):
        losses, grad = chunk(*arguments, wants_grad=wants_grad)
        asked.append((wants_grad, grad is not None))
        return losses, grad

    monkeypatch.setattr(linear_cross_entropy, "loss_and_grad_", watched)
    hidden, weight, targets = randn(7, 24), randn(131, 24, seed=1), torch.arange(7, device=DEVICE)
    loss = functools.partial(linear_cross_entropy.linear_cross_entropy, weight=weight, targets=targets, **shaping, chunk_rows=4)
    leaf = hidden.clone().requires_grad_()
    expected = loss(leaf)
    with torch.no_grad():
        without = loss(leaf)
    assert asked == [(True, True)] * 2 + [(False, False)] * 2
    assert torch.equal(expected, without) and torch.equal(expected, loss(hidden))
    assert asked[4:] == [(False, False)] * 2
    raw = F.linear(hidden, weight)
    before = raw.clone()
    chunk(raw, targets, shaping.get("softcap"), shaping.get("scale", 1.0), wants_grad=False)
    assert torch.equal(raw, before)


def test_mismatched_tokens_are_an_error():
    with pytest.raises(ValueError, match="(5, 8)"):
        linear_cross_entropy.linear_cross_entropy(randn(5, 8), randn(9, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="(5, 8)"):
        token_logprobs(randn(5, 8), randn(9, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(randn(5, 8), randn(9, 8), torch.zeros(5, dtype=torch.long), temperature=0)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_its_definition(heads):
    q, k, v = randn(2, 4, 9, 8), randn(2, heads, 9, 8, seed=1), randn(2, heads, 9, 8, seed=2)
    torch.testing.assert_close(attention(q, k, v, 0.3), attention_reference(q, k, v, 0.3))
    window = attention_reference(q, k, v, 0.3, window=3)
    index = torch.arange(9, device=DEVICE)
    seen = (index[:, None] >= index) & (index[:, None] - index < 3)
    torch.testing.assert_close(attention(q, k, v, 0.3, mask=seen), window)
    sinks = attention_reference(q, k, v, 0.3, sinks=torch.full((4,), -1e9, device=DEVICE))
    torch.testing.assert_close(sinks, attention_reference(q, k, v, 0.3))


def test_lora_linear_is_what_peft_computes():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(12, 8)).to(DEVICE)
    layer = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    ).base_model.model[0]
    x, base = randn(3, 12), layer.base_layer
    adapter = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.scaling["default"]
    ours = lora_linear.lora_linear_reference(x, lora_linear.Part(base.weight, base.bias, *adapter))
    torch.testing.assert_close(ours, layer(x))


def parts_of(kind: str, dtype: torch.dtype) -> list[lora_linear.Part]:
    """Three layers side by side that all train."""
    parts = []
    for number, (width, rank, scale, p) in enumerate([(40, 3, 0.5, 0.3), (5, 2, 1.0, 0.0), (32, 7, 2.0, 0.6)]):
        tensors = [randn(width, 48, seed=number, dtype=dtype) / 7, None if number == 1 else randn(width, seed=3, dtype=dtype)]
        if kind != "plain" and (kind != "two of three" or number != 1):
            tensors += [randn(rank, 48, seed=rank) / 7, randn(width, rank, seed=rank + 9)]
        else:
            tensors += [None, None]
        dropped = dropout.Dropout(p, (number << 40) + 5) if p and kind == "dropout" else None
        trained = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
        parts.append(lora_linear.Part(*trained, scale, dropped))
    return parts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "two of three", "adapters", "dropout"])
def test_a_projection_is_its_layers_side_by_side(path, dtype, kind):
    """Outputs and all gradients, of all rows at once and of some rows at a time, beside autograd through the definition."""
    parts, n = parts_of(kind, dtype), 22
    x, grad = randn(n, 48, seed=20, dtype=dtype), randn(n, 77, seed=21, dtype=dtype)

    def definition(wide: torch.dtype) -> dict[str, Tensor]:
        """With everything in ``wide``."""
        tensors = [tensor for part in parts for tensor in (part.weight, part.bias, part.a, part.b)]
        tensors = [None if tensor is None else tensor.detach().to(wide).requires_grad_() for tensor in tensors]
        leaf, fours = x.detach().to(wide).requires_grad_(), zip(*[iter(tensors)] * 4, strict=True)
        layers = [lora_linear.Part(*four, part.scale, part.dropout) for four, part in zip(fours, parts, strict=True)]
        y = torch.cat([lora_linear.lora_linear_reference(leaf, layer) for layer in layers], dim=1)
        leaves = [leaf, *(tensor for tensor in tensors if tensor is not None)]
        return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))), strict=True))

    projection = lora_linear.Projection("qkv", parts, lora_linear.Workspace())
    names = ["y", "dx", *(f"parameter {number}" for number in range(len(projection.trained)))]
    truth = definition(torch.float64)
    torchs = {name: value.to(dtype) for name, value in definition(dtype).items()}
    with torch.no_grad():
        for chunk in (n, 9):
            ours = {name: value.to(dtype) for name, value in zip(names, computed(projection, x, grad, chunk), strict=True)}
            assert_as_good(ours, torchs, truth)


def computed(projection: lora_linear.Projection, x: Tensor, grad: Tensor, chunk: int) -> list[Tensor]:
    """The output and the gradients of a projection, ``chunk`` rows at a time."""
    ys, dxs, total = [], [], {}
    for row in range(0, x.shape[0], chunk):
        own, own_grad = x[row : row + chunk], grad[row : row + chunk]
        projection.forget()
        written = projection.written(x)
        wide = projection.new_input(own.shape[0], x)
        wide[:, : projection.width_in] = own
        low = projection.extend(wide, written, row=row)
        ys.append(projection.forward(wide, written))
        torch.testing.assert_close(projection.apply(own, low, written), ys[-1], rtol=0.02, atol=0.02)
        extended, low_grad = projection.extended_gradient(own_grad, written)
        dx, again = projection.input_gradient(own_grad, written, row)
        torch.testing.assert_close(projection.backward(extended, low_grad, written, row), dx, rtol=0.02, atol=0.02)
        assert (low_grad is None and again is None) or torch.allclose(low_grad, again, rtol=0.02, atol=0.02)
        dxs.append(dx)
        found = projection.gradients(own_grad, own, low_grad, low, row, whole=chunk == x.shape[0])
        total = {key: total[key] + value if key in total else value for key, value in found.items()}
    return [torch.cat(ys), torch.cat(dxs), *(total[id(tensor)] for tensor in projection.trained)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "alpha"), [(3, 1.0), (16, 0.25), (40, 1.0), (0, 0.25)])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_gradient_is_extended_by_what_goes_to_the_adapter(path, dtype, rank, alpha, in_place, monkeypatch):
    """[alpha dy | s alpha dy @ B | 0], also where dy lies in the room that is left for it."""
    monkeypatch.setattr(lora_kernels, "MANY", 20 + rank)
    adapter = [randn(rank, 20, seed=1), randn(300, rank, seed=2)] if rank else [None, None]
    projection = lora_linear.Projection("o", [lora_linear.Part(randn(300, 20), None, *adapter, 0.5)], lora_linear.Workspace())
    given = randn(21, 300, seed=4, dtype=dtype)
    room = projection.new_gradient(21, given).fill_(float("nan"))
    grad = room[:, :300].copy_(given) if in_place else given
    written = projection.written(given)
    wide, low = projection.extended_gradient(grad, written, alpha, room if in_place else None)
    assert torch.equal(grad, given) and torch.equal(wide[:, :300], alpha * given)
    assert not wide[:, 300 + rank :].any()
    if not rank:
        assert low is None
        return
    assert torch.equal(wide[:, 300 : 300 + rank], low) and low.is_contiguous()
    truth = 0.5 * alpha * given.double() @ projection.b(written).double()
    torchs = also_in_a_row({"low": truth}, lambda: {"low": (alpha * given) @ projection.b(written) * 0.5})
    assert_as_good({"low": low}, torchs, {"low": truth})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [3, 16, 40, 0])
def test_a_layer_is_added_to_a_residual(path, dtype, rank):
    """residual + alpha * layer(x) for an x without room for its extension, the residual in longer rows."""
    adapter = [randn(rank, 20, seed=1), randn(300, rank, seed=2)] if rank else [None, None]
    part = lora_linear.Part(randn(300, 20), randn(300, seed=3), *adapter, 0.5)
    projection = lora_linear.Projection("o", [part], lora_linear.Workspace())
    x, residual = randn(37, 20, seed=4, dtype=dtype), randn(37, 310, seed=5, dtype=dtype)[:, :300]
    before, written = residual.clone(), projection.written(x)
    ours = projection.apply(x, projection.low(x, written), written, residual, 0.25)

    def definition(wide: torch.dtype) -> torch.Tensor:
        tensors = [None if t is None else t.to(wide) for t in (part.weight, part.bias, part.a, part.b)]
        return residual.to(wide) + 0.25 * lora_linear.lora_linear_reference(x.to(wide), lora_linear.Part(*tensors, 0.5))

    assert_as_good({"y": ours}, {"y": definition(dtype)}, {"y": definition(torch.float64)})
    assert torch.equal(residual, before)


def test_an_adapter_may_lie_in_memory_in_any_order(path):
    a, b, like = randn(20, 3, seed=1).T, randn(3, 300, seed=2).T, randn(1, 20)
    projections = [
        lora_linear.Projection("o", [lora_linear.Part(randn(300, 20), None, *adapter)], lora_linear.Workspace())
        for adapter in ((a, b), (a.contiguous(), b.contiguous()))
    ]
    assert torch.equal(*(projection.written(like) for projection in projections))


def test_a_label_that_is_no_token_s_has_no_finite_loss(path):
    """Its logit would be read from the row before."""
    if path == "kernel":
        losses = linear_cross_entropy.launch_(randn(3, 9), torch.tensor([2, -1, 9], device=DEVICE), None, 1.0)
        assert losses.isinf().tolist() == [False, True, True]


SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KiB a block may use


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_kernels_compile_for_every_card():
    """With Triton's own compiler and ptxas, which need no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), *map(str, SHARED_MEMORY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for capability, shared in json.loads(done.stdout).items():
        assert shared and max(shared.values()) <= SHARED_MEMORY[int(capability)] * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projection_writes_what_its_drawing_shows(path, dtype):
    """W, B, bias and A where they belong, zeros elsewhere, whatever another layer left in the buffer."""
    parts = [
        lora_linear.Part(randn(70, 48), randn(70, seed=1), randn(3, 48, seed=2), randn(70, 3, seed=3), 0.5),
        lora_linear.Part(randn(5, 48, seed=4)),
        lora_linear.Part(randn(33, 48, seed=5), None, randn(7, 48, seed=6), randn(33, 7, seed=7), 2.0),
    ]
    projection = lora_linear.Projection("qkv", parts, lora_linear.Workspace())
    like = randn(1, dtype=dtype)
    buffer = projection.written(like)
    buffer[: projection.width_out] = float("nan")
    buffer[projection.width_out : projection.width_out + 10, :48] = float("nan")
    projection.forget()
    written = projection.written(like)
    expected = torch.zeros(108 + 16, 48 + 16, device=DEVICE)
    expected[:108, :48] = torch.cat([part.weight for part in parts])
    expected[:70, 48:51], expected[75:108, 51:58], expected[:70, 58] = parts[0].b, parts[2].b, parts[0].bias
    expected[108:118, :48] = torch.cat((parts[0].a, parts[2].a))
    assert torch.equal(written, expected.to(dtype))


class TestDropout:
    @pytest.mark.parametrize(
        "rounds, words", [(7, "5f6fb709 0d893f64 4f121f81 4f730a48"), (10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8")]
    )
    def test_philox_gives_its_authors_numbers(self, rounds, words):
        zero = torch.zeros(1, dtype=torch.long)
        assert [int(part) for part in dropout.philox(0, zero, zero, rounds)] == [int(word, 16) for word in words.split()]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(11, 97), (3, 4), (1, 2100)])
    def test_what_is_kept_stays_as_it_was(self, path, dtype, shape):
        x, total = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
        settings = dropout.Dropout(0.4, 3 << 40 | 12345)
        kept = dropout.kept_reference(*shape, settings, first_row=5, device=DEVICE)
        wide = torch.cat((x, unwritten(shape[0], 3, dtype=dtype)), dim=1)[:, : shape[1]]
        assert torch.equal(dropout.drop(wide, settings, 5), torch.where(kept, x, 0.0))
        expected = total + torch.where(kept, x, 0.0)
        assert torch.equal(dropout.add_dropped_(total, wide, settings, 5), expected)

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
    def test_masks_are_random(self, p):
        """Rate, columns, neighbours and other seeds within four standard deviations of independent coins."""
        rows, columns = 400, 514
        kept = dropout.kept_reference(rows, columns, dropout.Dropout(p, 1)).double() - (1 - p)
        other = dropout.kept_reference(rows, columns, dropout.Dropout(p, 2)).double() - (1 - p)
        variance = p * (1 - p)
        assert abs(kept.mean()) < 4 * (variance / kept.numel()) ** 0.5
        assert kept.mean(0).abs().max() < 5 * (variance / rows) ** 0.5  # of 514 columns one may be 4 off
        quarter = -(-columns // 4)
        pairs = [(kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, quarter:], kept[:, :-quarter]), (kept, other)]
        for left, right in pairs:
            assert abs((left * right).mean()) < 4 * variance / left.numel() ** 0.5

    def test_rows_count_from_where_the_caller_says(self):
        settings = dropout.Dropout(0.3, 9)
        whole = dropout.kept_reference(20, 33, settings)
        assert torch.equal(dropout.kept_reference(8, 33, settings, first_row=12), whole[12:])

    def test_seeds_come_from_torchs_generator(self):
        torch.manual_seed(5)
        first = [dropout.Dropout.draw(0.1) for _ in range(2)]
        torch.manual_seed(5)
        assert [dropout.Dropout.draw(0.1) for _ in range(2)] == first and first[0] != first[1]


def test_powers_and_warps():
    assert [backend.power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert backend.warps_for(16) == 4 and backend.warps_for(1 << 20) == 16


CALLS = {
    "cudnn": {},
    "flash": {},
    "efficient": {},
    "flash, structured": {"window": 5},
    "flash, structured, packed": {"segments": True},
    "flash, structured, both": {"segments": True, "window": 5},
}


@pytest.mark.parametrize("case", CALLS)
def test_the_calls_of_gpu_kernels_fit_their_schemas(case, monkeypatch):
    """On tensors without memory: shapes and arguments of the kernels that this machine cannot run."""
    structure = dict(CALLS[case])
    batch = 1 if structure.get("segments") else 2
    q = torch.empty(batch, 16, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = v = torch.empty(batch, 16, 4, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    if structure.get("segments"):
        structure["segments"] = attention_module.Segments(torch.empty(4, dtype=torch.int32, device="meta"), 7)
    monkeypatch.setattr(attention_module, "kernel_for", lambda *arguments: case.removesuffix(", packed").removesuffix(", both"))
    out, state = attention_module.attend(q, k, v, 0.1, **structure, sinks=torch.empty(8, device="meta"))
    gradients = attention_module.attend_backward(torch.empty_like(out), q, k, v, out, state, 0.1)
    assert out.shape == q.shape and [t.shape for t in gradients] == [t.shape for t in (q, k, v)]


STRUCTURES = [{}, {"window": 4}, {"bounds": [0, 3, 9]}, {"window": 3, "bounds": [0, 4, 9]}]
SCORES = {"plain": {}, "capped": {"softcap": 1.5}, "sinks": {"sinks": (1.0, -2.0, 0.5, 3.0)}}


def attention_case(
    structure: dict, scores: dict, dtype: torch.dtype, width: int = 16
) -> tuple[dict[str, Tensor], Tensor, dict, dict]:
    """(q, k, v; a mask that says what the structure does; the structure; soft cap or sinks)."""
    structure = dict(structure)
    index, bounds = torch.arange(9), structure.pop("bounds", None)
    seen = (index[:, None] >= index) & (index[:, None] - index < structure.get("window", 9))
    if bounds:
        segment = torch.searchsorted(torch.tensor(bounds), index, right=True)
        seen &= segment[:, None] == segment
        structure["segments"] = attention_module.Segments(torch.tensor(bounds, dtype=torch.int32, device=DEVICE), 6)
    heads = {"q": 4, "k": 2, "v": 2}
    inputs = {name: randn(1, n, 9, width, seed=seed, dtype=dtype) for seed, (name, n) in enumerate(heads.items())}
    scores = {name: torch.tensor(value, device=DEVICE) if name == "sinks" else value for name, value in scores.items()}
    return inputs, seen.to(DEVICE)[None, None], structure, scores


def textbook_attention(q, k, v, seen, softcap=None, sinks=None, as_score=False, scale=0.3):
    """All scores at once, in q's dtype, and a softmax that keeps one number a row, as that of every flash attention.

    A sink is one more score (``as_score``), or shrinks the output.
    """
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores if q.dtype == torch.float64 else scores.float()
    if as_score and sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        return scores.softmax(-1)[..., :-1].to(v.dtype) @ v
    rows = scores.logsumexp(-1, keepdim=True)
    out = (scores - rows).exp().to(v.dtype) @ v
    return out if sinks is None else (out * (rows - torch.logaddexp(rows, sinks.view(-1, 1, 1))).exp()).to(v.dtype)


def torchs_attention(seen: Tensor, softcap: float | None = None, sinks: Tensor | None = None) -> list[Callable]:
    """Torch's own kernel, where it knows the case: on a GPU it may be the one that is chosen."""

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)), attn_mask=seen, scale=0.3)
        if sinks is None:
            return out
        scores = (q.float() @ k.repeat_interleave(2, dim=1).float().mT * 0.3).masked_fill(~seen, float("-inf"))
        rows = scores.logsumexp(-1, keepdim=True)
        return (out * (rows - torch.logaddexp(rows, sinks.view(-1, 1, 1))).exp()).to(v.dtype)

    return [attend] if GPU and softcap is None else []


@pytest.fixture(params=["chosen", "reference", RUNS_KERNELS])
def attention_kernel(request, monkeypatch):
    """The kernel that this device would take, ours in plain torch, and ours in Triton."""
    if request.param == "reference":
        monkeypatch.setattr(flash_attention, "SCORES", 4 * 9 * 2)  # a few queries a chunk
    if request.param != "chosen":
        monkeypatch.setattr(attention_module, "kernel_for", lambda *a: "tiles" if request.param is True else "reference")
    monkeypatch.setattr(flash_attention, "tiles", lambda *arguments: flash_attention.Tiles(16, 16, 4, 1))
    with running_kernels(request.param is True, monkeypatch):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_attention_and_its_gradients(attention_kernel, structure, scores, dtype):
    inputs, seen, structure, scores = attention_case(structure, scores, dtype)
    op = functools.partial(attention, scale=0.3, **scores, **(structure or {"window": 9}))  # no window, but our way through
    textbook = functools.partial(textbook_attention, seen=seen, **scores)
    check(op, textbook, inputs, functools.partial(textbook, as_score=True), *torchs_attention(seen, **scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [20, 136])
def test_heads_of_odd_widths_and_of_more_than_fits_into_registers(attention_kernel, width, dtype):
    inputs, seen, structure, scores = attention_case({"window": 4}, SCORES["capped"], dtype, width)
    op = functools.partial(attention, scale=0.1, **scores, **structure)
    check(op, functools.partial(textbook_attention, seen=seen, scale=0.1, **scores), inputs)


def test_sinks_get_their_gradient(attention_kernel):
    inputs, seen, structure, scores = attention_case({"window": 4}, SCORES["sinks"], torch.float32)
    leaves = {**inputs, **scores}
    ours = with_gradients(functools.partial(attention, scale=0.3, **structure), leaves)
    truth = with_gradients(functools.partial(textbook_attention, seen=seen, as_score=True), leaves, torch.float64)
    for name, value in ours.items():
        torch.testing.assert_close(value, truth[name].float())


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("additive", [False, True])
def test_attention_under_a_mask(additive, scores):
    inputs, seen, _, scores = attention_case({"bounds": [0, 4, 9]}, scores, torch.float32)
    mask = torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, -1e30) if additive else seen
    textbook = functools.partial(textbook_attention, seen=seen, **scores)
    op = functools.partial(attention, scale=0.3, mask=mask, **scores)
    check(op, textbook, inputs, functools.partial(textbook, as_score=True), *torchs_attention(seen, **scores))


def test_a_query_that_sees_nothing_gets_nothing():
    """Padding on the left, as a band, for torch and for the kernel."""
    q, k, v = (randn(2, 2, 9, 16, seed=seed) for seed in range(3))
    index = torch.arange(9, dtype=torch.int32, device=DEVICE)
    first, last = torch.stack((torch.zeros_like(index), torch.full_like(index, 4))), torch.stack((index, index))
    band = flash_attention.Band.of(first, last)
    runs = [(flash_attention.flash_reference, flash_attention.flash_backward_reference)]
    runs += [(flash_attention.flash_forward, flash_attention.flash_backward)] if KERNELS_RUN else []
    for forward, backward in runs:
        out, rows = forward(q, k, v, 0.3, band)
        assert not out[1, :, :4].any() and torch.isneginf(rows[1, :, :4]).all()
        torch.testing.assert_close(out[0], attention(q[:1], k[:1], v[:1], 0.3)[0])
        dq, dk, dv = backward(torch.ones_like(out), q, k, v, out, rows, 0.3, band)
        assert not dq[1, :, :4].any() and not dk[1, :, :4].any() and not dv[1, :, :4].any() and dv[1, :, 4:].any()


@pytest.mark.parametrize("window", [None, 4])
def test_padding_as_a_band_is_padding_as_a_mask(attention_kernel, window):
    """What is no padding, and its gradients, under a gradient that is zero at the padding."""
    inputs = {name: randn(2, heads, 9, 16, seed=heads) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    index = torch.arange(9, device=DEVICE)
    real = torch.stack(((index >= 3) & (index < 8), index < 9))
    seen = (index[:, None] >= index) & (index[:, None] - index < (window or 9)) & real[:, None, :]
    first, last = (torch.tensor(ends, dtype=torch.int32, device=DEVICE) for ends in ([3, 0], [7, 8]))
    padding = attention_module.Padding(first, last)
    grad = randn(2, 4, 9, 16, seed=9) * real[:, None, :, None]
    out, state = attention_module.attend(*inputs.values(), 0.3, None, window, padding)
    gradients = attention_module.attend_backward(grad, *inputs.values(), out, state, 0.3)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    truth = attention(*leaves, 0.3, mask=seen[:, None] | ~real[:, None, :, None])  # padding sees all, so that it is a number
    torch.testing.assert_close(out.transpose(1, 2)[real].double(), truth.transpose(1, 2)[real], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(truth, leaves, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


class OnACard:
    """Of a tensor on a GPU that is not there, what the choice of a kernel looks at."""

    is_cuda, device = True, "cuda"

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, 8, 64, width), dtype


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_every_card_has_a_kernel_that_knows_the_case(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    segments = attention_module.Segments(torch.tensor([0, 3, 64]), 61)
    knows = {"window": {"tiles", "flash, structured", "reference"}, "softcap": {"tiles", "reference"}}
    knows |= {"packed": knows["window"] | {"efficient"}, "causal": knows["window"] | {"efficient", "cudnn", "flash"}}
    cases = {"causal": {}, "window": {"window": 5}, "packed": {"segments": segments}, "softcap": {"softcap": 2.0}}
    cases |= {"window of packed": {"window": 5, "segments": segments}}
    for (case, arguments), width in itertools.product(cases.items(), (40, 64, 80, 128, 192, 256, 320)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            kernel = attention_module.kernel_for(OnACard(width, dtype), **arguments)
            assert kernel in knows[case.split(" of")[0]]
            if "flash" in kernel or kernel in ("cudnn", "tiles"):
                assert capability >= (8, 0) and dtype.itemsize == 2 and width <= 256
