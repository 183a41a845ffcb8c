"""What trains in fused layers besides one plain adapter: dropout, several adapters, and the weights themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig
from stock_pairs import batch, difference, loss_and_gradients, nf4_model, with_lora
from tiny import FAMILIES, tiny_model
from torch import nn

from luthier.model import blocks
from luthier.model.accelerate import accelerate, dial_of
from luthier.model.blocks import Mode
from luthier.model.checkpointing import set_checkpointing
from luthier.model.cost import LayerPlan
from luthier.ops.dropout import Dropout, drop

DENSE = [family for family in FAMILIES if family != "gpt_oss"]
LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def fused(model: nn.Module, mode: Mode = Mode.KEEP) -> nn.Module:
    dial = dial_of(accelerate(model))
    dial.set_plan([LayerPlan(mode)] * dial.layers)
    return model


@pytest.fixture(autouse=True)
def all_of_it_is_fused():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stock forward")
        warnings.filterwarnings("ignore", message=".*Experts runs its stock forward.*its own weights are trained")
        yield


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """A few rows a chunk, so that gradients of weights and the masks of rows go over chunks too."""
    for name in ("ROWS", "KEPT_ROWS", "NARROW_ROWS"):
        monkeypatch.setattr(blocks, name, 20)
    monkeypatch.setattr(blocks, "TRAINED_ROWS", 20)


def assert_same(model, truth, inputs=None):
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(model, **(inputs or batch())), truth
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert difference(gradients, expected_gradients) < 2e-5
    return gradients


class TestEverythingTrains:
    """Full fine-tuning."""

    @pytest.mark.parametrize("family", DENSE)
    def test_every_parameter_gets_the_gradient_of_stock(self, family):
        truth = loss_and_gradients(tiny_model(family), **batch())
        for mode in (Mode.RECOMPUTE, Mode.KEEP):
            model = fused(tiny_model(family), mode)
            gradients = assert_same(model, truth)
            assert gradients.keys() == dict(model.named_parameters()).keys()
            for name, gradient in gradients.items():
                assert gradient.any() or "bias" in name, name  # the gradient of a key's bias is zero by softmax

    @pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "phi3"])
    @pytest.mark.parametrize("rows", [20, 4096], ids=["chunks", "one chunk"])
    def test_in_bf16_as_well_as_stock(self, family, rows, monkeypatch):
        monkeypatch.setattr(blocks, "TRAINED_ROWS", rows)
        inputs = batch(rows=3, length=40)
        exact = loss_and_gradients(tiny_model(family, dtype=torch.bfloat16).float(), **inputs)[1]
        model = tiny_model(family, dtype=torch.bfloat16)
        stock = loss_and_gradients(model, **inputs)[1]
        ours = loss_and_gradients(fused(model), **inputs)[1]
        assert all(gradient.dtype == torch.bfloat16 for gradient in ours.values())
        for part in ("norm", "proj"):
            shares = [{name: value for name, value in found.items() if part in name} for found in (ours, stock, exact)]
            assert difference(shares[0], shares[2]) <= 2 * difference(shares[1], shares[2]), part

    def test_gradients_of_several_batches_add_up(self):
        model = fused(tiny_model("llama3"))
        _, once = loss_and_gradients(model, **batch())
        model(**batch()).loss.backward()
        twice = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
        assert difference(twice, once) < 1e-6

    def test_room_is_left_for_gradients_and_moments_in_their_dtype(self, monkeypatch):
        model = accelerate(tiny_model("llama3", dtype=torch.bfloat16))
        asked = []
        monkeypatch.setattr(dial_of(model), "set_automatic", lambda budget, trainable, *_: asked.append(trainable))
        set_checkpointing(model, "auto", memory_budget=1)
        assert asked == [2 * sum(parameter.numel() for parameter in model.parameters())]

    def test_weights_without_adapters_are_not_copied(self):
        model = fused(tiny_model("qwen2"))
        loss_and_gradients(model, **batch())
        assert not model.model.layers[0].luthier_state.model.workspace.buffers


def norms_train(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return model


def one_weight_trains(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "1.self_attn.k_proj" in name or "0.mlp.down_proj" in name)
    return model


MIXTURES = {
    "norms with an adapter": lambda: norms_train(with_lora(tiny_model("qwen3"))),
    "wide norms": lambda: norms_train(with_lora(tiny_model("olmo2"))),
    "norms by name": lambda: with_lora(tiny_model("gemma3"), modules_to_save=["input_layernorm", "q_norm"]),
    "a linear layer by name": lambda: with_lora(
        tiny_model("llama3"), target_modules=["q_proj", "up_proj"], modules_to_save=["v_proj", "down_proj"]
    ),
    "the weight under an adapter": lambda: one_weight_trains(with_lora(tiny_model("llama3"))),
    "biases": lambda: with_lora(tiny_model("qwen2"), bias="all"),
    "biases of the adapters": lambda: with_biases(with_lora(tiny_model("qwen2"), lora_bias=True)),
    "one layer": lambda: with_lora(tiny_model("llama3"), target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "only A": lambda: only_a(with_lora(tiny_model("llama3"))),
}


def with_biases(model):
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def only_a(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    return model


@pytest.mark.parametrize("mixture", MIXTURES)
def test_parts_of_a_model_train_beside_an_adapter(mixture):
    truth = loss_and_gradients(MIXTURES[mixture](), **batch())
    for mode in (Mode.RECOMPUTE, Mode.KEEP):
        assert_same(fused(MIXTURES[mixture](), mode), truth)


def two_adapters(tmp_path=None):
    model = with_lora(nf4_model(tmp_path, intermediate_size=128) if tmp_path else tiny_model("llama3"))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("mode", Mode)
def test_several_active_adapters(mode):
    truth = loss_and_gradients(two_adapters(), **batch())
    assert sum("other" in name for name in truth[1]) == 2 * 2 * 3
    assert_same(fused(two_adapters(), mode), truth)


def test_several_adapters_on_4_bits(tmp_path):
    model = two_adapters(tmp_path)
    assert_same(fused(model), loss_and_gradients(model, **batch()))


class Given(nn.Module):
    """Dropout by the mask of a seed, scaled as torch does: the definition."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        return drop(x.flatten(0, -2), self.dropout).view(x.shape) / (1 - self.dropout.p)


