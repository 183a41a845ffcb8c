"""8-bit compute: bytes as torch converts, products as good as their rounding allows, a backward that leaves the loss alone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable

import pytest
import torch
from bitsandbytes.nn import Params4bit
from op_checks import BOTH_WAYS, DEVICE, RUNS_KERNELS, error, randn, running_kernels
from stock_pairs import batch, difference, loss_and_gradients, nf4_model, with_lora
from tiny import FAMILIES, save_tiny, tiny_model
from torch import Tensor, nn

from luthier.config import SFTRecipe
from luthier.errors import UnsupportedError
from luthier.model import blocks, compute
from luthier.model.accelerate import accelerate, dial_of, state_of
from luthier.model.blocks import Mode
from luthier.model.compute import set_compute
from luthier.model.cost import LayerPlan
from luthier.model.load import load_model
from luthier.ops import fp8, gated_mlp, lora_linear, nf4
from luthier.ops.dropout import Dropout
from luthier.ops.fp8 import E4M3, quantise_rows, scales_of, weight_bounds, write_riders, write_weight
from luthier.ops.fp8_linear import Fp8Projection
from luthier.workflows.common import checked

DENSE = [family for family in FAMILIES if family != "gpt_oss"]
ROUNDING = 0.026  # what e4m3 takes from normal numbers: 3 bits of mantissa


@pytest.fixture(params=BOTH_WAYS)
def path(request, monkeypatch):
    with running_kernels(request.param, monkeypatch, fp8, gated_mlp, lora_linear, nf4):
        yield


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


class TestQuantisedRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(5, 97), (3, 64), (2, 20000)])
    def test_bytes_are_those_of_torch(self, path, dtype, shape):
        x = randn(shape[0], shape[1] + 3, dtype=dtype)[:, 1:-2] * torch.logspace(-20, 20, shape[0], device=DEVICE)[:, None]
        x = x.to(dtype)
        x[:, ::7] *= 1e-5  # where e4m3 has fewer bits left, or none
        rows = quantise_rows(x)
        assert torch.equal(rows.scales, x.float().abs().amax(1) * (1 / 448))
        assert torch.equal(bits(rows.values), bits((x.float() * (1 / rows.scales)[:, None]).to(E4M3)))
        assert error(rows.dequantised(), x.double()) < 1.2 * ROUNDING

    def test_ties_go_to_even_and_the_largest_stays(self, path):
        x = torch.tensor([[448.0, -448.0, 17.0, 19.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 0.0]], device=DEVICE)
        assert quantise_rows(x).values.float().tolist() == [[448.0, -448.0, 16.0, 20.0, 2.0**-9, 0.0, 2.0**-8, 0.0]]

    @pytest.mark.parametrize("rank", [1, 16, 48])
    def test_riders_are_as_exact_as_bf16(self, path, rank):
        """Whatever their size beside the rows that they ride behind: the scale bounds both."""
        for size in (1e-2, 1.0, 50.0):
            x, t, w, b = randn(9, 64), size * randn(9, rank, seed=1), randn(12, 64, seed=2), size * randn(12, rank, seed=3)
            rows, weight = quantise_rows(x, t), torch.full((12, 64 + fp8.rider_width(rank)), float("nan"), device=DEVICE)
            weight = weight.to(E4M3)
            scales = write_riders(w.abs().amax(1), b, weight)
            write_weight(w, scales, weight[:, :64])
            plain = fp8.Rows8(rows.values[:, :64], rows.scales), fp8.Rows8(weight[:, :64], scales)
            both, alone = fp8.product(rows, fp8.Rows8(weight, scales), torch.float32), fp8.product(*plain, torch.float32)
            truth, in_bf16 = t.double() @ b.double().T, t.bfloat16().double() @ b.bfloat16().double().T
            sums = 2**-13 * alone.norm() / truth.norm() if DEVICE == "cuda" else 0  # what e4m3 products keep of a sum
            assert error(both - alone, truth) < 2 * error(in_bf16, truth) + sums
            reference = fp8.quantise_rows_reference(x, t)
            assert torch.equal(bits(rows.values), bits(reference.values)) and torch.equal(rows.scales, reference.scales)

    def test_rows_without_numbers_and_rows_that_are_lost(self, path):
        x = randn(5, 40)
        x[1], x[2, 3], x[3, 4], x[4] = 0, float("inf"), float("nan"), 1e-42
        rows = quantise_rows(x)
        product = rows.dequantised() @ torch.ones(40, 1, device=DEVICE)
        assert product.isnan().squeeze(1).tolist() == [False, False, True, True, False]
        assert product[1] == 0 and product[4] == 0 and rows.scales[:2].isfinite().all()


@pytest.mark.parametrize("path", [RUNS_KERNELS], indirect=True)
@pytest.mark.parametrize("activation", gated_mlp.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_is_rounded_in_its_own_pass_as_it_would_be_after_it(path, activation, dtype):
    """With riders from 100 times smaller than the row to 100 times larger, and a row that is lost."""
    sizes = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0, 1.0], device=DEVICE)[:, None]
    both, riders = randn(6, 2 * 1040, dtype=dtype), randn(6, 17, seed=2) * sizes
    both[5, 7] = float("nan")
    act, rounded = both.new_empty(6, 1040), fp8.room(6, 1040, 17, both)
    gated_mlp.gated_forward(*both.chunk(2, dim=1), activation, act, rounded)
    later = gated_mlp.gated_forward(*both.chunk(2, dim=1), activation, torch.empty_like(act))
    assert act[5, 7].isnan() and torch.equal(act.nan_to_num(), later.nan_to_num())
    ours, expected = fp8.ride(rounded, act, riders), quantise_rows(act, riders)
    assert torch.equal(ours.scales, expected.scales) and torch.equal(bits(ours.values), bits(expected.values))


def test_a_row_that_no_program_holds_is_rounded_later(path, monkeypatch):
    monkeypatch.setattr(fp8, "ROW_BLOCK", 1024)
    assert fp8.room(6, 1040, 17, randn(1, 1)) is None


def weights(rows: int, columns: int) -> dict[str, Tensor | nf4.Quantised]:
    dense = randn(rows, columns, seed=rows)
    dense[rows // 2] *= 30
    packed = {
        name: nf4.quantised(Params4bit(dense.bfloat16(), requires_grad=False, quant_type="nf4", **settings).to(DEVICE))
        for name, settings in {
            "nested": {"compress_statistics": True},
            "plain": {"compress_statistics": False, "blocksize": 128},
        }.items()
    }
    return {"fp32": dense, "bf16": dense.bfloat16(), **packed}


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(68, 128), (132, 384), (33, 100), (34, 128)])
def test_a_weight_is_written_from_its_stored_form(path, shape, transposed):
    for kind, weight in weights(*shape).items():
        if shape[1] % 64 and kind == "plain":
            continue  # one odd width is enough
        dense = nf4.dequantise_reference(weight, torch.float32) if isinstance(weight, nf4.Quantised) else weight.float()
        dense = dense.T if transposed else dense
        bounds = weight_bounds(weight)[transposed]
        assert (bounds >= dense.abs().amax(1)).all() and (bounds <= 4 * dense.abs().amax(1)).all() or transposed
        scales = scales_of(bounds)
        out = torch.full((dense.shape[0], dense.shape[1] // 4 * 4 + 12), float("nan"), device=DEVICE).to(E4M3)
        out = out[:, 4 : 4 + dense.shape[1]]
        write_weight(weight, scales, out, transposed)
        assert torch.equal(bits(out), bits((dense * (1 / scales)[:, None]).to(E4M3))), kind
        assert error(out.float() * scales[:, None], dense.double()) < 1.15 * ROUNDING


@pytest.mark.parametrize(("start", "stride"), [(0, 2), (2, 4), (2, 2)])
def test_4_bits_behind_a_layer_of_an_odd_width(path, start, stride):
    """Their kernel writes words, which such a place has none for."""
    weight = weights(32, 128)["nested"]
    scales = scales_of(weight_bounds(weight)[1])
    room = torch.zeros(128, 64 + stride, device=DEVICE).to(E4M3)
    write_weight(weight, scales, room[:, start : start + 32], transposed=True)
    expected = torch.zeros_like(room, dtype=torch.float32)
    expected[:, start : start + 32] = nf4.dequantise_reference(weight, torch.float32).T * (1 / scales)[:, None]
    assert torch.equal(bits(room), bits(expected.to(E4M3)))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_may_lie_in_memory_in_any_order(path, transposed):
    weight = randn(48, 80).T
    scales = scales_of(weight_bounds(weight)[transposed])
    written = [
        write_weight(w, scales, torch.empty(*(weight.T if transposed else weight).shape, dtype=E4M3, device=DEVICE), transposed)
        for w in (weight, weight.contiguous())
    ]
    assert torch.equal(*map(bits, written))


def test_a_product_is_off_by_its_rounding(path):
    x, w = randn(48, 256), randn(64, 256, seed=1)
    left, right = quantise_rows(x), quantise_rows(w)
    emulated = left.dequantised().double() @ right.dequantised().double().T
    y = fp8.product(left, right, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and error(y, emulated) < 4e-3
    assert 0.8 < error(y, x.double() @ w.double().T) / (2**0.5 * ROUNDING) < 1.1


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_projection_with_adapters_and_bias_is_its_exact_one_but_for_the_rounding(path, everywhere):
    """Both kinds of products of both directions; with a weight of zeros, where only adapters and bias are left, as in bf16."""
    for scale, allowed in ((1.0, 1.6 * 2**0.5 * ROUNDING), (0.0, 2**-8)):
        parts = [
            lora_linear.Part(scale * randn(64, 96), randn(64, seed=1), randn(3, 96, seed=2), randn(64, 3, seed=3), 0.5),
            lora_linear.Part(
                scale * randn(32, 96, seed=4), None, randn(7, 96, seed=6), randn(32, 7, seed=7), 2.0, Dropout(0.3, 11)
            ),
        ]
        exact = lora_linear.Projection("qkv", parts, lora_linear.Workspace())
        ours = Fp8Projection("qkv", parts, lora_linear.Workspace(), everywhere)
        for values in (outputs(ours), gradients(ours)):
            for name, value in values.items():
                truth = {**outputs(exact), **gradients(exact)}[name].double()
                assert error(value, truth) < (allowed if everywhere or name in gradients(exact) else 1e-6), name


@pytest.mark.parametrize("everywhere", [False, True])
def test_buffers_in_the_same_memory_are_written_again_where_another_lay(path, everywhere):
    part = lora_linear.Part(randn(64, 96), None, randn(3, 96, seed=2), randn(64, 3, seed=3), 0.5)
    ours = Fp8Projection("down", [part], lora_linear.Workspace(), everywhere)
    first = outputs(ours)
    back = gradients(ours)
    assert all(torch.equal(value, first[name]) for name, value in outputs(ours).items())
    grad = randn(20, 64, seed=10)
    assert torch.equal(ours.input_gradient(grad, ours.written(grad))[0], back["input"])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_4_bit_weights_and_riders_of_any_size_have_one_scale(path, transposed):
    """Transposed, 64 columns share it: then a block of 4-bit weights holds 16 numbers in 8 bits, too."""
    parts = [lora_linear.Part(weights(rows, 192)["nested"], None, randn(3, 192), randn(rows, 3)) for rows in (68, 36)]
    parts[0].a[:, 70] *= 500
    ours = Fp8Projection("gate_up", parts, lora_linear.Workspace(), everywhere=True).written(randn(1, 1))
    written = ours.columns if transposed else ours.rows
    dense = torch.cat([nf4.dequantise_reference(part.weight, torch.float32) for part in parts])
    dense, riders = (dense.T, ours.a(ours).T) if transposed else (dense, ours.b(ours))
    inverse = (1 / written.scales)[:, None]
    assert torch.equal(bits(written.values[:, : dense.shape[1]]), bits((dense * inverse).to(E4M3)))
    assert torch.equal(bits(written.values[:, dense.shape[1] :]), bits(fp8._in_two(riders * inverse, low=2)))
    if transposed:
        assert written.scales[70] > 2 * written.scales[130] and (written.scales.view(-1, 64).diff(dim=1) == 0).all()


def test_8_bits_are_written_into_the_memory_of_16():
    part = lora_linear.Part(randn(512, 512), None, randn(16, 512), randn(512, 16))
    like, workspaces = randn(1, 1, dtype=torch.bfloat16), [lora_linear.Workspace() for _ in range(3)]
    lora_linear.Projection("o", [part], workspaces[0]).written(like)
    for workspace, everywhere in zip(workspaces[1:], (False, True), strict=True):
        ours = Fp8Projection("o", [part], workspace, everywhere).written(like)
        ours.forward(ours.new_input(4, like).zero_(), ours)
        ours.forget()
        assert ours.rows.values.shape == ours.columns.values.shape
    sizes = [bytes_of(workspace.buffers.values()) for workspace in workspaces]
    assert max(sizes) < 1.2 * sizes[0]


def outputs(projection: lora_linear.Projection) -> dict[str, Tensor]:
    x, residual = randn(20, projection.width_in, seed=8), randn(20, projection.width_out, seed=9)
    written = projection.written(x)
    wide = projection.new_input(20, x)
    wide[:, : projection.width_in] = x
    low = projection.extend(wide, written)
    return {
        "forward": projection.forward(wide, written),
        "add_to": projection.add_to(residual, wide, written, 0.5),
        "apply": projection.apply(x, low, written),
        "apply to": projection.apply(x, low, written, residual, 0.5),
    }


def gradients(projection: lora_linear.Projection) -> dict[str, Tensor]:
    projection.forget()
    grad, x = randn(20, projection.width_out, seed=10), randn(20, projection.width_in, seed=8)
    written = projection.written(grad)
    again = projection.new_input(20, x)
    again[:, : projection.width_in] = x
    projection.extend(again, written)
    wide, low = projection.extended_gradient(grad, written, 0.5)
    return {
        "backward": projection.backward(wide, low, written),
        "low": low,
        "input": projection.input_gradient(grad, written)[0],
        "again": projection.forward_again(again, written),
    }


class Emulated(torch.autograd.Function):
    """One frozen linear layer as 8 bits allow it: the yardstick."""

    @staticmethod
    def forward(ctx, x, weight, everywhere):
        ctx.save_for_backward(weight)
        return (rounded(x) if everywhere else x) @ (rounded(weight) if everywhere else weight).T

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad) @ rounded(ctx.saved_tensors[0].T).T, None, None


def rounded(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return fp8.quantise_rows_reference(flat).dequantised().view(x.shape)


def emulate(model: nn.Module, everywhere: bool) -> nn.Module:
    """The stock model with every frozen linear layer of its decoder layers emulated."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name and "lora_" not in name:
            bias = 0 if module.bias is None else module.bias
            module.forward = lambda x, m=module, b=bias: Emulated.apply(x, m.weight, everywhere) + b
    return model


