"""Decoder layers as fused blocks: the same loss and gradients as stock, whatever a layer keeps; stock where they do not fit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import AdaLoraConfig, AdaptionPromptConfig, IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from stock_pairs import batch, difference, loss_and_gradients, nf4_model, with_lora
from tiny import FAMILIES, tiny_model
from torch.nn import Linear
from torch.nn.modules.module import register_module_forward_hook

from luthier.model import blocks, offload
from luthier.model.accelerate import accelerate, dial_of, restore
from luthier.model.backbone import find_structure
from luthier.model.blocks import Mode
from luthier.model.cost import LayerPlan
from luthier.model.fused_layer import LayerState
from luthier.model.offload import Host

WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def family_model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny model whose soft caps, if it has any, are low enough to show."""
    model = tiny_model(family, dtype=dtype)
    if family == "gemma2":
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.7
    return model


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("luthier_state"), LayerState)]


def fused(model: torch.nn.Module, mode: Mode | None = None, host: Host = Host.NOTHING) -> torch.nn.Module:
    """The model accelerated, all its layers in one mode."""
    dial = dial_of(accelerate(model))
    dial.follow_flag()
    if mode is not None:
        dial.set_plan([LayerPlan(mode, host)] * dial.layers)
    return model


@pytest.fixture(autouse=True)
def fallbacks_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stock forward")
        yield


@pytest.fixture(autouse=True)
def everything_is_parked(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 0)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """A few rows a chunk, so that small batches go through the loop over chunks too."""
    for name in ("ROWS", "KEPT_ROWS", "NARROW_ROWS"):
        monkeypatch.setattr(blocks, name, 20)


def assert_same(model, inputs, truth):
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(model, **inputs), truth
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert difference(gradients, expected_gradients) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_of_a_family_trains_as_stock(family):
    inputs = batch()
    truth = loss_and_gradients(with_lora(family_model(family)), **inputs)
    model = fused(with_lora(family_model(family)))
    for mode in Mode:
        assert_same(fused(model, mode), inputs, truth)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", [Host.NOTHING, Host.NARROW])
def test_long_batches_train_as_stock(family, host, monkeypatch):
    """One row: attention goes back a few heads at a time, q, k, v are made twice, and every copy is waited for."""
    monkeypatch.setattr(blocks, "LONG", 48)
    inputs = batch(rows=1, length=60)
    truth = loss_and_gradients(with_lora(family_model(family)), **inputs)
    model = with_lora(family_model(family))
    for mode in Mode:
        assert_same(fused(model, mode, host), inputs, truth)


@pytest.mark.parametrize(("rows", "length", "times"), [(1, 60, 2), (1, 30, 1), (2, 30, 1)])
def test_only_one_long_row_goes_back_by_heads(rows, length, times, monkeypatch):
    """Each of two key heads with its queries; several rows, or short ones, at once."""
    monkeypatch.setattr(blocks, "LONG", 48)
    heads = []
    original = blocks.attend_backward
    monkeypatch.setattr(blocks, "attend_backward", lambda *args: heads.append(args[1].shape[1]) or original(*args))
    loss_and_gradients(fused(with_lora(tiny_model("llama3"))), **batch(rows, length))
    assert len(heads) == 2 * times and len(set(heads)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_are_as_good_as_stock_ones(family):
    """With experts over several batches: a last bit may send a token to another expert, in stock as in ours."""
    exact_model = with_lora(family_model(family, dtype=torch.bfloat16)).float()
    batches = [batch(rows=3, length=40, seed=seed) for seed in range(6 if family in WITH_EXPERTS else 1)]
    exact = [loss_and_gradients(exact_model, **inputs)[1] for inputs in batches]
    model = with_lora(family_model(family, dtype=torch.bfloat16))

    def error() -> float:
        ours = [loss_and_gradients(model, **inputs)[1] for inputs in batches]
        return sum(difference(*pair) for pair in zip(ours, exact, strict=True))

    allowed = 2 * error()
    for mode in Mode:
        fused(model, mode)
        assert error() <= allowed


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"r": 3},
        {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"q_proj": 5, "gate_proj": 3}},
        {"use_rslora": True},
    ],
    ids=["q and v", "down", "odd rank", "patterns", "rslora"],
)
def test_adapters_of_all_shapes(settings, mode):
    inputs = batch()
    truth = loss_and_gradients(with_lora(tiny_model("qwen2"), **settings), **inputs)
    assert_same(fused(with_lora(tiny_model("qwen2"), **settings), mode), inputs, truth)