def with_given_masks(model: nn.Module, seed: int) -> nn.Module:
    """The stock model with the masks that the fused layers draw after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    for layer in model.get_base_model().model.layers:
        found = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        for name in LINEARS:
            dropouts = getattr(found.get(name), "lora_dropout", {})
            if "default" in dropouts:
                dropouts["default"] = Given(Dropout.draw(dropouts["default"].p))
    return model


class TestDropout:
    @pytest.mark.parametrize("mode", Mode)
    @pytest.mark.parametrize("family", ["llama3", "phi3", "gemma3", "cohere2"])
    def test_it_is_that_of_the_drawn_masks(self, family, mode):
        truth = loss_and_gradients(with_given_masks(with_lora(tiny_model(family), lora_dropout=0.3), 7), **batch())
        model = fused(with_lora(tiny_model(family), lora_dropout=0.3), mode)
        torch.manual_seed(7)
        assert_same(model, truth)

    def test_on_some_layers_and_in_4_bits(self, tmp_path):
        model = with_lora(nf4_model(tmp_path, intermediate_size=128), lora_dropout=0.5, target_modules=["k_proj", "up_proj"])
        torch.manual_seed(3)
        found = loss_and_gradients(fused(model), **batch())
        truth = loss_and_gradients(with_given_masks(model, 3).apply(stock), **batch())
        torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=0)
        assert difference(found[1], truth[1]) < 2e-5

    def test_a_seed_repeats_a_run_and_no_step_repeats_another(self):
        model = fused(with_lora(tiny_model("llama3"), lora_dropout=0.1)).train()

        def losses():
            torch.manual_seed(11)
            return [model(**batch()).loss.item() for _ in range(2)]

        first, second = losses(), losses()
        assert first == second and first[0] != first[1]

    def test_its_mean_is_the_model_without_it(self):
        """As wide of it as stock's dropout is: over many masks, the mean loss differs from stock's by chance alone."""
        model = fused(with_lora(tiny_model("llama3"), lora_dropout=0.2)).train()
        stock_model = with_lora(tiny_model("llama3"), lora_dropout=0.2).train()
        inputs = {name: value[:, :8] for name, value in batch().items()}
        torch.manual_seed(0)
        with torch.no_grad():
            ours, theirs = (torch.stack([m(**inputs).loss for _ in range(60)]) for m in (model, stock_model))
        chance = (ours.var() / 60 + theirs.var() / 60).sqrt()
        assert (ours.mean() - theirs.mean()).abs() < 4 * chance
        assert 0.5 < ours.std() / theirs.std() < 2

    def test_modules_set_to_eval_drop_nothing(self):
        model = with_lora(tiny_model("llama3"), lora_dropout=0.3)
        truth = loss_and_gradients(with_lora(tiny_model("llama3")), **batch())
        accelerate(model).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert_same(model, truth)


def stock(module: nn.Module) -> None:
    """Take a module's accelerated class away."""
    module.__class__ = getattr(type(module), "_luthier_stock", type(module))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run anyway")
@pytest.mark.parametrize("kind", ["everything", "dropout"])
def test_a_whole_step_through_the_kernels(monkeypatch, kind):
    pytest.importorskip("triton")
    from triton_interpreter import interprets, repaired

    from luthier.model import fused_layer
    from luthier.ops import dropout, gated_mlp, linear_cross_entropy, lora_linear, rms_norm, rotary

    if not interprets():
        pytest.skip("TRITON_INTERPRET=1 was not set when Luthier's kernels were imported")
    inputs = {name: value[:, :5] for name, value in batch().items()}
    make = {
        "everything": lambda: tiny_model("qwen3"),
        "dropout": lambda: with_lora(tiny_model("llama3"), lora_dropout=0.2),
    }[kind]
    model = fused(make(), Mode.ALL_BUT_GATE_UP)
    torch.manual_seed(1)
    truth = loss_and_gradients(model, **inputs)
    for module in (rms_norm, rotary, gated_mlp, linear_cross_entropy, lora_linear, dropout, fused_layer):
        monkeypatch.setattr(module, "has_kernels", lambda x: True)
    torch.manual_seed(1)
    with repaired():
        assert_same(model, truth, inputs)


def test_the_trainer_trains_every_weight_as_with_stock_layers(tmp_path):
    from runs import losses, trainer

    runs = [trainer(make(tiny_model("qwen2")), tmp_path, max_steps=3) for make in (lambda model: model, accelerate)]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    start = dict(tiny_model("qwen2").named_parameters())
    assert not any(torch.equal(parameter, start[name]) for name, parameter in runs[1].model.named_parameters())
