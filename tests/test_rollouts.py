"""fast_generate: every field of SamplingParams does what it says, on padded batches, adapters included."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from luthier.model.accelerate import accelerate
from luthier.rl.engine import fast_generate, load_lora, save_lora, stop_token_ids
from luthier.rl.sampling import SamplingParams

PROMPTS = [
    "The statement",
    "An expression list is a thing that",
    "x",
    "if the name is bound to an object in the current scope, then",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat=False)


@pytest.fixture()
def model():
    return tiny_model("qwen2")


def generate(model, tokenizer, prompts=PROMPTS, lora_request=None, batch_size=32, **params):
    return fast_generate(
        model, prompts, SamplingParams(**{"max_tokens": 12, **params}), lora_request, tokenizer=tokenizer, batch_size=batch_size
    )


def tokens(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


@torch.no_grad()
def greedy_one_by_one(model, tokenizer, prompt, steps=12):
    """The reference: no batch, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


@torch.no_grad()
def next_distribution(model, tokenizer, prompt, temperature=1.0):
    return (model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double() / temperature).softmax(-1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [32, 3])
def test_greedy_on_a_padded_batch_is_greedy_one_by_one(model, tokenizer, padding_side, batch_size):
    tokenizer.padding_side = padding_side  # what the tokenizer would do must not matter
    outputs = generate(model, tokenizer, temperature=0, batch_size=batch_size)
    assert tokens(outputs) == [greedy_one_by_one(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [output.prompt for output in outputs] == PROMPTS
    reasons = {(len(output.outputs[0].token_ids) < 12, output.outputs[0].finish_reason) for output in outputs}
    assert reasons == {(True, "stop"), (False, "length")}  # one of the random model's answers ends early


def test_a_model_in_training_mode_with_dropout_samples_without_it_and_stays_in_training_mode(model, tokenizer):
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False))
    expected = tokens(generate(tuned.eval(), tokenizer, temperature=0))
    tuned.train()
    assert tokens(generate(tuned, tokenizer, temperature=0)) == expected
    assert all(module.training for module in tuned.modules())


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_greedy(model, tokenizer, narrow):
    wide = {"temperature": 2.0, **narrow}
    assert tokens(generate(model, tokenizer, seed=1, **wide)) == tokens(generate(model, tokenizer, temperature=0))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_distribution_at_the_temperature(model, tokenizer, temperature):
    count = 3000
    outputs = generate(model, tokenizer, PROMPTS[0], n=count, max_tokens=1, temperature=temperature, seed=3, batch_size=count)
    drawn = torch.bincount(torch.tensor(tokens(outputs)).flatten(), minlength=model.config.vocab_size)
    expected = count * next_distribution(model, tokenizer, PROMPTS[0], temperature)
    freedom = len(expected) - 1
    assert ((drawn - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5  # chi-square, six sigma


@pytest.mark.parametrize("top", [{"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.4}], ids=str)
def test_top_k_top_p_and_min_p_keep_the_tokens_they_say(model, tokenizer, top):
    probabilities, order = next_distribution(model, tokenizer, PROMPTS[0]).sort(descending=True)
    kept = {
        "top_k": torch.arange(len(order)) < 5,
        "top_p": probabilities.cumsum(0) - probabilities < 0.3,
        "min_p": probabilities >= 0.4 * probabilities[0],
    }[next(iter(top))]
    drawn = {
        ids[0] for ids in tokens(generate(model, tokenizer, PROMPTS[0], n=2000, max_tokens=1, seed=0, batch_size=2000, **top))
    }
    assert drawn == set(order[kept].tolist())


def test_nothing_of_the_checkpoints_generation_config_leaks_in_and_it_comes_back(model, tokenizer):
    expected = tokens(generate(model, tokenizer, seed=5))
    for name, value in {
        "top_k": 1,
        "min_p": 0.9,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 9.0,
        "max_length": 3,
    }.items():
        setattr(model.generation_config, name, value)
    assert tokens(generate(model, tokenizer, seed=5)) == expected
    assert model.generation_config.top_k == 1


def test_seeds(model, tokenizer):
    first, again, other = (tokens(generate(model, tokenizer, n=3, seed=seed, batch_size=4)) for seed in (7, 7, 8))
    assert first == again != other
    assert len({tuple(ids) for ids in first}) == len(first)  # no two batches draw the same numbers
    state = torch.get_rng_state()
    generate(model, tokenizer, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_prompt_may_have_its_own_parameters(model, tokenizer):
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (3, 5, 3, 5)]
    outputs = fast_generate(model, PROMPTS, params, tokenizer=tokenizer)
    assert [len(ids) for ids in tokens(outputs)] == [3, 5, 3, 5]
    with pytest.raises(ValueError, match="2 SamplingParams.*4 prompts"):
        fast_generate(model, PROMPTS, params[:2], tokenizer=tokenizer)


# --- where a completion ends -----------------------------------------------------------------------------------------


def test_every_stop_token_of_the_model_ends_a_completion(model, tokenizer):
    answers = tokens(generate(model, tokenizer, temperature=0))
    longest = max(range(len(answers)), key=lambda index: len(answers[index]))
    full = answers[longest]
    model.generation_config.eos_token_id = [2, full[4]]
    output = generate(model, tokenizer, temperature=0)[longest].outputs[0]
    first = full.index(full[4])
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (full[: first + 1], "stop", None)
    assert output.text == tokenizer.decode(full[:first])
    assert generate(model, tokenizer, temperature=0, ignore_eos=True)[longest].outputs[0].token_ids[: len(full)] == full
    assert len(generate(model, tokenizer, temperature=0, min_tokens=10)[longest].outputs[0].token_ids) >= 10


def test_the_templates_stop_token_ends_a_completion(model):
    tokenizer = tiny_tokenizer(chat=True)
    assert tokenizer.eos_token != "<|im_end|>"
    assert set(stop_token_ids(model, tokenizer)) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_stop_token_ids_and_stop_texts(model, tokenizer):
    full = tokens(generate(model, tokenizer, temperature=0))[3]
    by_token = generate(model, tokenizer, temperature=0, stop_token_ids=[full[3]])[3].outputs[0]
    assert (by_token.token_ids, by_token.stop_reason) == (full[: full.index(full[3]) + 1], full[3])

    text = tokenizer.decode(full)
    stop = tokenizer.decode(full[2:4])  # spans two tokens
    by_text = generate(model, tokenizer, temperature=0, stop=stop)[3].outputs[0]
    assert (by_text.text, by_text.stop_reason) == (text[: text.index(stop)], stop)
    assert len(by_text.token_ids) <= 4
    kept = generate(model, tokenizer, temperature=0, stop=stop, include_stop_str_in_output=True)[3].outputs[0]
    assert kept.text == text[: text.index(stop)] + stop


def test_the_context_bounds_a_completion(model, tokenizer):
    longest = model.config.max_position_embeddings
    prompt = {"prompt_token_ids": [5] * (longest - 4)}
    outputs = generate(model, tokenizer, [prompt, {"prompt_token_ids": [5] * (longest - 9)}], temperature=0, max_tokens=None)
    assert [len(ids) for ids in tokens(outputs)] == [4, 9]
    with pytest.raises(ValueError, match=f"Prompt 1 has {longest} tokens"):
        generate(model, tokenizer, ["x", {"prompt_token_ids": [5] * longest}])


# --- what is done to the logits --------------------------------------------------------------------------------------


def test_allowed_tokens_and_bad_words(model, tokenizer):
    allowed = [10, 20, 30]
    assert {token for ids in tokens(generate(model, tokenizer, allowed_token_ids=allowed, top_p=0.5)) for token in ids} <= set(
        allowed
    )
    full = tokens(generate(model, tokenizer, temperature=0))[0]
    word = tokenizer.decode(full[:1])
    assert tokens(generate(model, tokenizer, temperature=0, bad_words=[word]))[0][0] != full[0]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 50.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}], ids=str
)
def test_penalties_make_repetition_rarer(model, tokenizer, penalty):
    def distinct(**given):
        return sum(
            len(set(ids)) for ids in tokens(generate(model, tokenizer, n=8, max_tokens=40, temperature=0.7, seed=0, **given))
        )

    assert distinct(**penalty) > distinct()


def test_logprobs_are_the_models_own(model, tokenizer):
    outputs = generate(model, tokenizer, PROMPTS[:2], temperature=0.5, top_k=3, logprobs=2, seed=0, max_tokens=6)
    for output in outputs:
        completion = output.outputs[0]
        ids = torch.tensor([output.prompt_token_ids + completion.token_ids])
        with torch.no_grad():
            expected = model(ids).logits[0, len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
        for step, token, row in zip(completion.logprobs, completion.token_ids, expected, strict=True):
            assert step[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert step[token].rank == int((row > row[token]).sum()) + 1
            assert set(row.topk(2).indices.tolist()) <= set(step)
        total = expected.gather(1, ids[0, -len(expected) :, None]).sum().item()
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_forms_of_prompts(model):
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    forms = [text, [text], messages, [messages], {"prompt": text}, [{"prompt_token_ids": ids}], ids, [ids]]
    outputs = [generate(model, tokenizer, form, temperature=0) for form in forms]
    assert all(len(output) == 1 and output[0].prompt_token_ids == ids for output in outputs)
    assert len({tuple(tokens(output)[0]) for output in outputs}) == 1
    with pytest.raises(TypeError, match="Prompt 0 is 3.5"):
        generate(model, tokenizer, [3.5])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate(model, tokenizer, ["x", ""])


def test_a_rendered_prompt_gets_no_second_bos(model):
    tokenizer = tiny_tokenizer(chat=True, bos=True)
    output = generate(model, tokenizer, [tokenizer.bos_token + "hello", "hello"])
    assert output[0].prompt_token_ids == output[1].prompt_token_ids


# --- adapters --------------------------------------------------------------------------------------------------------


def with_adapter(model, seed):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("prepare", [accelerate, lambda model: model], ids=["accelerated", "stock"])
def test_the_active_adapter_answers_and_a_saved_one_on_request(tmp_path, tokenizer, prepare):
    tuned = prepare(with_adapter(tiny_model("qwen2"), seed=1))
    of_first = tokens(generate(tuned, tokenizer, temperature=0))
    save_lora(tuned, tmp_path / "first")
    with tuned.disable_adapter():
        of_base = tokens(generate(tuned, tokenizer, temperature=0))
    assert of_base == tokens(generate(tiny_model("qwen2"), tokenizer, temperature=0)) != of_first

    other = prepare(with_adapter(tiny_model("qwen2"), seed=2))
    frozen = next(name for name, parameter in other.named_parameters() if "lora_A" in name)
    other.get_parameter(frozen).requires_grad_(False)
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in other.named_parameters()}
    of_second = tokens(generate(other, tokenizer, temperature=0))
    assert tokens(generate(other, tokenizer, temperature=0, lora_request=load_lora(other, tmp_path / "first"))) == of_first
    assert tokens(generate(other, tokenizer, temperature=0)) == of_second != of_first
    after = dict(other.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].requires_grad == grad for name, (value, grad) in before.items())

    plain = prepare(tiny_model("qwen2"))
    assert tokens(generate(plain, tokenizer, temperature=0, lora_request=load_lora(plain, tmp_path / "first"))) == of_first
    assert tokens(generate(plain, tokenizer, temperature=0)) == of_base


def test_the_adapter_comes_back_after_an_error(tmp_path, tokenizer):
    tuned = with_adapter(tiny_model("qwen2"), seed=1)
    request = load_lora(tuned, save_lora(tuned, tmp_path / "adapter"))
    with contextlib.suppress(ZeroDivisionError):
        from luthier.rl.engine import using_adapter

        with using_adapter(tuned, request):
            assert tuned.active_adapters != ["default"]
            raise ZeroDivisionError
    assert tuned.active_adapters == ["default"] and list(tuned.peft_config) == ["default"]


def test_a_directory_without_an_adapter(tmp_path, model):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_lora(model, tmp_path)
    with pytest.raises(TypeError, match="get_peft_model"):
        save_lora(model, tmp_path / "out")