def in_8_bits(model: nn.Module, kind: str, mode: Mode = Mode.KEEP) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in 8 bits")
        warnings.filterwarnings("error", message=".*stock forward")
        set_compute(accelerate(model), kind)
    dial = dial_of(model)
    dial.set_plan([LayerPlan(mode)] * dial.layers)
    return model


@pytest.fixture
def several_chunks(monkeypatch):
    for name in ("ROWS", "KEPT_ROWS", "NARROW_ROWS"):
        monkeypatch.setattr(blocks, name, 20)


@pytest.mark.parametrize("family", DENSE)
def test_a_family_trains_as_well_as_8_bits_allow(family, several_chunks):
    """The error of all adapters' gradients, against fp32, beside that of emulated stock layers."""
    truth = loss_and_gradients(with_lora(tiny_model(family)), **batch())
    model = with_lora(tiny_model(family))
    for kind in ("fp8-backward", "fp8"):
        loss, yardstick = loss_and_gradients(emulate(with_lora(tiny_model(family)), kind == "fp8"), **batch())
        ours = loss_and_gradients(in_8_bits(model, kind), **batch())
        assert 0.3 < difference(ours[1], truth[1]) / difference(yardstick, truth[1]) < 1.5
        if kind == "fp8-backward":
            assert torch.equal(ours[0], loss_and_gradients(in_8_bits(model, "bf16"), **batch())[0])
        else:
            assert abs(ours[0] - truth[0]) <= max(3 * abs(loss - truth[0]), 0.005 * truth[0])


