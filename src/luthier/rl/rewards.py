"""Reward functions: loading them, calling them safely, and a few ready ones.

A reward is ``f(prompts, completions, completion_ids, **dataset_columns) -> list[float | None]``, sync or async; each
argument is a list with one entry per completion, None in the result means "does not apply". A function without
``**columns`` gets only the arguments it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import re
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch

from luthier.errors import unknown
from luthier.rl.answers import final_answer, normalised

Reward = Callable[..., Any]
Batch = dict[str, Any]  # the keyword arguments of one call

# What the trainer adds to the columns of the dataset.
TRAINER_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


class RewardError(ValueError):
    """A reward function that raised, or returned something that is not one finite number or None per completion."""


class RewardTypeError(RewardError, TypeError):
    """A reward function that returned something other than a list of numbers."""


class RewardTimeout(RewardError, TimeoutError):
    """A reward function that took longer than ``reward_timeout``."""


# --- loading ---------------------------------------------------------------------------------------------------------


def load_reward(reference: str) -> Reward:
    """The function that ``"file.py:function"`` or ``"package.module:function"`` names.

    A file is imported under a private name, so it cannot shadow a module; what lies beside it can be imported by it.
    Raises ``ValueError`` for a reference of another form, a file that cannot be imported or a function that is not in
    it (naming those that are), ``FileNotFoundError`` for a missing file, ``TypeError`` for something not callable.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{reference!r} does not name a reward: write file.py:function, for example rewards.py:correct")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if name not in vars(module):
        functions = [key for key, value in vars(module).items() if inspect.isroutine(value) and not key.startswith("_")]
        raise unknown(f"reward function in {place}:", name, functions)
    reward = vars(module)[name]
    if not callable(reward):
        raise TypeError(f"{reference} is a {type(reward).__name__}, not a function: a reward must be callable")
    return reward


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"There is no reward file {str(path)!r} (looked from {Path.cwd()})")
    path = path.resolve()
    written = f"{path}:{path.stat().st_mtime_ns}:{path.stat().st_size}"
    name = f"luthier_reward_{hashlib.sha256(written.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        with _Attempt() as attempt:
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if attempt.error is not None:
        del sys.modules[name]
        kind = type(attempt.error).__name__
        raise ValueError(f"The reward file {path} cannot be imported: {kind}: {attempt.error}") from attempt.error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"The reward module {name!r} cannot be imported: {error}. A file is file.py:function") from error


# --- calling ---------------------------------------------------------------------------------------------------------


def reward_name(reward: Reward) -> str:
    """The name a reward has in logs and errors: the function's, or the class's of a callable object."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def checked(reward: Reward, timeout: float | None = None) -> Reward:
    """``reward`` with its result checked and its time bounded; sync stays sync, async stays async.

    The wrapper returns one finite float or None per completion. It raises ``RewardError`` (a ``ValueError``) naming the
    function and the row where the function raises, returns the wrong length or a value that is not finite;
    ``RewardTypeError`` (also a ``TypeError``) where it returns something other than numbers; ``RewardTimeout`` (also a
    ``TimeoutError``) after ``timeout`` seconds. A sync function is bounded by running it in a thread, which is
    abandoned when time is up; an async one is cancelled at its current ``await``.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"reward_timeout is {timeout}: give seconds above 0, or None for no limit")
    if not callable(reward):
        raise TypeError(f"A reward must be a function, not {type(reward).__name__} {reward!r}")
    name, is_async = reward_name(reward), _is_async(reward)

    def start(batch: Batch) -> Any:
        return _bounded(lambda: reward(**_accepted(reward, batch)), timeout, name)

    def call(**batch: Any) -> list[float | None]:
        with _Attempt() as attempt:
            values = start(batch)
        if isinstance(attempt.error, RewardTimeout):
            raise attempt.error
        if attempt.error is not None:
            raise _explained(name, attempt.error, _first_failing(start, batch), batch)
        return _valid(values, name, batch)

    async def start_async(batch: Batch) -> Any:
        return await _bounded_async(reward(**_accepted(reward, batch)), timeout, name)

    async def call_async(**batch: Any) -> list[float | None]:
        with _Attempt() as attempt:
            values = await start_async(batch)
        if isinstance(attempt.error, RewardTimeout):
            raise attempt.error
        if attempt.error is not None:
            raise _explained(name, attempt.error, await _first_failing_async(start_async, batch), batch)
        return _valid(values, name, batch)

    wrapper = call_async if is_async else call
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = reward.__doc__
    return wrapper


def missing_columns(reward: Reward, columns: Iterable[str]) -> list[str]:
    """The parameters that ``reward`` requires and that neither the trainer nor the dataset's ``columns`` provide."""
    parameters = _parameters(reward)
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return [name for name in required if name not in TRAINER_ARGUMENTS and name not in set(columns)]


def require_columns(rewards: Iterable[Reward], columns: Sequence[str], name: str) -> None:
    """Raise ``ValueError`` for the first reward that needs a column which the dataset ``name`` does not have."""
    for reward in rewards:
        lacking = missing_columns(reward, set(columns) - {"prompt"})
        if lacking:
            raise ValueError(
                f"The reward {reward_name(reward)!r} needs {' and '.join(map(repr, lacking))}, but {name} has only the "
                f"columns {', '.join(columns)}"
            )


