"""The errors a user can meet, and the sentences they are made of.

A wrong value is ``ValueError``, a wrong type ``TypeError``, a missing file ``FileNotFoundError``, a missing optional
package ``ImportError``. Every message holds the value given, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class UnsupportedError(ValueError):
    """A combination that is valid by itself but that Luthier does not support."""


class ExportProofError(RuntimeError):
    """An exported file does not say what the model says."""


class Damaged:
    """``with Damaged(path): ...``: whatever reading that file ends with, other than an error that is meant, is a ``ValueError``
    that names it. Libraries raise all kinds, ``tokenizers`` a bare ``Exception``.
    """

    def __init__(self, path: object) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        is_meant = kind is ValueError or isinstance(error, (UnsupportedError, FileNotFoundError, MemoryError, Warning))
        if isinstance(error, Exception) and not is_meant:
            raise ValueError(f"{self.path} is damaged ({kind.__name__}: {error}). Download or save it again.") from error


def unknown(kind: str, value: object, allowed: Iterable[str], remedy: str = "") -> ValueError:
    """The error for a name that is not one of ``allowed``, with the nearest name suggested.

    Example: ``raise unknown("chat template", "lama-3", CHAT_TEMPLATES)``.
    """
    names = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {value!r}.{suggestion} Allowed: {', '.join(names)}.{' ' + remedy if remedy else ''}")


def suggesting_names(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose ``TypeError`` for an unknown keyword argument suggests the nearest name."""
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise TypeError(str(unknown(f"argument of {function.__name__}:", name, names)))
        return function(*args, **kwargs)

    return checked


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """The error for an optional package that is not installed."""
    return ImportError(f'{purpose} needs the package {package!r}, which is not installed: pip install "luthier[{extra}]"')
