"""Masks: exactly the tokens that hold a character of an answer or its stop token, whatever the tokenizer merges."""

from __future__ import annotations

import contextlib
import functools
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, END, EOS, PAD, START, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.data.chat import CHAT_TEMPLATES, get_chat_template, template_parts
from luthier.data.masks import IGNORED, ResponseMask
from luthier.data.pieces import Pieces
from luthier.data.render import encode

# name -> (before everything, before a question, before an answer, behind an answer, its stop token)
STYLES = {
    "chatml": ("", f"{START}user\n", f"{END}\n{START}assistant\n", "\n", END),
    "alpaca": ("Below is a task.\n\n", "### Instruction:\n", "\n\n### Response:\n", "\n\n", EOS),
    "llama-2": (BOS, "[INST] ", " [/INST]", "", EOS),
    "trailing space": ("", "USER: ", " ASSISTANT: ", "", EOS),
}
PARTS = {
    "chatml": (f"{START}user\n", f"{START}assistant\n"),
    "alpaca": ("### Instruction:\n", "### Response:\n"),
    "llama-2": ("[INST] ", " [/INST]"),
    "trailing space": ("USER: ", " ASSISTANT: "),
}


@functools.cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces as ▁, a space put before the text, bytes for what it does not know: as Llama 2's tokenizer."""
    special = [PAD, BOS, EOS, START, END]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=PAD))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:30_000]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


@functools.cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    return sentencepiece_like() if name == "sentencepiece" else tiny_tokenizer()


@functools.cache
def mask_for(style: str, tokenizer: str) -> ResponseMask:
    return ResponseMask(tokenizer_named(tokenizer), *PARTS[style])


def conversation(style: str, turns: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat and the [start, end) of every answer in it, its stop token included."""
    text, before, header, behind, stop = STYLES[style][0], *STYLES[style][1:]
    spans = []
    for question, answer in turns:
        text += before + question + header
        spans.append((len(text), len(text) + len(answer) + len(stop)))
        text += answer + stop + behind
    return text, spans


def expected(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    return [any(start < its_end and end > its_start for its_start, its_end in spans) for start, end in offsets]


words = st.text(alphabet=st.sampled_from("ab cdefgh.,:#\n 12é€😀"), min_size=1, max_size=24)


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("style", list(STYLES))
@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_trains_exactly_the_tokens_of_the_answers(style, tokenizer, turns):
    text, spans = conversation(style, turns)
    encoding = tokenizer_named(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = mask_for(style, tokenizer)(encoding["input_ids"])
    trained = [label != IGNORED for label in labels]
    assert trained == expected(encoding["offset_mapping"], spans)
    assert all(label in (IGNORED, token) for label, token in zip(labels, encoding["input_ids"], strict=True))


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
@settings(deadline=None, max_examples=60)
@given(text=words)
def test_pieces_spell_the_text(tokenizer, text):
    tokenizer = tokenizer_named(tokenizer)
    text = text.translate(dict.fromkeys(map(ord, "é€😀"), "x"))  # a part of a character has no text of its own
    assert "".join(Pieces(tokenizer)(tokenizer(f"{START}{text}", add_special_tokens=False)["input_ids"])).endswith(text)


def trained_text(labels: list[int], tokenizer=None) -> str:
    tokenizer = tokenizer or tokenizer_named("bytes")
    return tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)


def ids(text: str) -> list[int]:
    return tokenizer_named("bytes")(text, add_special_tokens=False)["input_ids"]


def test_the_newline_behind_the_stop_token_does_not_train():
    text = f"{START}user\nhi{END}\n{START}assistant\nhello{END}\n{START}user\nbye{END}\n{START}assistant\nciao{END}\n"
    assert trained_text(mask_for("chatml", "bytes")(ids(text))) == f"hello{END}ciao{END}"


def test_only_the_last_response():
    text, _ = conversation("chatml", [("a", "first"), ("b", "second")])
    mask = ResponseMask(tokenizer_named("bytes"), *PARTS["chatml"], last_response_only=True)
    assert trained_text(mask(ids(text))) == f"second{END}"


def test_tool_and_system_turns_between_answers_do_not_train():
    text = (
        f"{START}system\nbe kind{END}\n{START}user\nweather?{END}\n{START}assistant\ncall{END}\n{START}tool\nsunny{END}\n"
        f"{START}assistant\nIt is sunny.{END}\n{START}system\nmore{END}\n"
    )
    assert trained_text(mask_for("chatml", "bytes")(ids(text))) == f"call{END}It is sunny.{END}"


def test_an_empty_block_of_thoughts_does_not_train_but_thoughts_do():
    text = f"{START}user\nhi{END}\n{START}assistant\n<think>\n\n</think>\n\nhello{END}\n{START}user\nhi{END}\n"
    text += f"{START}assistant\n<think>\nhm\n</think>\n\nhello{END}\n"
    mask = mask_for("chatml", "bytes")
    assert trained_text(mask(ids(text))) == f"hello{END}<think>\nhm\n</think>\n\nhello{END}"


@pytest.mark.parametrize("text", ["", "no markers at all", f"{START}user\nhi{END}\n", f"{START}assistant\n"])
def test_a_row_without_an_answer_is_masked_throughout(text):
    assert set(mask_for("chatml", "bytes")(ids(text))) <= {IGNORED}


def test_an_answer_without_a_stop_ends_before_the_next_question_or_the_padding():
    mask = mask_for("alpaca", "bytes")
    text = "### Instruction:\nq\n\n### Response:\nanswer\n\n### Instruction:\nagain\n\n### Response:\ncut off"
    assert trained_text(mask(ids(text + PAD + PAD))) == "answer\n\ncut off"


def test_a_marker_whose_newline_the_tokenizer_swallows_is_found():
    """As Phi-3's, whose special tokens take the white space behind them along."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_special_tokens(
        {
            "extra_special_tokens": [
                AddedToken(token, rstrip=True, normalized=False) for token in ("<|user|>", "<|bot|>", "<|end|>")
            ]
        }
    )
    encoded = tokenizer("<|user|>\nhi<|end|>\n<|bot|>\nhello<|end|>\n<|user|>\n")["input_ids"]
    assert trained_text(ResponseMask(tokenizer, "<|user|>\n", "<|bot|>\n")(encoded), tokenizer) == "hello<|end|>"