def attention_bias_model():
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama3")
    config.attention_bias = config.mlp_bias = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return with_lora(model.float())


@pytest.mark.parametrize("mode", Mode)
def test_biases_on_every_layer(mode):
    truth = loss_and_gradients(attention_bias_model(), **batch())
    assert_same(fused(attention_bias_model(), mode), batch(), truth)


PACKED = {"position_ids": torch.tensor([[*range(10), *range(30), *range(8)]]), "use_cache": False}
SEGMENTS = {"cu_seq_lens_q": torch.tensor([0, 10, 40, 48], dtype=torch.int32), "max_length_q": 30}
BATCHES = {
    "no mask": ("llama3", {"attention_mask": None}),
    "ones": ("llama3", {"attention_mask": torch.ones(2, 24)}),
    "right padding": ("llama3", {}),
    "left padding": ("llama3", {"attention_mask": batch()["attention_mask"].flip(1)}),
    "trained padding": ("llama3", {"labels": batch()["input_ids"]}),
    "packed": ("llama3", PACKED),
    "packed, with bounds": ("llama3", {**PACKED, **SEGMENTS}),
    "a window": ("mistral", {"attention_mask": None}),
    "a window, padded": ("mistral", {"attention_mask": batch()["attention_mask"].flip(1)}),
    "a window, packed": ("mistral", {**PACKED, **SEGMENTS}),
    "windows in some layers": ("gemma3", {"attention_mask": None}),
    "one token": ("llama3", {}),
}


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_all_kinds(kind, mode):
    family, changes = BATCHES[kind]
    inputs = {**batch(), **changes}
    if "position_ids" in inputs:
        inputs = {name: value.view(1, -1) if name in ("input_ids", "labels") else value for name, value in inputs.items()}
        inputs["labels"][:, [0, 10, 40]] = -100
        del inputs["attention_mask"]
    elif kind == "left padding" or kind == "a window, padded":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    elif kind == "one token":
        ids = inputs["input_ids"][:, :1]
        inputs = {"input_ids": ids, "labels": ids, "shift_labels": ids}
    expected = {name: value for name, value in inputs.items() if name not in SEGMENTS}
    truth = loss_and_gradients(with_lora(tiny_model(family)), **expected)
    assert_same(fused(with_lora(tiny_model(family)), mode), inputs, truth)


def test_rows_that_share_positions_are_not_one_packed_row():
    """transformers expands one row of positions to all rows of tokens; segments are those of one row."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    assert find_structure({"input_ids": torch.ones(1, 7), "position_ids": positions}).segments.longest == 4
    assert find_structure({"input_ids": torch.ones(2, 7), "position_ids": positions}) is None
    assert find_structure({"inputs_embeds": torch.ones(2, 7, 64), "position_ids": positions}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_does_not_see_its_neighbours(family):
    """Loss and gradients of a packed row are those of its sequences one by one, some longer than a window, some shorter."""
    ids, labels = batch()["input_ids"].view(1, -1), batch()["labels"].view(1, -1)
    bounds = SEGMENTS["cu_seq_lens_q"].tolist()
    labels[:, bounds[:-1]] = -100
    model = fused(with_lora(family_model(family))).train()
    losses = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        losses.append(model(input_ids=ids[:, start:end], labels=labels[:, start:end], num_items_in_batch=30).loss)
        losses[-1].backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss, together = loss_and_gradients(model, input_ids=ids, labels=labels, num_items_in_batch=30, **PACKED, **SEGMENTS)
    torch.testing.assert_close(loss, sum(losses))
    assert difference(together, apart) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_changes_nothing_behind_a_boundary(family):
    """Not one bit of what the later sequences compute, nor of the gradients that only they give, in any layer's mode."""
    ids, labels = batch()["input_ids"].view(1, -1), batch()["labels"].view(1, -1)
    labels[:, : PACKED["position_ids"].shape[1] - 8] = -100  # the last sequence alone trains
    other = ids.clone()
    other[:, 3] = ids[:, 3] % 400 + 7
    assert not torch.equal(other, ids)
    model = fused(with_lora(family_model(family)), Mode.ALL_BUT_GATE_UP)
    results = [loss_and_gradients(model, input_ids=row, labels=labels, **PACKED) for row in (ids, other)]
    assert torch.equal(results[0][0], results[1][0])
    assert difference(results[0][1], results[1][1]) < 1e-6
    with torch.no_grad():
        logits = [model.train()(input_ids=row, **PACKED).logits for row in (ids, other)]
    assert torch.equal(logits[0][:, 10:], logits[1][:, 10:]) and not torch.equal(logits[0][:, 3:10], logits[1][:, 3:10])


