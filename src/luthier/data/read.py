"""Read a dataset from a file, a directory or the hub into a ``datasets.Dataset``, or say exactly what is wrong with it.

JSON is read by our own loop instead of ``datasets.load_dataset``: it names the line of a mistake, and it keeps nested
values exactly as written (``datasets.Json``), where Arrow would fill the keys that only other rows have with None.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Json, List, Value, concatenate_datasets, load_dataset, load_from_disk

SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
ROW_KEYS = ("data", "rows", "examples")  # {"data": [...]}: a JSON object that wraps the rows
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
SCALARS = {type(None): "null", str: "text", bool: "true/false", int: "a whole number", float: "a number"}
ARROW_TYPES = {"null": "string", "text": "string", "true/false": "bool", "a whole number": "int64", "a number": "float64"}
NULL, EMPTY_LIST, LIST_OF, MIXED = "null", "an empty list", "a list of ", "mixed"
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]..")  # JSON spells an emoji as two of these
CHUNK = 10_000


def read_dataset(path_or_hub_name: str | Path, split: str = "train") -> Dataset:
    """The rows of a ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, of a directory of such
    files (or one written by ``save_to_disk``), or of a hub dataset named ``owner/name`` or ``owner/name:configuration``.

    ``split`` picks one of several splits; it matters for directories and the hub only. Columns of a CSV file are text.
    In a column whose rows differ in shape (tool arguments, say) datasets keeps ten decimals of a number.

    Raises:
        FileNotFoundError: there is no such file, directory, hub dataset or split.
        ValueError: the file is empty, is not JSON at some line, or holds no table.
    """
    path = Path(path_or_hub_name).expanduser()
    if path.is_dir():
        return _read_directory(path, split)
    if path.exists():
        return _read_file(path, split)
    name = str(path_or_hub_name)
    if HUB_NAME.fullmatch(name) and path.suffix not in READERS:
        return _read_hub(name, split)
    raise FileNotFoundError(
        f"There is no file or directory {name!r} (looked in {path.absolute().parent}). Give a {', '.join(READERS)} file, "
        "a directory of such files, or a dataset of the hub as owner/name."
    )


def _read_file(path: Path, split: str) -> Dataset:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is of an unknown kind {path.suffix!r}. Allowed: {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it must hold at least one row.")
    try:
        dataset = reader(path, split)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be rows of a dataset.") from error
    if len(dataset) == 0:
        raise ValueError(f"{path} holds no rows: it must hold at least one.")
    return dataset


def _read_directory(path: Path, split: str) -> Dataset:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return _pick_split(saved, split, path) if isinstance(saved, DatasetDict) else saved
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and not file.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"The directory {path} holds no {', '.join(READERS)} file.")
    named = {name: [file for file in files if name in re.split(r"[^a-z]+", file.stem.lower())] for name in (split, *SPLITS)}
    if any(named.values()):
        files = named[split]
    if not files:
        others = ", ".join(name for name, its_files in named.items() if its_files)
        raise FileNotFoundError(f"The directory {path} has no file for the split {split!r}, only for: {others}.")
    parts = [_read_file(file, split) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.features != parts[0].features:
            raise ValueError(f"{file} has other columns than {files[0]}: {part.features} and {parts[0].features}.")
    return concatenate_datasets(parts)


def _read_hub(name: str, split: str) -> Dataset:
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except FileNotFoundError as error:  # also what a private or gated dataset gives
        raise FileNotFoundError(
            f"There is no file {name!r}, and no hub dataset of that name can be read (missing, private or gated): {error}"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(f"There is no file {name!r}, and the hub cannot be reached: {error}") from error
    except ValueError as error:  # unknown split, or a configuration has to be chosen
        raise ValueError(
            f"The hub dataset {name!r}, split {split!r}: {error} (a configuration is given as owner/name:configuration)"
        ) from error


def _pick_split(splits: DatasetDict, split: str, path: Path) -> Dataset:
    if split not in splits:
        raise FileNotFoundError(f"{path} has no split {split!r}. Allowed: {', '.join(splits)}.")
    return splits[split]


def _read_json(path: Path, split: str) -> Dataset:
    """A JSON list of rows, an object that wraps one, or one JSON object a line whatever the file is called."""
    text = _text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: it must hold at least one row.")
    try:
        root = _loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or _first_line_is_json(path):
            return _read_jsonl(path, split)
        raise _not_json(path, error.lineno, text.splitlines()[error.lineno - 1 : error.lineno], error) from error
    if isinstance(root, dict):
        wrapped = [root[key] for key in (split, *ROW_KEYS) if isinstance(root.get(key), list)]
        root = wrapped[0] if wrapped else [root]
    if not isinstance(root, list):
        raise ValueError(f"{path} is not a table: it must hold a list of JSON objects, but holds {_shown(root)}.")
    return _from_rows(path, lambda: ((f"row {number}", row) for number, row in enumerate(root, start=1)))


def _read_jsonl(path: Path, split: str) -> Dataset:
    return _from_rows(path, lambda: _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 text ({error}).") from error
            if line:
                try:
                    yield f"line {number}", _loads(line)
                except json.JSONDecodeError as error:
                    raise _not_json(path, number, [line], error) from error


def _loads(text: str) -> object:
    value = json.loads(text, parse_constant=_no_constant)
    escape = HALF_CHARACTER.search(text)
    if escape and any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)):
        raise json.JSONDecodeError("half of a character, a surrogate without its other half", text, escape.start())
    return value


def _no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no JSON value (write null)", name, 0)


def _first_line_is_json(path: Path) -> bool:
    try:
        return isinstance(next(_lines(path), ("", None))[1], dict)
    except ValueError:
        return False


def _not_json(path: Path, line: int, text: list[str], error: json.JSONDecodeError) -> ValueError:
    start = text[0].strip()[:80] if text else ""
    return ValueError(f"{path} is not JSON at line {line}: {error.msg} at column {error.colno}. The line starts: {start!r}")


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} line {line} is not UTF-8 text ({error}).") from error


def _from_rows(path: Path, rows: Callable[[], Iterable[tuple[str, object]]]) -> Dataset:
    """Two passes over ``rows()``, pairs of (place, row): one for the columns, one that converts a chunk at a time."""
    features = _columns(path, rows())
    remaining, parts = iter(rows()), []
    while chunk := [row for _, row in islice(remaining, CHUNK)]:
        parts.append(Dataset.from_dict({name: [row.get(name) for row in chunk] for name in features}, features=features))
    return concatenate_datasets(parts)


def _columns(path: Path, rows: Iterable[tuple[str, object]]) -> Features:
    """The type of every column; an error if a row is no object or if two rows have different kinds of value."""
    kinds: dict[str, str] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path} is not a table: {place} must be a JSON object, but is {_shown(row)}.")
        for name, value in row.items():
            before, kind = kinds.get(name, NULL), _kind(value)
            kinds[name] = _common(before, kind)
            if kinds[name] == MIXED:
                raise ValueError(
                    f"{path} has mixed formats: the column {name!r} is {before} at first and {kind} in {place}, which is "
                    f"{_shown(value)}. Give every row the same form."
                )
    if not kinds:
        raise ValueError(f"{path} is empty: it must hold at least one row with at least one column.")
    return Features({name: _feature(kind) for name, kind in kinds.items()})


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        inner = functools.reduce(_common, map(_kind, value), NULL)
        if not value:
            return EMPTY_LIST
        return LIST_OF + inner if inner in ARROW_TYPES else "a list"
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"The whole number {value} has more than 64 bits, which a table cannot hold: write it as text.")
    return SCALARS[type(value)]


def _common(one: str, other: str) -> str:
    """The kind of a column that holds both kinds; ``MIXED`` if there is none."""
    if one == other or other == NULL:
        return one
    if one == NULL:
        return other
    if {one, other} == {"a whole number", "a number"}:
        return "a number"
    if one.startswith(LIST_OF) and other.startswith(LIST_OF):
        inner = _common(one.removeprefix(LIST_OF), other.removeprefix(LIST_OF))
        return inner if inner == MIXED else LIST_OF + inner
    if EMPTY_LIST in (one, other):
        other = one if other == EMPTY_LIST else other
        return other if other.startswith("a list") else MIXED
    return MIXED


def _feature(kind: str) -> Value | List | Json:
    of = kind.removeprefix(LIST_OF)
    if of in ARROW_TYPES:
        return Value(ARROW_TYPES[of]) if of == kind else List(Value(ARROW_TYPES[of]))
    return Json()


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "..."


def _read_delimited(path: Path, split: str) -> Dataset:
    """CSV or TSV with a header line. All columns are text, since the file does not say more: "007" stays "007"."""
    tab = path.suffix.lower() == ".tsv"
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True)
    try:
        with pyarrow.csv.open_csv(path, parse_options=parse) as head:
            names = head.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path} has two columns named {twice[0]!r}: rename one of them.")
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
        return Dataset(pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a table of {'tab' if tab else 'comma'}-separated values: {error}") from error


def _read_parquet(path: Path, split: str) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path, memory_map=True))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file, or a truncated one: {error}") from error


def _read_arrow(path: Path, split: str) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not an Arrow file, or a truncated one: {error}") from error


READERS: dict[str, Callable[[Path, str], Dataset]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
