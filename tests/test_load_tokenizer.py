"""Tokenizers after loading: a pad token that hides nothing, one BOS, the same ids everywhere; and new tokens."""

import copy
import pickle
import warnings

import pytest
import tiny
import torch

from luthier.errors import UnsupportedError
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.tokenizer import repair_tokenizer
from luthier.model.vocab import add_new_tokens

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def model():
    return tiny.tiny_model("llama3")


def test_a_good_tokenizer_is_left_alone(model):
    tokenizer = tiny.tiny_tokenizer()
    repaired, changes = repair_tokenizer(tokenizer, model)
    assert repaired is tokenizer and type(repaired) is type(tiny.tiny_tokenizer())
    assert changes == [] and (tokenizer.pad_token, tokenizer.padding_side) == (tiny.PAD, "right")


@pytest.mark.parametrize("pad", [None, tiny.EOS, tiny.BOS, tiny.END])
@pytest.mark.parametrize("reserved", ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "[PAD]", "<unused3>"])
def test_a_pad_token_that_hides_something_gives_way_to_an_unused_one(model, pad, reserved):
    tokenizer = tiny.tiny_tokenizer(extra_tokens=("<tool>", reserved))
    tokenizer.pad_token = pad
    tokenizer._tokenizer.normalizer = None
    size = len(tokenizer)
    repaired, changes = repair_tokenizer(tokenizer, model)
    assert repaired.pad_token in (reserved, tiny.PAD) and len(repaired) == size
    assert repaired.pad_token_id not in repaired.encode(
        "Hello <|im_end|>" + repaired.apply_chat_template(HELLO, tokenize=False)
    )
    assert model.config.pad_token_id == model.generation_config.pad_token_id == repaired.pad_token_id
    assert len(changes) == 1 and repr(pad) in changes[0]


def without_pad_names():
    """A tokenizer whose vocabulary has nothing that could be a pad token."""
    tokenizer = tiny.tiny_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace(tiny.PAD, "<|start_of_tool|>")
    backend = type(tokenizer.backend_tokenizer).from_str(text)
    return type(tokenizer)(tokenizer_object=backend, eos_token=tiny.EOS, pad_token=tiny.EOS, chat_template=tiny.CHATML)


def test_a_new_pad_token_takes_a_row_of_a_padded_vocabulary(model):
    repaired, changes = repair_tokenizer(without_pad_names(), model)
    assert repaired.pad_token == "<|pad|>" and repaired.pad_token_id == 448
    assert model.get_input_embeddings().weight.shape[0] == 480 and "<|pad|>" in changes[0]


def test_a_full_vocabulary_grows_by_the_pad_token(model, monkeypatch):
    monkeypatch.setitem(tiny.BASE, "vocab_size", 448)
    model = tiny.tiny_model("llama3")
    repaired, _ = repair_tokenizer(without_pad_names(), model)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.vocab_size == 449 == repaired.pad_token_id + 1
    torch.testing.assert_close(rows[448], rows[:448].mean(0))


def test_the_unknown_token_may_pad(model):
    tokenizer = without_pad_names()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert repair_tokenizer(tokenizer, model)[0].pad_token == "<unk>"


def doubled():
    tokenizer = tiny.tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tiny.CHATML
    return tokenizer


def test_a_rendered_chat_gets_one_bos(model):
    text = doubled().apply_chat_template(HELLO, tokenize=False)
    assert doubled()(text).input_ids[:2] == [1, 1], "the fault"
    repaired, changes = repair_tokenizer(doubled(), model)
    right = repaired.apply_chat_template(HELLO, return_dict=False)
    assert right[0] == 1 and right[1] != 1 and "second" in changes[0]
    assert repaired(text).input_ids == repaired(text=text).input_ids == repaired.encode(text) == right
    assert repaired([text, "Hello"]).input_ids == [right, doubled()("Hello").input_ids]
    assert repaired("Hello").input_ids == doubled()("Hello").input_ids, "a plain text still gets its own"
    assert repaired(text, add_special_tokens=False).input_ids == right