@pytest.mark.parametrize("mode", Mode)
def test_a_4_bit_model(tmp_path, mode):
    model = with_lora(nf4_model(tmp_path, intermediate_size=128))
    truth = loss_and_gradients(model, **batch())
    assert_same(fused(model, mode), batch(), truth)


@pytest.mark.parametrize("host", [Host.INPUT, Host.NARROW, Host.EVERYTHING])
@pytest.mark.parametrize("mode", Mode)
def test_what_waits_in_host_memory_comes_back(mode, host):
    inputs = batch()
    del inputs["attention_mask"]
    truth = loss_and_gradients(with_lora(tiny_model("llama3")), **inputs)
    model = fused(with_lora(tiny_model("llama3")), mode, host)
    assert_same(model, inputs, truth)
    losses = [model(**inputs).loss for _ in range(2)]  # two graphs alive at a time, backwards in another order
    model.zero_grad()
    losses[0].backward()
    losses[1].backward()
    twice = {name: parameter.grad / 2 for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert difference(twice, truth[1]) < 2e-5


def test_only_the_wanted_gradients_come():
    """The first layer's input needs none; with checkpointing's hook on the embeddings it does."""
    model = fused(with_lora(tiny_model("llama3")))
    _, gradients = loss_and_gradients(model, **batch())
    assert all("lora" in name for name in gradients)
    truth = loss_and_gradients(with_lora(tiny_model("llama3")), **batch())
    model.enable_input_require_grads()
    assert_same(model, batch(), truth)


def test_a_trainers_own_checkpointing_does_not_wrap_the_blocks(monkeypatch):
    model = fused(with_lora(tiny_model("llama3")))
    truth = loss_and_gradients(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers(model):
        monkeypatch.setattr(layer, "_gradient_checkpointing_func", None)  # would be called
    assert_same(model, batch(), truth)


def test_without_gradients_it_keeps_nothing():
    model = fused(with_lora(tiny_model("llama3"))).train()
    expected = model(**batch()).loss
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, expected)


def test_a_second_backward_says_why_it_cannot():
    loss = fused(with_lora(tiny_model("llama3"))).train()(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time.*restore"):
        loss.backward()


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_a_backward_over_weights_that_have_changed_is_refused(family):
    """As stock refuses it: what it reads again would be another thing than what the forward read."""
    model = fused(with_experts(family) if family in WITH_EXPERTS else with_lora(tiny_model(family))).train()
    loss = model(**batch()).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=0.0).step()  # none has a gradient: nothing is touched
    loss.backward()
    loss = model(**batch()).loss
    torch.optim.SGD(trained, lr=1e-3).step()
    with pytest.raises(RuntimeError, match=r"changed in place.*Call backward\(\) before"):
        loss.backward()


def with_experts(family):
    """Adapters on experts only, so that no other layer notices a change."""
    from luthier.model.experts import expert_stacks

    model = tiny_model(family)
    return with_lora(model, target_modules=[], target_parameters=list(expert_stacks(model)))


def test_what_is_frozen_before_the_backward_gets_no_gradient():
    """Adapters are switched between two forwards, which freezes the first one: as in stock, it gets none."""

    def losses(model):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        model.train()
        first = model(**batch()).loss
        model.set_adapter("other")
        (first + model(**batch(seed=1)).loss).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    truth, gradients = losses(with_lora(tiny_model("llama3"))), losses(fused(with_lora(tiny_model("llama3"))))
    assert all("other" in name for name in truth)
    assert difference(gradients, truth) < 2e-5


def test_gradients_accumulate():
    model = fused(with_lora(tiny_model("llama3"))).train()
    _, once = loss_and_gradients(model, **batch())
    model.zero_grad()
    for _ in range(2):
        model(**batch()).loss.backward()
    twice = {name: parameter.grad / 2 for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert difference(twice, once) < 1e-6


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_window_that_is_set_later(family):
    """transformers makes its masks of the configuration, whatever the layers were built with."""
    models = with_lora(tiny_model(family)), fused(with_lora(tiny_model(family)))
    before = loss_and_gradients(models[0], **batch())
    for model in models:
        model.get_base_model().config.sliding_window = 5
    truth = loss_and_gradients(models[0], **batch())
    assert difference(truth[1], before[1]) > 1e-3
    assert_same(models[1], batch(), truth)


def test_a_backbone_without_a_head_is_fused_too():
    """Nobody has asked for the key-value cache that its configuration would make."""
    found = []
    for model in (with_lora(tiny_model("llama3")), fused(with_lora(tiny_model("llama3")))):
        backbone = model.train().get_base_model().model
        backbone(batch()["input_ids"]).last_hidden_state.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert difference(found[1], found[0]) < 2e-5


def test_a_disabled_adapter_is_the_base_model():
    model = fused(with_lora(tiny_model("llama3"))).train()
    base = tiny_model("llama3").train()(**batch(), use_cache=False).loss
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, base, rtol=1e-5, atol=0)


def test_an_adapter_attached_later_counts():
    model = fused(tiny_model("llama3")).requires_grad_(False)
    model.train()(**batch())
    truth = loss_and_gradients(with_lora(tiny_model("llama3")), **batch())
    assert_same(with_lora(model), batch(), truth)


def test_two_models_side_by_side():
    left, right = (fused(with_lora(tiny_model(family)), Mode.RECOMPUTE) for family in ("llama3", "qwen3"))
    truths = [loss_and_gradients(with_lora(tiny_model(family)), **batch()) for family in ("llama3", "qwen3")]
    losses = [model.train()(**batch()).loss for model in (left, right)]
    for loss in losses:
        loss.backward()
    for model, (_, gradients) in zip((left, right), truths, strict=True):
        ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert difference(ours, gradients) < 2e-5


def test_a_copy_is_a_model_of_its_own():
    model = fused(with_lora(tiny_model("llama3")), Mode.RECOMPUTE, Host.NARROW)
    truth = loss_and_gradients(model, **batch())
    twin = copy.deepcopy(model)
    assert dial_of(twin) is not dial_of(model) and len({id(layer.luthier_state.model) for layer in layers(twin)}) == 1
    assert_same(twin, batch(), truth)
    restore(twin)
    assert layers(model) and not layers(twin)


def hooked(model, name="up_proj"):
    getattr(model.get_base_model().model.layers[0].mlp, name).register_forward_hook(lambda module, args, output: 2 * output)
    return model


def doubled_backward(model, name="up_proj"):
    module = getattr(model.get_base_model().model.layers[0].mlp, name)
    module.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))
    return model


