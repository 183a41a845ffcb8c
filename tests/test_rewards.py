"""Reward functions: loading, calling, and what a bad one gets."""

from __future__ import annotations

import asyncio
import functools
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from luthier.errors import UnsupportedError
from luthier.rl.answers import aime_answer, final_answer, last_boxed
from luthier.rl.losses import LOSSES, trl_settings
from luthier.rl.rewards import (
    RewardError,
    RewardTimeout,
    RewardTypeError,
    checked,
    exact_answer,
    format_reward,
    load_reward,
    missing_columns,
)
from luthier.rl.sampling import SamplingParams


def batch(completions: list, **columns: list) -> dict:
    prompts = [f"prompt {row}" for row in range(len(completions))]
    return {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [[row] for row in range(len(completions))],
        **columns,
    }


def write(path, source: str):
    path.write_text(textwrap.dedent(source))
    return path


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_reward_is_loaded_from_a_file_without_taking_a_module_name(tmp_path):
    write(tmp_path / "helper_of_rewards.py", "def length(text): return len(text)")
    file = write(
        tmp_path / "json.py",  # the name of a module everyone uses
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from helper_of_rewards import length

        @dataclass
        class Scale:
            by: float = 0.5

        def short(completions, **columns):
            return [Scale().by * length(text) for text in completions]
        """,
    )
    import json

    path_before = list(sys.path)
    reward = load_reward(f"{file}:short")
    assert checked(reward)(**batch(["ab", "abcd"])) == [1.0, 2.0]
    assert sys.modules["json"] is json
    assert sys.path == path_before


def test_a_changed_file_is_read_again(tmp_path):
    file = write(tmp_path / "rewards.py", "def one(completions, **columns): return [1] * len(completions)")
    assert load_reward(f"{file}:one")(["a"]) == [1]
    write(file, "def one(completions, **columns): return [11] * len(completions)")
    assert load_reward(f"{file}:one")(["a"]) == [11]


def test_a_reward_is_loaded_from_a_module():
    assert load_reward("luthier.rl.rewards:exact_answer") is exact_answer


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("rewards.py", ValueError, "file.py:function"),
        ("missing.py:correct", FileNotFoundError, "missing.py"),
        ("good.py:corect", ValueError, "Did you mean 'correct'"),
        ("good.py:nothing_like_it", ValueError, "correct, polite"),
        ("good.py:LIMIT", TypeError, "int, not a function"),
        ("broken.py:f", ValueError, "broken.py cannot be imported: SyntaxError"),
        ("raising.py:f", ValueError, "RuntimeError: no key"),
        ("no_such_package_at_all:f", ValueError, "no_such_package_at_all"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(tmp_path, monkeypatch, reference, error, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.py", "LIMIT = 3\ndef correct(completions): ...\ndef polite(completions): ...\ndef _private(): ...")
    write(tmp_path / "broken.py", "def f(:")
    write(tmp_path / "raising.py", "raise RuntimeError('no key')")
    with pytest.raises(error, match=said) as caught:
        load_reward(reference)
    assert "_private" not in str(caught.value)


# --- calling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[1, 0.5], (True, None), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2.0)]]
)
def test_every_usual_form_of_numbers_is_taken(values):
    result = checked(lambda completions: values)(**batch(["a", "b"]))
    assert [type(value) for value in result if value is not None] == [float] * sum(value is not None for value in result)
    assert result == [None if value is None else float(value) for value in values]


def test_a_reward_gets_what_it_names_and_everything_with_columns():
    seen = {}

    def named(completions, answer):
        seen["named"] = (completions, answer)
        return [0.0]

    def everything(**columns):
        seen["everything"] = set(columns)
        return [0.0]

    for reward in (named, everything):
        checked(reward)(**batch(["a"], answer=["b"], other=["c"]))
    assert seen["named"] == (["a"], ["b"])
    assert seen["everything"] == {"prompts", "completions", "completion_ids", "answer", "other"}


def test_columns_that_a_reward_needs_and_the_dataset_lacks():
    def reward(prompts, completions, answer, log_metric, strict=True, **columns): ...

    assert missing_columns(reward, ["prompt"]) == ["answer"]
    assert missing_columns(reward, ["prompt", "answer"]) == []


def asynchronous(reward):
    @functools.wraps(reward)
    async def wrapper(**columns):
        await asyncio.sleep(0)
        return reward(**columns)

    return wrapper


def run(reward, calls, timeout=None):
    result = checked(reward, timeout)(**calls)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def raises_at_b(completions, **columns):
    if "b" in completions:
        raise KeyError("no answer")
    return [0.0] * len(completions)


def too_few(completions, **columns):
    return [0.0] * (len(completions) - 1)


def not_a_list(completions, **columns):
    return 1.0


def returns_text(completions, **columns):
    return [0.0, "good", 0.0]


def returns_nan(completions, **columns):
    return [0.0, 1.0, float("nan")]


def returns_infinity(completions, **columns):
    return [-float("inf"), 1.0, 2.0]


def forgotten_await(completions, **columns):
    return asyncio.sleep(0)


BAD = [
    (raises_at_b, RewardError, ["KeyError", "no answer", "row 1 of 3", "'b'"]),
    (too_few, RewardError, ["2 values for 3", "row 2 of 3", "'c'"]),
    (not_a_list, RewardTypeError, ["list", "float 1.0"]),
    (returns_text, RewardTypeError, ["str 'good'", "row 1 of 3", "'b'"]),
    (returns_nan, RewardError, ["nan", "row 2 of 3", "'c'", "None"]),
    (returns_infinity, RewardError, ["-inf", "row 0 of 3", "'a'"]),
    (forgotten_await, RewardTypeError, ["coroutine", "async"]),
]


@pytest.mark.filterwarnings("ignore:coroutine.*never awaited")
@pytest.mark.parametrize("kind", [lambda reward: reward, asynchronous], ids=["sync", "async"])
@pytest.mark.parametrize(("reward", "error", "said"), BAD, ids=[bad[0].__name__ for bad in BAD])
def test_a_bad_reward_is_named_with_its_row(kind, reward, error, said):
    with pytest.raises(error) as caught:
        run(kind(reward), batch(["a", "b", "c"]))
    for words in [f"'{reward.__name__}'", *said]:
        assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_reward_that_fails_only_on_the_whole_batch_says_so():
    def needs_one(completions):
        raise_if = len(completions) > 1
        return [1 / (not raise_if)]

    with pytest.raises(RewardError, match="ZeroDivisionError.*none of its rows alone"):
        checked(needs_one)(**batch(["a", "b"]))


def test_a_long_completion_is_shown_by_its_start():
    with pytest.raises(RewardError) as caught:
        checked(returns_nan)(**batch([[{"role": "assistant", "content": letter * 500}] for letter in "abc"]))
    assert "ccc" in str(caught.value) and len(str(caught.value)) < 400


def test_names_of_objects_and_partials():
    class Judge:
        def __call__(self, completions):
            return [float("nan")]

    with pytest.raises(RewardError, match="'Judge'"):
        checked(Judge())(**batch(["a"]))
    with pytest.raises(RewardError, match="'returns_nan'"):
        checked(functools.partial(returns_nan, extra=1))(**batch(["a", "b", "c"]))
    assert checked(functools.partial(returns_nan)).__name__ == "returns_nan"


def test_async_objects_stay_async():
    class Judge:
        async def __call__(self, completions):
            return [3.0]

    assert asyncio.run(checked(Judge())(**batch(["a"]))) == [3.0]


def test_the_timeout_bounds_a_sync_reward():
    def slow(completions):
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(RewardTimeout, match="'slow'.*reward_timeout=0.2") as caught:
        checked(slow, timeout=0.2)(**batch(["a"]))
    assert time.monotonic() - began < 10
    assert isinstance(caught.value, TimeoutError)


def test_the_timeout_cancels_an_async_reward():
    cancelled = []

    async def slow(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(RewardTimeout, match="'slow'"):
        asyncio.run(checked(slow, timeout=0.1)(**batch(["a"])))
    assert cancelled


def test_a_timeout_error_of_the_reward_itself_is_not_ours():
    def judge(completions):
        raise TimeoutError("server did not answer")

    with pytest.raises(RewardError, match="server did not answer") as caught:
        checked(judge, timeout=60)(**batch(["a"]))
    assert not isinstance(caught.value, RewardTimeout)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_must_be_positive(timeout):
    with pytest.raises(ValueError, match="reward_timeout"):
        checked(raises_at_b, timeout)


def test_a_reward_must_be_callable():
    with pytest.raises(TypeError, match="function"):
        checked(3)


# --- ready rewards and answers ---------------------------------------------------------------------------------------


def test_format_reward():
    good = "<think>so</think>\n<answer>4</answer>"
    bad = ["<answer>4</answer>", "<think>a</think><think>b</think><answer>4</answer>", good + " and more"]
    assert format_reward([good, *bad]) == [1.0, 0.0, 0.0, 0.0]
    assert format_reward([[{"role": "assistant", "content": good}]]) == [1.0]


def test_exact_answer():
    completions = [
        "It is \\boxed{1,024}",
        "so 7.50 in all",
        "none",
        [{"role": "assistant", "content": "\\boxed{\\text{Paris}}"}],
    ]
    assert exact_answer(completions, answer=["1024", 7.5, "3", "paris"]) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{3}", "3"),
        ("\\boxed {4}", "4"),
        ("\\boxed{5} and an open \\boxed{6", "5"),
        ("no box", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{073}", 73),
        ("\\boxed{73.0}", 73),
        ("\\boxed{\\text{ 204 }}", 204),
        ("\\boxed{$25$}", 25),
        ("\\boxed{0}", 0),
        ("\\boxed{999}", 999),
        ("\\boxed{1000}", None),
        ("\\boxed{-3}", None),
        ("\\boxed{1/2} = 42", None),  # the box counts, not the number behind it
        ("\\boxed{}", None),
        ("\\boxed{x} so 7", None),
        ("the pair (1,2) gives 116.", 116),
        ("in 2024, that makes 1,000", None),
        ("**Answer: 588**", 588),
        ("3.5", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_aime_answer(text, answer):
    assert aime_answer(text) == answer


def test_final_answer_is_normalised():
    assert final_answer("\\boxed{ 1,234.50 }") == final_answer("it is 1234.5") == "1234.5"


# --- losses and sampling parameters ----------------------------------------------------------------------------------

UNSET = {"importance_sampling_level": None, "scale_rewards": None, "epsilon_high": None}


def test_losses_map_to_trl():
    assert {name: trl_settings(name, UNSET)["loss_type"] for name in LOSSES} == {
        **{name: name for name in LOSSES},
        "gspo": "grpo",
    }
    assert trl_settings("gspo", UNSET)["importance_sampling_level"] == "sequence"
    assert trl_settings("dr_grpo", UNSET)["scale_rewards"] == "none"
    assert trl_settings("dr_grpo", {**UNSET, "scale_rewards": "group"})["scale_rewards"] == "group"
    assert trl_settings("cispo", UNSET)["epsilon_high"] == 5.0
    assert trl_settings("dapo", UNSET) == {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "epsilon_high": None,
    }


def test_an_unknown_or_contradicted_loss():
    with pytest.raises(ValueError, match="Did you mean 'dr_grpo'"):
        trl_settings("dr-grpo", UNSET)
    with pytest.raises(ValueError, match="gspo.*sequence.*token"):
        trl_settings("gspo", {**UNSET, "importance_sampling_level": "token"})


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"temperatur": 1.0}, TypeError, "Did you mean 'temperature'"),
        ({"best_of": 4}, UnsupportedError, "best_of=4"),
        ({"prompt_logprobs": 1}, UnsupportedError, "prompt_logprobs=1"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"top_p": 0}, ValueError, "top_p=0"),
        ({"top_k": -2}, ValueError, "top_k=-2"),
        ({"min_p": 1.5}, ValueError, "min_p=1.5"),
        ({"n": 0}, ValueError, "n=0"),
        ({"n": 2, "temperature": 0}, ValueError, "greedy"),
        ({"max_tokens": 0}, ValueError, "max_tokens=0"),
        ({"min_tokens": 9, "max_tokens": 8}, ValueError, "min_tokens=9"),
        ({"stop": [""]}, ValueError, "stop="),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids"),
    ],
)
def test_a_bad_sampling_parameter_is_named(given, error, said):
    with pytest.raises(error, match=said):
        SamplingParams(**given)


def test_sampling_parameters_take_vllms_spellings():
    params = SamplingParams(top_k=-1, stop="###", best_of=None, detokenize=True, stop_token_ids=None)
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ["###"], [])