def test_a_tokenizer_with_one_bos_is_still_a_tokenizer(model, tmp_path):
    repaired, _ = repair_tokenizer(doubled(), model)
    text = repaired.apply_chat_template(HELLO, tokenize=False)
    for other in (copy.deepcopy(repaired), pickle.loads(pickle.dumps(repaired))):
        assert other(text).input_ids == repaired(text).input_ids
    repaired.save_pretrained(tmp_path)
    again = type(tiny.tiny_tokenizer()).from_pretrained(tmp_path)
    assert again(text).input_ids == doubled()(text).input_ids, "what is saved is the original"
    assert type(repaired).__name__ == type(again).__name__


def test_generation_also_stops_at_the_tokenizers_eos(model):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = tiny.END
    _, changes = repair_tokenizer(tokenizer, model)
    assert model.generation_config.eos_token_id == [4, 2] and "<|im_end|>" in changes[0]


def test_repairs_are_said_once_and_can_be_switched_off(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    directory = tiny.save_tiny("llama3", tmp_path, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="repaired") as said:
        load_model(directory)
    assert len([warning for warning in said if "repaired" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tokenizer = load_model(directory, fix_tokenizer=False)
    assert tokenizer.pad_token == tokenizer.eos_token


# New tokens


@pytest.mark.parametrize("family", ["llama3", "llama3.1", "gemma3"])
def test_new_tokens_start_at_the_mean_or_between_it_and_their_pieces(family):
    for method, share in (("mean", 0.0), ("interpolation", 0.25)):
        model, tokenizer = tiny.tiny_model(family), tiny.tiny_tokenizer()
        pieces = tokenizer("<think>").input_ids
        old = [table.detach().clone() for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)]
        ids = add_new_tokens(model, tokenizer, ["<think>", "</think>"], method=method, interpolation=0.25)
        assert tokenizer("<think>").input_ids == ids[:1] == [448] and len(pieces) > 1
        assert not tokenizer.added_tokens_decoder[448].normalized  # a SentencePiece tokenizer would find it behind spaces only
        for before, now in zip(old, (model.get_input_embeddings().weight, model.get_output_embeddings().weight), strict=True):
            mean = before[:448].mean(0)
            torch.testing.assert_close(now[448], share * before[pieces].mean(0) + (1 - share) * mean)
            assert torch.equal(now[:448], before[:448])


def test_new_tokens_train_and_a_padded_vocabulary_is_not_made_smaller(model):
    tokenizer = tiny.tiny_tokenizer()
    add_new_tokens(model, tokenizer, ["<think>"])
    assert model.get_input_embeddings().weight.shape[0] == 480
    trainable = {name for name, p in get_peft_model(model, r=2).named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in trainable} == {"embed_tokens", "lm_head"}


def test_many_new_tokens_make_the_vocabulary_grow(model):
    ids = add_new_tokens(model, tiny.tiny_tokenizer(), [f"<{number}>" for number in range(50)])
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == max(ids) + 1 == 498


def test_wrong_new_tokens_are_named(model):
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(ValueError, match="Already in the vocabulary: '<|im_end|>'".replace("|", r"\|")):
        add_new_tokens(model, tokenizer, ["<think>", "<|im_end|>"])
    with pytest.raises(TypeError, match="list of non-empty strings"):
        add_new_tokens(model, tokenizer, "<think>")
    with pytest.raises(TypeError, match="must be a list"):
        add_new_tokens(model, tokenizer, [])
    with pytest.raises(ValueError, match="'median'.*Allowed: interpolation, mean"):
        add_new_tokens(model, tokenizer, ["<think>"], method="median")
    with pytest.raises(ValueError, match="between 0 and 1"):
        add_new_tokens(model, tokenizer, ["<think>"], method="interpolation", interpolation=2)
    assert len(tokenizer) == 448, "nothing was added"
    with pytest.raises(UnsupportedError, match="before get_peft_model"):
        add_new_tokens(get_peft_model(model, r=2), tokenizer, ["<think>"])