def with_method(config, family="llama3", model=None):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(family) if model is None else model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def with_another_mlp(model):
    class Mlp(type(model.get_base_model().model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = Mlp
    return model


def with_another_activation(model):
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    return model


def eager(model):
    model.set_attn_implementation("eager")
    return model


def with_trained_sinks(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "sinks" in name)
    return model


FALLBACKS = {
    "DoRA": (lambda: with_lora(tiny_model("llama3"), use_dora=True), "DoRA"),
    "a hook": (lambda: hooked(with_lora(tiny_model("llama3"))), "hooks are attached"),
    "a hook on the activation": (
        lambda: hooked(with_lora(tiny_model("llama3")), "act_fn"),
        "hooks are attached to one of its SiLU",
    ),
    "a hook on Phi's": (
        lambda: hooked(with_lora(tiny_model("phi3")), "activation_fn"),
        "hooks are attached to one of its SiLU",
    ),
    "a hook on a backward": (
        lambda: doubled_backward(with_lora(tiny_model("llama3"))),
        "hooks are attached to one of its Linear",
    ),
    "another MLP": (lambda: with_another_mlp(with_lora(tiny_model("llama3"))), "its mlp is a Mlp"),
    "another activation": (lambda: with_another_activation(with_lora(tiny_model("llama3"))), "its activation is a GELU"),
    "LN tuning": (lambda: with_method(LNTuningConfig()), "a norm of kind LNTuningLayer"),
    "AdaLoRA": (
        lambda: with_method(AdaLoraConfig(r=4, total_step=10, target_modules=["q_proj", "down_proj"])),
        "an adapter of kind SVDLinear",
    ),
    "another attention": (lambda: with_lora(eager(tiny_model("llama3"))), "'eager'"),
    "trained sinks": (lambda: with_trained_sinks(with_lora(tiny_model("gpt_oss"))), "sinks are trained"),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.filterwarnings("default")
def test_what_does_not_fit_runs_stock_and_says_why_once(case):
    make, reason = FALLBACKS[case]
    truth = loss_and_gradients(make(), **batch())
    model = accelerate(make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(model, batch(), truth)
        assert_same(model, batch(), truth)
    said = [str(warning.message) for warning in caught if "stock forward" in str(warning.message)]
    assert len(said) == 1 and reason in said[0]


@pytest.mark.filterwarnings("default")
def test_an_adaption_prompt_wraps_the_attention():
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    truth = loss_and_gradients(with_method(config), **batch(), use_cache=False)
    with pytest.warns(UserWarning, match="its self_attn is a AdaptedAttention"):
        assert_same(with_method(config, model=accelerate(tiny_model("llama3"))), {**batch(), "use_cache": False}, truth)


@pytest.mark.filterwarnings("default")
def test_other_adapters_on_4_bits_run_stock(tmp_path):
    """peft calls its layer of IA3 around a 4-bit one, and others, by the name of the layer inside."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    truth = loss_and_gradients(with_method(config, model=nf4_model(tmp_path)), **batch())
    with pytest.warns(UserWarning, match="a layer of kind Linear4bit"):
        assert_same(accelerate(with_method(config, model=nf4_model(tmp_path))), batch(), truth)


@pytest.mark.parametrize("trained", ["mask", "rotation"])
@pytest.mark.filterwarnings("default")
def test_a_mask_or_a_rotation_that_trains_gets_its_gradient(trained):
    length, found = batch()["input_ids"].shape[1], []
    inputs = {name: batch()[name] for name in ("input_ids", "labels")}
    for model in (with_lora(tiny_model("llama3")).train(), accelerate(with_lora(tiny_model("llama3"))).train()):
        rotary = model.get_base_model().model.rotary_emb
        if trained == "mask":
            leaf = torch.zeros(1, 1, length, length, requires_grad=True)
            more = {"attention_mask": leaf + torch.full_like(leaf, -1e9).triu(1)}
        else:
            leaf, more = torch.tensor(1.0, requires_grad=True), {}
            stock = rotary.forward
            rotary.forward = lambda x, position_ids, f=stock, s=leaf: tuple(s * table for table in f(x, position_ids))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs, **more).loss.backward()
        found.append({"leaf": leaf.grad})
    assert any("mask or its rotation is trained" in str(warning.message) for warning in caught)
    assert found[0]["leaf"].any() and difference(found[1], found[0]) < 2e-5


@pytest.mark.filterwarnings("default")
def test_hooks_on_all_modules_are_called():
    def step(model):
        handle = register_module_forward_hook(lambda module, args, output: 1.5 * output if type(module) is Linear else None)
        try:
            return loss_and_gradients(model, **batch())
        finally:
            handle.remove()

    truth, model = step(with_lora(tiny_model("llama3"))), accelerate(with_lora(tiny_model("llama3")))
    with pytest.warns(UserWarning, match="hooks are attached to all modules"):
        loss, gradients = step(model)
    torch.testing.assert_close(loss, truth[0], rtol=1e-5, atol=0)
    assert difference(gradients, truth[1]) < 2e-5


def test_restore_takes_everything_back():
    model = fused(with_lora(tiny_model("llama3")))
    loss_and_gradients(model, **batch())
    restore(model)
    assert not layers(model)
    truth = loss_and_gradients(with_lora(tiny_model("llama3")), **batch())
    again = loss_and_gradients(model, **batch())
    assert torch.equal(again[0], truth[0]) and all(torch.equal(again[1][name], truth[1][name]) for name in truth[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run anyway")
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "olmo2", "nf4"])
def test_a_whole_step_through_the_kernels(tmp_path, monkeypatch, family):
    """Every Triton kernel in its place in a training step, interpreted."""
    pytest.importorskip("triton")
    from triton_interpreter import interprets, repaired

    from luthier.model import fused_layer
    from luthier.ops import attention, gated_mlp, linear_cross_entropy, lora_linear, nf4, rms_norm, rotary

    if not interprets():
        pytest.skip("TRITON_INTERPRET=1 was not set when Luthier's kernels were imported")
    inputs = {name: value[:, :9] for name, value in batch().items()}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).int()
    inputs["attention_mask"][1, :2] = 0  # on the left, where it cannot be left out
    inputs["labels"][1, :3] = -100
    model = with_lora(nf4_model(tmp_path, intermediate_size=128) if family == "nf4" else family_model(family))
    truth = loss_and_gradients(model, **inputs)
    fused(model, Mode.ALL_BUT_GATE_UP)
    for module in (rms_norm, rotary, gated_mlp, nf4, linear_cross_entropy, lora_linear, fused_layer):
        monkeypatch.setattr(module, "has_kernels", lambda x: True)
    monkeypatch.setattr(attention, "_has_tiles", lambda q: True)
    with repaired():
        assert_same(model, inputs, truth)
