"""``luthier demo --grpo``: its reward, and that every step runs. Whether the reward rises takes minutes: run the demo."""

from __future__ import annotations

import pytest

from luthier.demo import grpo


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("Required: a, b. Optional: c.", 1.0),
        ("Required: a, b.", 0.5),
        ("Required: b, a. Optional: c.", 0.5),
        ("Required: a. Optional: b, c.", 0.0),
        ("a, b and c", 0.0),
    ],
)
def test_the_reward(answer, reward):
    assert grpo.right_parts([answer], ["Required: a, b. Optional: c."]) == [reward]
    assert grpo.right_parts([[{"role": "assistant", "content": answer}]], ["Required: a, b. Optional: c."]) == [reward]


def test_every_step_runs(tmp_path, monkeypatch):
    few = tmp_path / "held_out.jsonl"
    few.write_text("".join(grpo.HELD_OUT.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    monkeypatch.setattr(grpo, "HELD_OUT", few)
    monkeypatch.setattr(grpo, "BEGINNER_STEPS", 1)
    monkeypatch.setattr(grpo, "STEPS", 2)
    monkeypatch.setattr(grpo, "ANSWER_TOKENS", 4)
    scores = grpo.run(tmp_path / "out")
    assert len(scores) == 6 and all(0 <= score <= 1 for score in scores.values())
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    first = grpo.read_dataset(tmp_path / "out" / "questions.jsonl")[0]
    assert first["answer"].startswith(("Required", "Optional")) and first["prompt"][-1]["role"] == "user"
