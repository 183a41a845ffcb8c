"""Word and character error rates against hand-counted ones, and failures that must not improve a score."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from tiny_vision import picture, picture_row, tiny_processor, tiny_vision_model

from luthier.evaluation import ocr as ocr_module
from luthier.evaluation.ocr import CUT, EMPTY, NO_IMAGE, REFUSED, Normalisation, compare, ocr

AS_WRITTEN = Normalisation()


@functools.cache
def model_and_processor():
    return tiny_vision_model("qwen2_5_vl"), tiny_processor("qwen2_5_vl")


def test_rates_are_over_the_whole_set():
    references = ["the quick brown fox jumps", "a"]
    report = compare(references, [("the quick brown dog jumps", None), ("b", None)], AS_WRITTEN)
    assert report.wer == pytest.approx(2 / 6)  # not the mean of 1/5 and 1
    assert report.cer == pytest.approx(3 / 26)  # f-o-x -> d-o-g is two letters, a -> b one
    assert [sample.wer for sample in report.samples] == pytest.approx([1 / 5, 1])
    assert report.exact == 0 and report.failures == {}


def test_deletions_and_insertions_count():
    assert compare(["one two"], [("one", None)], AS_WRITTEN).wer == 1 / 2
    assert compare(["one two"], [("one two three four five", None)], AS_WRITTEN).wer == 3 / 2


def test_normalisation_does_what_it_says_and_is_reported():
    answers = [("HELLO,  World!", None)]
    assert compare(["Hello, world!"], answers, AS_WRITTEN).exact == 0
    assert compare(["Hello, world!"], answers, Normalisation(lowercase=True)).exact == 1
    assert compare(["hello world"], answers, Normalisation(lowercase=True, strip_punctuation=True)).exact == 1
    assert compare(["a  b\n"], [(" a b", None)], AS_WRITTEN).exact == 1
    assert compare(["ﬁne"], [("fine", None)], AS_WRITTEN).exact == 1
    report = compare(["a"], [("a", None)], Normalisation(lowercase=True))
    assert report.to_dict()["normalisation"] == {"lowercase": True, "strip_punctuation": False}
    assert json.loads(json.dumps(report.to_dict()))["samples"][0]["answer"] == "a"


def test_an_empty_answer_is_a_failure_and_all_deletions():
    report = compare(["one two", "three"], [("", None), ("three", None)], AS_WRITTEN)
    assert report.wer == pytest.approx(2 / 3)
    assert report.failures == {EMPTY: 1}


def test_a_reference_without_words_is_refused():
    with pytest.raises(ValueError, match=r"Rows \[2\]"):
        compare(["a", " . "], [("a", None), ("b", None)], Normalisation(strip_punctuation=True))


def test_failures_are_counted_and_score_as_empty_answers():
    model, processor = model_and_processor()
    broken = {"messages": picture_row(0)["messages"], "images": []}
    broken["messages"][0]["content"][0] = {"type": "image", "image": "no/such/file.png"}
    textual = {"messages": [{"role": "user", "content": "read"}, {"role": "assistant", "content": "word"}]}
    report = ocr(model, processor, [picture_row(1, "a cat"), broken, textual], max_new_tokens=2)
    assert [sample.failure for sample in report.samples][1:] == ["unreadable image (FileNotFoundError)", NO_IMAGE]
    assert [(sample.answer, sample.wer) for sample in report.samples[1:]] == [("", 1), ("", 1)]
    assert report.failures[NO_IMAGE] == 1


def test_a_picture_that_the_processor_refuses_costs_only_its_own_row():
    model, processor = model_and_processor()
    rows = [picture_row(0, "a cat"), picture_row(1, "a line", (300, 1)), picture_row(2, "a dog")]
    report = ocr(model, processor, rows, max_new_tokens=3)
    alone = ocr(model, processor, rows[::2], max_new_tokens=3)
    assert report.samples[1].failure == REFUSED
    assert report.samples[::2] == alone.samples


def test_pictures_are_opened_a_batch_at_a_time(monkeypatch):
    model, processor = model_and_processor()
    happened = []
    load, generate = ocr_module.load_image, model.generate
    monkeypatch.setattr(ocr_module, "load_image", lambda *args: happened.append("open") or load(*args))
    monkeypatch.setattr(model, "generate", lambda **inputs: happened.append("read") or generate(**inputs))
    ocr(model, processor, [picture_row(seed) for seed in range(3)], max_new_tokens=1, batch_size=2)
    assert happened == ["open", "open", "read", "open", "read"]


def test_answers_are_greedy_the_same_in_any_batch_and_leave_the_mode_alone():
    model, processor = model_and_processor()
    rows = [picture_row(seed, "a cat", (32 + 16 * seed, 32)) for seed in range(3)]
    model.train()
    together = ocr(model, processor, rows, max_new_tokens=5, batch_size=3, resize=None)
    assert model.training
    model.eval()
    alone = ocr(model, processor, rows, max_new_tokens=5, batch_size=1, resize=None)
    assert [sample.answer for sample in together.samples] == [sample.answer for sample in alone.samples]
    for row, sample in zip(rows, alone.samples, strict=True):
        text = processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=[row["messages"][0]["content"][0]["image"]], return_tensors="pt")
        stock = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample.answer == AS_WRITTEN(processor.decode(stock, skip_special_tokens=True))


def test_an_answer_that_was_cut_says_so():
    model, processor = model_and_processor()
    report = ocr(model, processor, [picture_row(0, "a cat")], max_new_tokens=1)
    assert report.samples[0].failure in (CUT, EMPTY)


def test_a_model_that_learnt_to_read_scores_nought():
    model, processor = tiny_vision_model("qwen2_5_vl", seed=1), tiny_processor("qwen2_5_vl")
    from luthier.data.vision import VisionDataCollator

    rows = [picture_row(0, "cat"), picture_row(1, "dog")]
    batch = VisionDataCollator(model, processor, train_on_responses_only=True)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    report = ocr(model, processor, rows, max_new_tokens=8)
    assert (report.wer, report.cer, report.exact, report.failures) == (0, 0, 1, {})


@pytest.mark.parametrize(
    "rows, arguments, words",
    [
        ([], {}, "number of rows"),
        ([picture_row(0)], {"max_new_tokens": 0}, "max_new_tokens"),
        ([picture_row(0)], {"batch_size": 0}, "batch_size"),
        ([{"image": picture(0)}], {}, "known format"),
        ([picture_row(0), {"messages": picture_row(0)["messages"][::-1]}], {}, "row 2: its last message"),
    ],
)
def test_bad_input(rows, arguments, words):
    model, processor = model_and_processor()
    with pytest.raises(ValueError, match=words):
        ocr(model, processor, rows, **arguments)