@pytest.mark.parametrize("kind", ["fp8-backward", "fp8"])
def test_modes_of_the_dial_differ_by_rounding_alone(kind, several_chunks, tmp_path):
    """4-bit weights. In "fp8" a layer that computes again computes the same; in "fp8-backward" only gate and up are rounded."""
    model = with_lora(nf4_model(tmp_path))
    exact = loss_and_gradients(in_8_bits(model, "bf16"), **batch())
    kept = loss_and_gradients(in_8_bits(model, kind), **batch())
    for mode in Mode:
        loss, ours = loss_and_gradients(in_8_bits(model, kind, mode), **batch())
        assert torch.equal(loss, kept[0])
        if kind == "fp8":
            assert difference(ours, kept[1]) < 1e-5
        else:
            assert torch.equal(loss, exact[0]) and difference(ours, exact[1]) < 2 * difference(kept[1], exact[1])


def held_bytes(smallest: int) -> int:
    """Bytes of all tensors of at least ``smallest`` bytes that something still refers to, each memory counted once."""
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter) and value.nbytes >= smallest]
    return bytes_of(tensors)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    memories = [tensor.untyped_storage() for tensor in tensors]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


@pytest.mark.parametrize("mode", Mode)
def test_a_layer_holds_what_its_mode_says_and_nothing_after_its_backward(mode):
    """Counted without garbage collections, which come late: what only they would free is held for many steps."""
    model, rows = with_lora(tiny_model("llama3")), batch()
    smallest = rows["input_ids"].numel() * model.config.hidden_size * 4
    between, after = {}, {}
    for kind in compute.COMPUTE:
        loss_and_gradients(in_8_bits(model, kind, mode), **rows)  # buffers are there now
        model.zero_grad()
        gc.collect()
        gc.disable()
        try:
            before = held_bytes(smallest)
            loss = model(**rows).loss
            between[kind] = held_bytes(smallest) - before
            loss.backward()
            del loss
            after[kind] = held_bytes(smallest) - before
        finally:
            gc.enable()
    assert between["fp8-backward"] == between["fp8"] == between["bf16"] > 0
    assert after == dict.fromkeys(compute.COMPUTE, 0)


