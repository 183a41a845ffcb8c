"""A checkpoint on disk: found, downloaded if it is a Hub name, and checked before a weight is loaded from it.

A checkpoint is a directory with ``config.json`` and safetensors; an adapter is one with ``adapter_config.json``.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from luthier.gguf.source import DTYPES as SAFETENSORS_DTYPES
from luthier.gguf.source import read_bytes

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory of safetensors; ``files`` maps every tensor's name to the file that holds it."""

    directory: Path
    files: Mapping[str, Path]

    @cached_property
    def headers(self) -> dict[str, dict]:
        """``{tensor name: {"dtype": "BF16", "shape": [..], "data_offsets": [..]}}`` of every tensor."""
        merged: dict[str, dict] = {}
        for file in sorted(set(self.files.values())):
            merged.update(read_header(file))
        return merged

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point dtype of most of its bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.headers.values():
            if entry["dtype"] in DTYPES:
                sizes[DTYPES[entry["dtype"]]] += entry["data_offsets"][1] - entry["data_offsets"][0]
        return sizes.most_common(1)[0][0] if sizes else None

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, as stored."""
        file, entry = self.files[name], self.headers[name]
        if torch.device(device).type != "cuda" or entry["dtype"] not in SAFETENSORS_DTYPES:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name).to(device)
        begin, end = entry["data_offsets"]
        data = read_bytes(file, data_start(file) + begin, end - begin, device)
        return data.view(SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])


def locate(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    with_weights: bool = True,
) -> Path:
    """The directory of a local checkpoint, or of the downloaded (or cached) files of a Hub repository.

    ``with_weights=False`` downloads config and tokenizer alone.

    Raises ``FileNotFoundError`` for a name that is neither, ``NotADirectoryError`` for a file, ``PermissionError`` for a
    gated or private repository, ``ConnectionError`` when a Hub name is not in the local cache and the Hub is out of reach.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"A model is named by its directory or its Hub name, not by {name!r}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise NotADirectoryError(
            f"{name} is a file. Give the directory that holds config.json and the safetensors, or a Hub name."
        )
    if not HUB_NAME.fullmatch(str(name)) or str(name).startswith("."):
        raise FileNotFoundError(
            f"There is no directory {name}. Give an existing directory or a Hub name such as 'Qwen/Qwen3-0.6B'."
        )
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options |= {"force_download": force_download, "local_files_only": local_files_only}
    directory = _download(str(name), SMALL_FILES, options)
    weights = _weight_names(directory) if with_weights else []
    return _download(str(name), weights, options) if weights else directory


def _weight_names(directory: Path) -> list[str]:
    if (directory / INDEX).exists():
        return sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    return [SINGLE, ADAPTER_WEIGHTS]


def _download(name: str, patterns: list[str], options: dict) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its conditions at https://huggingface.co/{name}, then pass token=... or run "
            "'hf auth login'."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no revision {options['revision']!r}. Leave revision out for its main branch."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is neither a directory nor a model on the Hub named {name!r}. Check the spelling; if it is private, pass "
            "token=... or run 'hf auth login'."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name!r} is not a local directory, is not in the local Hub cache, and the Hub cannot be reached. "
            "Give the path of a local checkpoint, or download it once where there is a connection."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"The Hub refused {name!r}: {error}. Try again later, or give a local directory.") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is neither a directory nor a valid Hub name: {error}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; a broken one is a ``ValueError`` that names file and line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or download the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object. Copy or download the file again.")
    return content


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).exists()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Check that every weight file of a model is there and whole; nothing but headers is read."""
    index = directory / INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index} has no 'weight_map'. Copy or download the checkpoint again.")
        shards = sorted(set(names.values()))
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing:
            raise FileNotFoundError(
                f"{directory} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names: {', '.join(missing)}. "
                "Copy or download the checkpoint again."
            )
    elif (directory / SINGLE).exists():
        shards = [SINGLE]
    else:
        raise FileNotFoundError(_no_weights(directory))
    files = {name: directory / shard for shard in shards for name in read_header(directory / shard)}
    return Checkpoint(directory, files)


def _no_weights(directory: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when read and is never "
            "opened. Use a safetensors version of the model (its Hub page, or a conversion of a file that you trust)."
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    found = f"It has {', '.join(others[:3])}, which no index names." if others else f"Neither {SINGLE} nor {INDEX} is there."
    return f"{directory} has no model weights. {found} Give the directory of a whole checkpoint."


def data_start(file: Path) -> int:
    """Where in a safetensors file the data begins, behind the header."""
    with file.open("rb") as stream:
        return 8 + struct.unpack("<Q", stream.read(8))[0]


def read_header(file: Path) -> dict[str, dict]:
    """The header of a safetensors file; a file that is cut, or whose header does not describe it, is a ``ValueError``."""
    try:
        with safe_open(file, framework="pt"):  # checks the header, every entry of it, and the file's size
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"{file} ({size} bytes) is truncated or damaged: {error}. Copy or download it again.") from error
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    header.pop("__metadata__", None)
    return header


@contextlib.contextmanager
def without_adapter(directory: Path) -> Iterator[Path]:
    """The directory as it is without its adapter, which transformers would otherwise attach by itself."""
    if not is_adapter(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        for entry in directory.iterdir():
            if entry.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                (Path(place) / entry.name).symlink_to(entry)
        yield Path(place)


def base_of_adapter(directory: Path) -> str:
    """The base model's name or path as an adapter's config records it."""
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG} does not say which base model it belongs to. "
            "Write its name or path into 'base_model_name_or_path'."
        )
    return base


def check_adapter(directory: Path) -> None:
    """Check that an adapter directory has its weights, whole, and no competing full model."""
    weights = directory / ADAPTER_WEIGHTS
    if not weights.exists():
        pickled = any(directory.glob("adapter_model.bin"))
        raise FileNotFoundError(_no_weights(directory) if pickled else f"{directory} has no {ADAPTER_WEIGHTS}: save it again.")
    read_header(weights)
    if (directory / "config.json").exists() and ((directory / SINGLE).exists() or (directory / INDEX).exists()):
        base = base_of_adapter(directory)
        if Path(base).expanduser().resolve() != directory.resolve():
            raise ValueError(
                f"{directory} holds a full model and an adapter whose base is {base!r}: which of them is meant cannot be told. "
                "Move one of them to its own directory."
            )
