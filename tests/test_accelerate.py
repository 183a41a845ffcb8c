"""One model made fast: same loss, same gradients, same logits as stock, on this instance only, and undone by one call."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from stock_pairs import assert_alike, batch, difference, loss_and_gradients, nf4_model, with_lora
from tiny import FAMILIES, VOCAB, tiny_model
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

from luthier.errors import UnsupportedError
from luthier.model.accelerate import accelerate, is_accelerated, restore
from luthier.model.checkpointing import set_checkpointing
from luthier.model.head import LazyLogits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_stock_does_and_comes_back(family):
    inputs = batch()
    model = tiny_model(family)
    other = tiny_model(family, seed=1)
    keys, logits = list(model.state_dict()), model(input_ids=inputs["input_ids"]).logits
    stock = loss_and_gradients(model, **inputs)
    other_loss = other(**inputs).loss

    assert accelerate(model) is model and is_accelerated(model)
    assert_alike(loss_and_gradients(model, **inputs), stock)
    assert list(model.state_dict()) == keys
    assert type(model).__name__ == type(other).__name__ and isinstance(model, type(other))
    model.eval()
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, logits)
    assert torch.equal(other(**inputs).loss, other_loss), "another model of the process was touched"

    restore(model)
    assert type(model) is type(other)
    again = loss_and_gradients(model, **inputs)
    assert torch.equal(again[0], stock[0]) and difference(again[1], stock[1]) == 0


@pytest.mark.parametrize("family", ["llama3", "gemma2", "cohere2", "granite", "qwen3_moe"])
def test_bf16_gradients_are_as_good_as_stock_ones(family):
    inputs = batch()
    exact = tiny_model(family, dtype=torch.bfloat16).float()
    _, truth = loss_and_gradients(exact, **inputs)
    model = tiny_model(family, dtype=torch.bfloat16)
    stock_loss, stock = loss_and_gradients(model, **inputs)
    loss, fast = loss_and_gradients(accelerate(model), **inputs)
    assert loss.dtype == torch.float32
    assert difference(fast, truth) <= 2 * difference(stock, truth)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi3", "gpt_oss"])
@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_an_adapter_may_come_before_or_after(family, first):
    inputs = batch()
    stock_loss, stock = loss_and_gradients(with_lora(tiny_model(family)), **inputs)
    model = tiny_model(family)
    model = accelerate(with_lora(model)) if first == "adapter" else accelerate(with_lora(accelerate(model)))
    loss, gradients = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert difference(gradients, stock) < 1e-5
    restore(model)
    again, again_gradients = loss_and_gradients(model, **inputs)
    assert torch.equal(again, stock_loss) and all(torch.equal(again_gradients[name], stock[name]) for name in stock)


@pytest.mark.parametrize("mode", [True, "offload", "unsloth", "auto"])
def test_checkpointing_changes_neither_loss_nor_gradients(mode):
    inputs = batch()
    stock = loss_and_gradients(with_lora(tiny_model("qwen3")), **inputs)
    model = set_checkpointing(accelerate(with_lora(tiny_model("qwen3"))), mode)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # what a trainer's own flag does
    assert_alike(loss_and_gradients(model, **inputs), stock)
    set_checkpointing(model, False)
    assert not model.get_base_model().is_gradient_checkpointing


def test_an_unknown_checkpointing_mode_is_an_error():
    with pytest.raises(ValueError, match="offlod.*offload"):
        set_checkpointing(tiny_model("llama3"), "offlod")


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gpt_oss"])
def test_generate_is_untouched(family):
    ids = batch()["input_ids"][:, :7]
    model = tiny_model(family)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.train().generate(ids, max_new_tokens=8, do_sample=False), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected), "it lost its cache"


def test_a_4_bit_model_trains_as_stock_does(tmp_path):
    inputs = batch()
    model = with_lora(nf4_model(tmp_path, intermediate_size=128))
    stock = loss_and_gradients(model, **inputs)
    assert_alike(loss_and_gradients(accelerate(model), **inputs), stock, within=1e-4)


def test_accelerate_is_idempotent():
    model = accelerate(tiny_model("llama3"))
    classes = [type(module) for module in model.modules()]
    accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    restore(restore(model))
    assert not is_accelerated(model)


def test_an_unknown_architecture_stays_stock_and_says_so_once():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.warns(UserWarning, match="gpt2.*Described:.*llama"):
        accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model)
    assert not is_accelerated(model)


def test_a_known_family_without_its_layers_is_an_error():
    model = tiny_model("llama3")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="LlamaDecoderLayer"):
        accelerate(model)


def test_something_else_than_a_model_is_an_error():
    with pytest.raises(TypeError, match="Linear"):
        accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_without_a_token_is_an_error(shape):
    """Stock says "cannot reshape tensor of 0 elements"."""
    model, ids = accelerate(with_lora(tiny_model("llama3"))).train(), torch.zeros(shape, dtype=torch.long)
    for masks in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match=re.escape(f"no token: its labels are of shape {shape}")):
            model(input_ids=ids, labels=ids, **masks)


def test_save_pretrained_names_the_stock_class(tmp_path):
    model = accelerate(tiny_model("llama3"))
    model.save_pretrained(tmp_path)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()


class TestOutput:
    """What a model gives back in training mode."""

    @pytest.fixture()
    def pair(self):
        """The outputs of a stock and of an accelerated model for the same batch."""
        stock = tiny_model("gemma2").train()(**batch(), output_hidden_states=True)
        model = accelerate(tiny_model("gemma2")).train()
        return stock, model(**batch(), output_hidden_states=True), model

    def test_logits_are_computed_when_read(self, pair):
        stock, output, _ = pair
        assert isinstance(dict.__getitem__(output, "logits"), LazyLogits)
        seen = batch()["attention_mask"].bool()
        torch.testing.assert_close(output.logits[seen], stock.logits[seen])
        assert isinstance(output, type(stock)) and output.logits.requires_grad

    @pytest.mark.parametrize(
        "read",
        [lambda o: o["logits"], lambda o: o.get("logits"), lambda o: o[1], lambda o: o.to_tuple()[1], lambda o: o[:2][1]],
    )
    def test_every_way_of_reading_them_works(self, pair, read):
        _, output, _ = pair
        assert torch.equal(read(output), output.logits)
        assert torch.equal(output[0], output.loss)

    def test_what_is_not_there_is_not_got(self, pair):
        _, output, _ = pair
        assert output.get("attentions") is None and output.get("attentions", 5) == 5

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_they_have_a_gradient_wherever_they_are_read_first(self, mode):
        found, seen = [], batch()["attention_mask"].bool()
        for model in (tiny_model("llama3").train(), accelerate(tiny_model("llama3")).train()):
            output = model(**batch())
            with mode():
                assert output.logits.argmax(-1).shape == seen.shape
            output.logits[seen].square().mean().backward()
            found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert difference(found[1], found[0]) < 1e-5

    def test_they_are_those_of_the_forwards_autocast(self):
        outputs = []
        for model in (tiny_model("llama3"), accelerate(tiny_model("llama3"))):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(model.train()(**batch()))
        seen = batch()["attention_mask"].bool()
        assert outputs[1].logits.dtype == outputs[0].logits.dtype == torch.bfloat16
        torch.testing.assert_close(outputs[1].logits[seen], outputs[0].logits[seen], atol=0.05, rtol=0.05)

    def test_a_head_that_has_been_trained_since_is_said(self, pair):
        _, output, model = pair
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.warns(UserWarning, match="before the optimizer's step"):
            assert output.logits.shape[:2] == batch()["labels"].shape

    def test_mapping_over_tensors_does_not_compute_them(self, pair):
        from accelerate.utils.operations import convert_to_fp32

        _, output, _ = pair
        leaves, structure = pytree.tree_flatten(output)
        assert any(isinstance(leaf, LazyLogits) for leaf in leaves)
        for mapped in (convert_to_fp32(output), pytree.tree_unflatten(leaves, structure)):
            assert isinstance(dict.__getitem__(mapped, "logits"), LazyLogits)
            assert mapped.loss is output.loss or torch.equal(mapped.loss, output.loss)

    def test_hidden_states_are_those_of_stock(self, pair):
        """Where there is a token: nothing depends on what stands in the padding."""
        stock, output, _ = pair
        seen = batch()["attention_mask"].bool()
        for ours, theirs in zip(output.hidden_states, stock.hidden_states, strict=True):
            torch.testing.assert_close(ours[seen], theirs[seen])

    def test_a_copy_is_a_stock_output(self, pair):
        stock, output, _ = pair
        output.loss = output.loss.detach()
        output.hidden_states = None
        del_graph = {name: output[name].detach() for name in ("loss", "logits")}
        assert type(copy.copy(CausalLMOutputWithPast(**del_graph))) is CausalLMOutputWithPast
        assert type(copy.copy(output)) is type(stock)

    def test_return_dict_false_gives_a_tuple(self, pair):
        stock, _, model = pair
        loss, logits = model(**batch(), return_dict=False)[:2]
        assert logits.shape == stock.logits.shape
        torch.testing.assert_close(loss, stock.loss)

    def test_positional_arguments(self, pair):
        stock, _, model = pair
        inputs = batch()
        output = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
        torch.testing.assert_close(output.loss, stock.loss)

    def test_eval_mode_and_no_labels_give_real_logits(self, pair):
        _, _, model = pair
        without = model(input_ids=batch()["input_ids"])
        assert isinstance(dict.__getitem__(without, "logits"), torch.Tensor) and without.loss is None
        assert isinstance(dict.__getitem__(model.eval()(**batch()), "logits"), torch.Tensor)


class TestLoss:
    """The arguments of transformers' loss, on the accelerated head."""

    def both(self, family="llama3", **extra):
        inputs = {**batch(), **extra}
        return loss_and_gradients(tiny_model(family), **inputs), loss_and_gradients(accelerate(tiny_model(family)), **inputs)

    @pytest.mark.parametrize(
        "extra",
        [
            {"num_items_in_batch": torch.tensor(77)},
            {"num_items_in_batch": 77},
            {"ignore_index": 7},
            {"shift_labels": batch(seed=3)["labels"]},
        ],
        ids=lambda extra: next(iter(extra)),
    )
    def test_loss_arguments(self, extra):
        if "ignore_index" in extra:
            extra = {**extra, "labels": batch()["labels"].masked_fill(batch()["labels"] == -100, 7)}
        stock, fast = self.both(**extra)
        assert_alike(fast, stock)

    def test_a_head_within_another_module(self):
        """As recipes wrap it to get logits in fp32."""
        models = tiny_model("llama3"), accelerate(tiny_model("llama3"))
        for model in models:
            model.lm_head = torch.nn.Sequential(model.lm_head)
        (loss, gradients), (fast_loss, fast) = (loss_and_gradients(model, **batch()) for model in models)
        torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=0)
        assert difference(fast, gradients) < 1e-5

    def test_no_valid_label_is_a_differentiable_zero(self):
        model = accelerate(with_lora(tiny_model("llama3"))).train()
        loss = model(**{**batch(), "labels": torch.full_like(batch()["labels"], -100)}).loss
        loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_router_loss_is_included(self):
        stock, fast = self.both("qwen3_moe", output_router_logits=True)
        plain = loss_and_gradients(tiny_model("qwen3_moe"), **batch())
        assert stock[0] != plain[0]
        assert_alike(fast, stock)

    @pytest.mark.parametrize("head", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
    def test_a_trained_head(self, head):
        stock = loss_and_gradients(with_lora(tiny_model("llama3"), **head), **batch())
        fast = loss_and_gradients(accelerate(with_lora(tiny_model("llama3"), **head)), **batch())
        assert any("lm_head" in name for name in fast[1])
        assert_alike(fast, stock)

    def test_trained_tokens_of_a_tied_head(self):
        settings = {"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]}
        stock = loss_and_gradients(with_lora(tiny_model("qwen3"), **settings), **batch())
        fast = loss_and_gradients(accelerate(with_lora(tiny_model("qwen3"), **settings)), **batch())
        assert any("trainable_tokens" in name for name in fast[1])
        assert_alike(fast, stock)

    def test_positions_with_a_mask_are_those_of_one_sequence(self):
        """As in transformers: only without a mask do positions that start again mean another sequence."""
        row = {name: value[:1] for name, value in batch().items()}
        row["position_ids"] = torch.arange(12).repeat(2)[None]
        stock, fast = self.both(**row)
        assert_alike(fast, stock)

    def test_hidden_states_that_were_asked_for_are_right_in_the_padding_too(self):
        models = tiny_model("llama3").train(), accelerate(tiny_model("llama3")).train()
        stock, fast = (model(**batch(), output_hidden_states=True) for model in models)
        for ours, theirs in zip(fast.hidden_states, stock.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.filterwarnings("error:.*stock forward")
    def test_a_loss_of_the_logits_takes_fused_layers(self):
        """Without use_cache=False too: nobody trains with a cache that he did not ask for."""
        inputs = {name: value for name, value in batch().items() if name != "labels"}

        def gradients(model):
            output = model(**inputs)
            output.logits[inputs["attention_mask"].bool()].logsumexp(-1).mean().backward()
            return output.past_key_values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        _, stock = gradients(with_lora(tiny_model("llama3")).train())
        cache, fast = gradients(accelerate(with_lora(tiny_model("llama3"))).train())
        assert cache is None and difference(fast, stock) < 1e-5

    def test_a_loss_function_of_the_user_is_honoured(self):
        model = accelerate(tiny_model("llama3")).train()
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().mean()
        output = model(**batch())
        assert torch.equal(output.loss, output.logits.mean())

    def test_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (loss, gradients), (fast_loss, fast) = self.both()
        torch.testing.assert_close(fast_loss, loss, rtol=1e-2, atol=0)
        assert fast.keys() == gradients.keys()

    def test_packed_rows_do_not_see_each_other(self):
        """position_ids that start again mark a new sequence; stock training with its default cache ignores them."""
        ids = batch()["input_ids"]
        model = accelerate(tiny_model("llama3")).train()
        apart = [model(input_ids=row[None], labels=row[None], num_items_in_batch=46).loss for row in ids]
        labels = ids.clone()
        labels[:, 0] = -100
        positions = torch.arange(24).repeat(2)[None]
        packed = model(input_ids=ids.view(1, -1), position_ids=positions, labels=labels.view(1, -1), num_items_in_batch=46).loss
        torch.testing.assert_close(packed, sum(apart))


def test_trl_fused_head_still_works():
    from trl.trainer.utils import add_fused_lm_head

    stock, model = tiny_model("gemma2").train(), accelerate(tiny_model("gemma2")).train()
    for each in (stock, model):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "is_top1"))
    expected, output = stock(**batch(), fused_lm_head=True), model(**batch(), fused_lm_head=True)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.log_probs, expected.log_probs)
    torch.testing.assert_close(model(**batch()).loss, expected.loss)


