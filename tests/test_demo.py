"""The main demo: its model and rows are what they say, and the pipeline runs from end to end."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from luthier.data.read import read_dataset
from luthier.demo import corpus, llama_cpp, sft

MEGABYTE = 10**6


def test_the_base_is_small_and_documented():
    weights = sft.BASE / "model.safetensors"
    assert weights.stat().st_size < 20 * MEGABYTE
    record = json.loads((sft.BASE / "training.json").read_text())
    with safe_open(weights, "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())
    assert parameters == record["parameters"]
    assert record["loss"][-1][1] < record["loss"][0][1]
    assert {"recipe", "corpus", "device", "torch"} <= record.keys()


def test_held_out_rows_are_held_out():
    train, held_out = (read_dataset(path) for path in (sft.TRAIN, sft.HELD_OUT))
    asked = {row["messages"][0]["content"] for row in train}
    assert len(asked) == len(train) == 400 and len(held_out) == 100
    assert not asked & {row["messages"][0]["content"] for row in held_out}


def test_the_rows_are_made_by_the_recipe():
    """Of this Python's library, where the committed rows are of another's: most functions are in both."""
    row = next(iter(corpus.chat_rows(held=True, limit=1)))
    question, answer = (message["content"] for message in row["messages"])
    assert question.startswith(corpus.QUESTION.split("{")[0])
    assert answer.startswith(("Required: ", "Optional: "))
    made = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in corpus.chat_rows(False, 10**6)}
    committed = [row["messages"] for row in read_dataset(sft.TRAIN)]
    same = [made[question["content"]] == answer["content"] for question, answer in committed if question["content"] in made]
    assert all(same) and len(same) > 200


def test_held_out_modules_are_not_read():
    documents = set(corpus.documents())
    read = {name for name, source in corpus.modules() if source in documents and source.strip()}
    assert read and not any(corpus.held_out(name) for name in read)


def test_renaming_is_consistent_and_keeps_the_language():
    import random

    text = "def area(radius):\n    return radius ** 2 if radius else None\n"
    renamed = corpus.renamed(text, ["aaa", "bbb", "ccc", "ddd"], random.Random(0))
    name, argument = renamed[4:7], renamed[8:11]
    assert renamed == f"def {name}({argument}):\n    return {argument} ** 2 if {argument} else None\n"


def test_the_pipeline_runs(tmp_path, monkeypatch):
    """The demo with two steps and four rows: every stage is there, and the answers of the last three agree."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(Path(sft.HELD_OUT).read_text().splitlines(keepends=True)[:4]))
    monkeypatch.setattr(sft, "HELD_OUT", rows)
    monkeypatch.setattr(sft, "SMALL", sft.SMALL | {"max_steps": 2, "per_device_train_batch_size": 4})
    scores = sft.run(tmp_path / "out")
    assert list(scores)[:3] == ["base", "adapter", "merged, in plain transformers"]
    assert ("GGUF q8_0, in llama.cpp" in scores) == llama_cpp.available()
    written = json.loads((tmp_path / "out" / "written.json").read_text())
    assert set(written) == {"adapter", "merged_16bit", "q8_0"}
    assert all(Path(path).exists() for path in written.values())
    assert Path(written["q8_0"] + ".proof.json").exists()


def test_exact_counts_to_the_letter():
    rows = read_dataset(sft.HELD_OUT).select(range(2))
    right = [row["messages"][-1]["content"] for row in rows]
    assert sft.exact(rows, right) == 1.0
    assert sft.exact(rows, [right[0] + " ", right[1][:-1]]) == 0.5
    with pytest.raises(ValueError):
        sft.exact(rows, right[:1])