def _parameters(reward: Reward) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(reward).parameters.values())
    except ValueError:  # a function of C has no signature: it gets everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _accepted(reward: Reward, batch: Batch) -> Batch:
    parameters = _parameters(reward)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return batch
    return {parameter.name: batch[parameter.name] for parameter in parameters if parameter.name in batch}


def _is_async(reward: Reward) -> bool:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


class _Attempt(contextlib.AbstractContextManager):
    """Keeps what a call of the user's code raises, which may be anything, so that it can be reported with its row."""

    def __init__(self, kinds: type[BaseException] = Exception) -> None:
        self.kinds, self.error = kinds, None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.error = error
        return isinstance(error, self.kinds)


def _bounded(call: Callable[[], Any], timeout: float | None, name: str) -> Any:
    if timeout is None:
        return call()
    outcome: Future = Future()

    def work() -> None:
        with _Attempt(BaseException) as attempt:
            outcome.set_result(call())
        if attempt.error is not None:
            outcome.set_exception(attempt.error)

    # A daemon, so that a reward that never ends cannot keep the process alive.
    threading.Thread(target=work, name=f"reward {name}", daemon=True).start()
    if wait([outcome], timeout).not_done:
        raise _timed_out(name, timeout)
    return outcome.result()


async def _bounded_async(running: Coroutine, timeout: float | None, name: str) -> Any:
    task = asyncio.ensure_future(running)
    done, _ = await asyncio.wait({task}, timeout=timeout)
    if not done:
        task.cancel()
        raise _timed_out(name, timeout)
    return task.result()


def _timed_out(name: str, timeout: float | None) -> RewardTimeout:
    return RewardTimeout(f"The reward {name!r} took longer than reward_timeout={timeout:g} s: speed it up or raise the limit")


def _rows(batch: Batch) -> list[Batch]:
    """The batch cut into calls of one completion each."""
    count = len(batch["completions"])
    lists = {key for key, value in batch.items() if isinstance(value, list) and len(value) == count}
    return [{key: value[row : row + 1] if key in lists else value for key, value in batch.items()} for row in range(count)]


def _first_failing(call: Callable[[Batch], Any], batch: Batch) -> int | None:
    """The first row whose completion alone makes the reward raise: the only way to tell from outside which one it was."""
    for row, one in enumerate(_rows(batch)):
        with _Attempt() as attempt:
            call(one)
        if attempt.error is not None:
            return row
    return None


async def _first_failing_async(call: Callable[[Batch], Coroutine], batch: Batch) -> int | None:
    for row, one in enumerate(_rows(batch)):
        with _Attempt() as attempt:
            await call(one)
        if attempt.error is not None:
            return row
    return None


def _explained(name: str, error: Exception, row: int | None, batch: Batch) -> RewardError:
    where = _described(row, batch) if row is not None else "on the batch, though on none of its rows alone"
    explained = RewardError(f"The reward {name!r} raised {type(error).__name__}: {error} {where}")
    explained.__cause__ = error
    return explained


def _described(row: int, batch: Batch) -> str:
    prompt, completion = (_start(batch[key][row]) for key in ("prompts", "completions"))
    return f"at row {row} of {len(batch['completions'])} (prompt {prompt!r}, completion {completion!r})"


def _start(message: Any, length: int = 80) -> str:
    text = text_of(message)
    return text if len(text) <= length else text[: length - 1] + "…"


def _valid(values: Any, name: str, batch: Batch) -> list[float | None]:
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if inspect.iscoroutine(values):
        values.close()
    if not isinstance(values, list | tuple):
        what = "a coroutine (is an 'async' missing?)" if inspect.isawaitable(values) else f"{type(values).__name__} {values!r}"
        raise RewardTypeError(f"The reward {name!r} must return a list with one number or None per completion, not {what}")
    count = len(batch["completions"])
    if len(values) != count:
        first = min(len(values), count - 1)
        raise RewardError(
            f"The reward {name!r} returned {len(values)} values for {count} completions: it must return one each. "
            f"The first without a counterpart is {_described(first, batch)}"
        )
    return [_number(value, name, row, batch) for row, value in enumerate(values)]


def _number(value: Any, name: str, row: int, batch: Batch) -> float | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray | torch.Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardTypeError(
            f"The reward {name!r} returned {type(value).__name__} {value!r} {_described(row, batch)}: return a number or None"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"The reward {name!r} returned {float(value)} {_described(row, batch)}: "
            "return a finite number, or None where the reward does not apply"
        )
    return float(value)


# --- ready rewards ---------------------------------------------------------------------------------------------------

_THOUGHT_AND_ANSWER = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)


def text_of(message: Any) -> str:
    """The text of a prompt or completion: a string as it is, of a list of messages the last one's content."""
    if isinstance(message, str):
        return message
    if isinstance(message, Sequence) and message and isinstance(message[-1], Mapping):
        message = message[-1].get("content")
    if isinstance(message, list):
        message = "".join(part.get("text", "") for part in message if isinstance(part, Mapping))
    return "" if message is None else str(message)


def format_reward(completions: list, **columns: Any) -> list[float]:
    """1 where a completion is exactly ``<think>...</think><answer>...</answer>``, else 0."""
    return [float(_THOUGHT_AND_ANSWER.fullmatch(text_of(completion)) is not None) for completion in completions]


def exact_answer(completions: list, answer: list, **columns: Any) -> list[float]:
    """1 where the final answer (last box, else last number) equals the column ``answer``, else 0."""
    return [
        float(final_answer(text_of(completion)) == normalised(str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]