def tiny_vlm(model_type: str) -> torch.nn.Module:
    """A random vision-language model, to be trained on text rows."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"final_logit_softcapping": 3.0} if model_type == "gemma3" else {}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}} if model_type.startswith("qwen") else {}
    text |= {"cross_attention_layers": [1]} if model_type == "mllama" else {}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision |= {"depth": 1, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 64} if model_type.startswith("qwen") else {}
    default = AutoConfig.for_model(model_type)
    text["model_type"], vision["model_type"] = default.get_text_config().model_type, default.vision_config.model_type
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, image_token_id=3, image_token_index=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "mistral3", "llava", "gemma3", "internvl", "smolvlm"]
)
def test_vision_language_models_train_as_stock_does(model_type):
    extra = {"token_type_ids": torch.zeros_like(batch()["input_ids"])} if model_type == "gemma3" else {}
    stock = loss_and_gradients(tiny_vlm(model_type), **batch(), **extra)
    model = accelerate(tiny_vlm(model_type))
    assert is_accelerated(model)
    assert_alike(loss_and_gradients(model, **batch(), **extra), stock)


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_it_as_it_trains_stock(tmp_path, packing):
    """The unchanged SFTTrainer on both models, packed rows included: the same losses step by step."""
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": (ids := list(range(5 + n, 40 + 2 * n))), "labels": ids} for n in range(8)])
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        logging_steps=1, save_strategy="no", bf16=False, use_cpu=True, max_length=64, packing=packing, disable_tqdm=True,
    )  # fmt: skip
    losses = []
    for model in (with_lora(tiny_model("llama3")), accelerate(with_lora(tiny_model("llama3")))):
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_trl_grpo_runs_on_it(tmp_path):
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=6,
        report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    model = accelerate(with_lora(tiny_model("qwen3")))
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **columns: [float(len(set(completion))) for completion in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "How much is 2 plus 2?"}] * 2),
        processing_class=tiny_tokenizer(),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert is_accelerated(model)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def low_cap(model):
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    return model


def test_soft_caps_hold_in_training_and_evaluation_whatever_transformers_would_do():
    """transformers' sdpa drops them without a word; eager, its only exact way, is what ours must equal."""
    exact = low_cap(tiny_model("gemma2"))
    model = low_cap(tiny_model("gemma2"))
    if not model._supports_sdpa:
        pytest.skip("this transformers refuses sdpa for it")
    model.set_attn_implementation("sdpa")
    without = model(**batch()).logits
    with pytest.warns(UserWarning, match="soft caps"):
        accelerate(model)
    seen = batch()["attention_mask"].bool()
    capped = exact(**batch()).logits
    torch.testing.assert_close(model(**batch()).logits[seen], capped[seen])
    assert (without - capped)[seen].abs().max() > 1e-3
    truth = loss_and_gradients(with_lora(exact), **batch())
    loss, gradients = loss_and_gradients(with_lora(model), **batch())
    torch.testing.assert_close(loss, truth[0], rtol=1e-5, atol=0)
    assert difference(gradients, truth[1]) < 1e-5
    restore(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_our_attention_under_transformers_interface(family):
    """Evaluation, training of all weights (sinks too), and generation with a cache: as eager, with less memory."""
    from luthier.model.attention_interface import implementation_for

    eager, ours = tiny_model(family), tiny_model(family)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation(implementation_for(ours.config))
    seen = batch()["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch()).logits[seen], eager(**batch()).logits[seen])
    (loss, gradients), (expected, truth) = (loss_and_gradients(model, **batch()) for model in (ours, eager))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert difference(gradients, truth) < 1e-5 and (family == "gemma2" or any("sinks" in name for name in truth))
    prompt = batch()["input_ids"][:1]
    settings = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.eval().generate(prompt, **settings), eager.eval().generate(prompt, **settings))


def test_packed_rows_of_gpt_oss_do_not_see_each_other_under_our_attention():
    """Its own mask leaves the positions out, so that they do in stock."""
    from luthier.model.attention_interface import implementation_for

    model, ids = tiny_model("gpt_oss"), batch()["input_ids"]
    model.set_attn_implementation(implementation_for(model.config))
    packed = {"position_ids": torch.arange(24).repeat(2)[None], "use_cache": False, "max_length_q": 24, "max_length_k": 24}
    packed |= {name: torch.tensor([0, 24, 48], dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    together = model(input_ids=ids.view(1, -1), **packed).logits.view(2, 24, -1)
    torch.testing.assert_close(together, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_our_attention_packs_any_model_without_a_dense_mask(family):
    """By name, for layers that stay stock: rows with bounds, padding, and no mask at all are what sdpa computes."""
    from luthier.model.attention_interface import NAME, implementation_for

    stock, ours = tiny_model(family), tiny_model(family)
    assert implementation_for(ours.config) is None  # not by itself
    ours.set_attn_implementation(NAME)
    row = {"input_ids": batch()["input_ids"].view(1, -1), "position_ids": torch.arange(24).repeat(2)[None], "use_cache": False}
    bounds = {f"cu_seq_lens_{side}": torch.tensor([0, 24, 48], dtype=torch.int32) for side in "qk"}
    bounds |= {"max_length_q": 24, "max_length_k": 24}
    torch.testing.assert_close(ours(**row, **bounds).logits, stock(**row).logits)
    assert torch.equal(ours(**batch()).logits, stock(**batch()).logits)


def test_replicas_of_data_parallel_are_refused():
    """They would share one batch's structure between threads: packed rows would train on their neighbours, now and then."""
    model = accelerate(tiny_model("llama3")).train()
    replica = model.model._replicate_for_data_parallel()
    with pytest.raises(UnsupportedError, match="torchrun"):
        replica(**{name: value for name, value in batch().items() if name != "labels"})