def test_a_model_that_changes_its_compute_gives_up_the_other_kind_s_buffers():
    model = with_lora(tiny_model("llama3"))
    sizes = []
    for kind in ("bf16", "fp8-backward", "fp8", "bf16"):
        loss_and_gradients(in_8_bits(model, kind), **batch())
        sizes.append(bytes_of(state_of(model).workspace.buffers.values()))
    assert sizes[0] == sizes[3] != sizes[1]


def test_it_can_be_turned_off_again_and_leaves_evaluation_alone():
    model = with_lora(tiny_model("llama3"))
    exact = loss_and_gradients(accelerate(model), **batch())
    evaluated = model.eval()(**batch()).loss
    assert difference(loss_and_gradients(in_8_bits(model, "fp8"), **batch())[1], exact[1]) > 0.01
    assert torch.equal(model.eval()(**batch()).loss, evaluated)
    again = loss_and_gradients(set_compute(model, "bf16"), **batch())
    assert torch.equal(again[0], exact[0]) and difference(again[1], exact[1]) == 0


class TestAsking:
    def test_a_load_warns_and_sets_every_layer(self, tmp_path):
        from luthier.fast import FastLanguageModel

        with pytest.warns(UserWarning, match=r"fp8-backward.*docs/speed.md"):
            model, _ = FastLanguageModel.from_pretrained(save_tiny("llama3", tmp_path / "model"), compute="fp8-backward")
        assert state_of(model).compute == "fp8-backward"
        assert state_of(FastLanguageModel.get_peft_model(model, r=4)).compute == "fp8-backward"

    def test_a_card_without_them_is_refused_before_loading(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        with pytest.raises(UnsupportedError, match="NVIDIA A100 is sm_80. Use compute='bf16'"):
            load_model("nothing/here/at/all", compute="fp8")

    def test_what_makes_no_sense_is_refused(self, tmp_path):
        recipe = SFTRecipe(model="m", data="d", output=str(tmp_path / "out"), compute="fp8", full_finetuning=True)
        with pytest.raises(UnsupportedError, match="frozen weights"):
            checked(recipe)
        with pytest.raises(UnsupportedError, match="frozen weights"):
            load_model("nothing/here/at/all", compute="fp8", full_finetuning=True)
        with pytest.raises(UnsupportedError, match="runs stock"):
            set_compute(tiny_model("llama3"), "fp8")
        with pytest.raises(ValueError, match="fp8-backward"):
            set_compute(tiny_model("llama3"), "fp8_backward")
        assert compute.COMPUTE[0] == "bf16"
