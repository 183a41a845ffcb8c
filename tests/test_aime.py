"""AIME scores, perplexity and the comparison of base and tuned."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from luthier.evaluation import aime, compare, measure_loss, measure_rewards, perplexity
from luthier.evaluation.aime import pass_at_k
from luthier.rl.engine import CompletionOutput, RequestOutput

PROBLEMS = [
    {"problem": "What is 70 + 3?", "answer": "073"},
    {"question": "What is 1 + 1?", "answer": 2},
    {"Problem": "How many primes are below 3000?", "Answer": 430},
]
SOLUTIONS = [
    ["\\boxed{73}", "\\boxed{073}", "it is 73.", "\\boxed{74}"],
    ["\\boxed{3}", "none", "\\boxed{2000}", "still thinking: 7"],
    ["430", "431", "432", "433"],
]


def canned(solutions, truncated=()):
    """An engine that answers from a list, and what it was asked."""
    asked = {}

    def generate(prompts, params):
        asked.update(prompts=prompts, params=params)
        outputs = []
        for number, texts in enumerate(solutions):
            completions = [
                CompletionOutput(index, text, [0], "length" if (number, index) in truncated else "stop")
                for index, text in enumerate(texts)
            ]
            outputs.append(RequestOutput(str(number), None, [0], completions))
        return outputs

    return generate, asked


def test_mean_and_pass_are_different_things():
    generate, asked = canned(SOLUTIONS, truncated={(1, 3)})
    report = aime(None, tiny_tokenizer(), PROBLEMS, n=4, max_tokens=100, seed=9, generate=generate)
    assert report.mean_at_n.value == pytest.approx((3 + 0 + 1) / 12)
    assert report.pass_at_n.value == pytest.approx(2 / 3)
    assert report.pass_at_k[1].value == pytest.approx(report.mean_at_n.value)
    assert report.pass_at_k[4].value == pytest.approx(report.pass_at_n.value)
    assert report.pass_at_k[1].value < report.pass_at_k[2].value < report.pass_at_k[4].value
    assert (report.truncated, report.unanswered) == (1, 2)
    assert [problem.answers for problem in report.problems][1] == [3, None, None, 7]
    assert (asked["params"].n, asked["params"].max_tokens, asked["params"].seed) == (4, 100, 9)
    assert asked["prompts"][1] == [{"role": "user", "content": asked["prompts"][1][0]["content"]}]
    assert "boxed" in asked["prompts"][1][0]["content"] and asked["prompts"][1][0]["content"].startswith("What is 1 + 1?")
    json.dumps(report.to_dict())


@pytest.mark.parametrize(("n", "right"), [(5, 0), (5, 2), (6, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, right):
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="k must be from 1"):
        pass_at_k(n, right, n + 1)


def test_intervals_cover_what_other_problems_would_give():
    """Of many sets of 30 problems from one population, about 95% of the intervals hold the population's rate."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(100, 30, generator=generator) ** 2  # the population's mean chance is 1/3
    covered = 0
    for chance in chances:
        solved = torch.rand(30, 8, generator=generator) < chance[:, None]
        generate, _ = canned([["1" if right else "2" for right in row] for row in solved])
        report = aime(None, tiny_tokenizer(), [{"problem": "?", "answer": 1}] * 30, n=8, generate=generate)
        assert report.mean_at_n.low <= report.mean_at_n.value <= report.mean_at_n.high
        covered += report.mean_at_n.low <= 1 / 3 <= report.mean_at_n.high
    error = math.sqrt(0.95 * 0.05 * 100)
    assert abs(covered - 95) <= 3 * error


def test_a_more_confident_interval_is_wider():
    reports = [aime(None, tiny_tokenizer(), PROBLEMS, n=4, confidence=c, generate=canned(SOLUTIONS)[0]) for c in (0.5, 0.99)]
    narrow, wide = (report.mean_at_n.high - report.mean_at_n.low for report in reports)
    assert narrow < wide


