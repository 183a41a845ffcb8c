"""Text that every machine with Python has: the standard library's source and its language reference.

``documents`` is what the base model reads; ``chat_rows`` is the demo's task on functions from modules it never read:
which arguments must a caller give, and which may be left out?
"""

from __future__ import annotations

import ast
import builtins
import keyword
import pydoc_data.topics
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z_0-9]{2,}\b")
KEPT_WORDS = {*keyword.kwlist, *dir(builtins), "self", "cls"}
QUESTION = "Which arguments does this function take?\n\n{code}"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "encodings", "lib2to3"}


def held_out(module: str) -> bool:
    """Whether a module is kept away from pretraining; one in ten, by a checksum of its name."""
    return zlib.crc32(module.encode()) % 10 == 0


def modules() -> Iterator[tuple[str, str]]:
    """(relative path, source) of each module of the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def documents() -> list[str]:
    """Pretraining documents: modules that are not held out, and the topics of the language reference."""
    return [text for name, text in modules() if not held_out(name)] + list(pydoc_data.topics.topics.values())


def renamed(text: str, names: list[str], generator: random.Random) -> str:
    """``text`` with each of its identifiers replaced, everywhere alike, by a random one of ``names``.

    A small model that reads the same text many times learns it by heart; one that finds other names in it each time
    has to learn to look them up where they were introduced.
    """
    chosen: dict[str, str] = {}

    def other(match: re.Match) -> str:
        word = match.group()
        return word if word in KEPT_WORDS else chosen.setdefault(word, generator.choice(names))

    return IDENTIFIER.sub(other, text)


def identifiers(texts: list[str]) -> list[str]:
    """The distinct identifiers of ``texts``, sorted."""
    return sorted({word for text in texts for word in IDENTIFIER.findall(text)} - KEPT_WORDS)


def chat_rows(held: bool, limit: int, seed: int = 0) -> list[dict]:
    """Up to ``limit`` chat rows of the demo's task, from held-out or from other modules, in random order."""
    rows = {}
    for name, source in modules():
        if held_out(name) == held:
            for function in _functions(source):
                code, answer = _task(function)
                if code:
                    rows.setdefault(code, answer)
    chosen = sorted(rows.items())
    random.Random(seed).shuffle(chosen)
    return [
        {"messages": [{"role": "user", "content": QUESTION.format(code=code)}, {"role": "assistant", "content": answer}]}
        for code, answer in chosen[:limit]
    ]


def _functions(source: str) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the library carries a few files that are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            yield node


def _task(function: ast.FunctionDef) -> tuple[str, str]:
    """(code, answer), or two empty strings for a function that does not fit the task."""
    spec = function.args
    names = [argument.arg for argument in spec.args if argument.arg not in ("self", "cls")]
    summary = re.sub(r"\s+", " ", ast.get_docstring(function).split("\n\n")[0]).strip()
    plain = not (spec.vararg or spec.kwarg or spec.kwonlyargs or spec.posonlyargs) and not any(a.annotation for a in spec.args)
    if not plain or not 2 <= len(names) <= 5 or not 20 <= len(summary) <= 120 or '"""' in summary:
        return "", ""
    required = names[: len(names) - len(spec.defaults)]
    optional = names[len(required) :]
    parts = [f"{kind}: {', '.join(found)}." for kind, found in (("Required", required), ("Optional", optional)) if found]
    return f'def {function.name}({ast.unparse(spec)}):\n    """{summary}"""', " ".join(parts)