def test_without_a_template_a_special_token_ends_an_answer():
    tokenizer = tiny_tokenizer(chat=False)
    text = f"{START}user\nhi{END}\n{START}assistant\nhello{END}\n{START}tool\n42{END}\n"
    assert trained_text(ResponseMask(tokenizer, *PARTS["chatml"])(ids(text))) == f"hello{END}"


QUESTION, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
CALL = {"type": "function", "id": "addition1", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CONVERSATIONS = {
    "turns": [QUESTION, ANSWER, {"role": "user", "content": " and\n\n"}, {"role": "assistant", "content": "\n so? "}],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER],
    "question last": [QUESTION, ANSWER, QUESTION],
    "tools": [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "addition1", "content": "4"},
        ANSWER,
    ],
    "thoughts": [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}],
}


@pytest.mark.parametrize("name", list(dict.fromkeys(template.name for template in CHAT_TEMPLATES.values())))
@pytest.mark.parametrize("given_parts", [False, True])
def test_finds_in_the_text_what_every_template_marks(name, given_parts):
    """Text that was rendered before loses nothing against messages: the marks of the template are found by the parts."""
    stops = set(CHAT_TEMPLATES[name].stop_tokens) - {"eos_token", END}
    tokenizer = get_chat_template(tiny_tokenizer(extra_tokens=tuple(sorted(stops))), name)
    parts = template_parts(tokenizer)
    given = (parts.instruction_part, parts.response_part) if given_parts else ()
    mask, compared = ResponseMask(tokenizer, *given), 0
    for messages in CONVERSATIONS.values():
        with contextlib.suppress(ValueError):  # the template refuses a system message or tools
            encoded, trained = encode(tokenizer, messages)
            compared += 1
            assert [label != IGNORED for label in mask(encoded)] == trained
    assert compared >= 3


def test_the_parts_come_from_the_tokenizers_own_template():
    mask = ResponseMask(tiny_tokenizer())
    text, _ = conversation("chatml", [("a", "b")])
    assert trained_text(mask(ids(text))) == f"b{END}"


@pytest.mark.parametrize("parts", [("a", None), (None, "a"), ("a", "a"), ("", "a"), (" \n", "a")])
def test_parts_that_cannot_work_are_refused(parts):
    with pytest.raises(ValueError, match="instruction_part"):
        ResponseMask(tiny_tokenizer(), *parts)