def test_a_model_is_sampled_reproducibly(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps({"problem": row.get("problem", "x"), "answer": 1}) for row in PROBLEMS))
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    reports = [aime(model, tokenizer, file, n=2, max_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1]
    assert reports[0].settings["seed"] == 1 and len(reports[0].problems) == 3
    assert reports[0].truncated > 0


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        ([], "no problems"),
        ([{"problem": "x"}], "Problem 0 has the columns problem"),
        ([PROBLEMS[0], {"text": "x", "answer": 3}], "Problem 1 has the columns text, answer"),
        ([{"problem": "x", "answer": 1000}], "'1000'.*0 to 999"),
        ([{"problem": "x", "answer": "one"}], "'one'"),
    ],
)
def test_rows_that_are_no_problems(problems, said):
    with pytest.raises(ValueError, match=said):
        aime(None, tiny_tokenizer(), problems, generate=canned([])[0])


# --- perplexity and comparison ---------------------------------------------------------------------------------------


def rows(count=5):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 20, 7, 1, 12][:count]
    return [{"input_ids": torch.randint(5, 400, (length,), generator=generator).tolist()} for length in lengths]


def test_perplexity_is_the_mean_over_tokens_whatever_the_batches():
    model = tiny_model("llama3").train()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows():
            ids = torch.tensor([row["input_ids"]])
            logp = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
            total -= logp.gather(1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
    model.train()
    for batch_size in (1, 2, 8):
        result = perplexity(model, rows(), batch_size)
        assert (result.tokens, result.rows) == (tokens, 5)
        assert result.loss == pytest.approx(total / tokens, rel=1e-5)
        assert result.value == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert model.training


def test_only_labelled_tokens_count():
    model = tiny_model("llama3")
    row = rows(2)[1]
    masked = {**row, "labels": [-100] * 10 + row["input_ids"][10:]}
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([masked["labels"]])).loss.item()
    assert perplexity(model, [masked]).loss == pytest.approx(loss, rel=1e-5)
    assert perplexity(model, [masked]).tokens == 10


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"text": "x"}, "Row 1 has the columns text"),
        ({"input_ids": [5, 6], "labels": [5]}, "Row 1 has 2 input_ids but 1 labels"),
    ],
)
def test_rows_that_cannot_be_scored(bad, said):
    with pytest.raises(ValueError, match=said):
        perplexity(tiny_model("llama3"), [rows(1)[0], bad])


def test_nothing_to_score():
    with pytest.raises(ValueError, match="2 rows"):
        perplexity(tiny_model("llama3"), [{"input_ids": [7]}, {"input_ids": [5, 6], "labels": [-100, -100]}])


def test_base_and_tuned_are_told_apart():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama3"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    comparison = compare(model, measure_loss(rows()))
    assert comparison.base["loss"] == perplexity(tiny_model("llama3"), rows()).loss
    assert comparison.tuned["loss"] == perplexity(model, rows()).loss != comparison.base["loss"]
    assert comparison.change("loss") == comparison.tuned["loss"] - comparison.base["loss"]

    def lengths(completions, completion_ids, answer):
        return [float(len(ids)) if right == "a" else None for ids, right in zip(completion_ids, answer, strict=True)]

    def texts(completions, **columns):
        return [float(isinstance(completion, str)) for completion in completions]

    questions = [{"prompt": "The statement", "answer": "a"}, {"prompt": "class", "answer": "b"}]
    scores = compare(model, measure_rewards(tiny_tokenizer(), questions, [lengths, texts]))
    assert scores.base.keys() == scores.tuned.keys() == {"lengths", "texts"}
    assert scores.base["texts"] == 1.0 and scores.base["lengths"] >= 1


def test_a_model_without_an_adapter_needs_its_base():
    model, base = tiny_model("llama3", seed=1), tiny_model("llama3", seed=0)
    with pytest.raises(ValueError, match="base="):
        compare(model, measure_loss(rows()))
    assert compare(model, measure_loss(rows()), base=base).base["loss"] == perplexity(base, rows()).loss
