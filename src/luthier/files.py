"""Writing so that a reader sees the whole result or the old one, never half of it.

Everything is written to a temporary sibling, flushed to disk, and renamed into place. A full disk or a read-only
directory is reported before or instead of a half-written result.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``, on error removed."""
    path = Path(path)
    make_directory(path.parent)
    with _explained(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _explained(path):
            yield temporary
            _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success it takes the place of ``path``, on error it is removed.

    Files already in ``path`` that were not written again are kept, except model weights, which would be stale.
    """
    path = Path(path)
    make_directory(path.parent)
    with _explained(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        with _explained(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if path.exists():
                _keep_other_files(path, temporary)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """``mkdir -p`` whose failure says what to do."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(path: str | Path) -> None:
    """Raise ``OSError`` if nothing could be written at ``path``; it is not made."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    with _explained(Path(path)), tempfile.TemporaryFile(dir=place):
        pass


def require_space(path: str | Path, needed: int) -> None:
    """Raise ``OSError`` (ENOSPC) if fewer than ``needed`` bytes are free where ``path`` will be written."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free on that disk: "
            "free some space or choose another output directory",
        )


def _publish(temporary: Path, path: Path) -> None:
    _fsync(temporary)
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)
    _fsync(path.parent)


def _keep_other_files(old: Path, new: Path) -> None:
    stale = {file for pattern in WEIGHT_PATTERNS for file in old.glob(pattern)}
    for entry in old.iterdir():
        if entry not in stale and not (new / entry.name).exists():
            shutil.copytree(entry, new / entry.name, copy_function=_link) if entry.is_dir() else _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without hard links
        shutil.copy2(source, target)


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.rename(path, aside / path.name)
        os.rename(temporary, path)
        shutil.rmtree(aside)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which output could not be written, why, and what to do, instead of a bare errno."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space or choose another output directory",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another output directory",
        errno.EROFS: "the file system is read-only: choose another output directory",
        errno.EACCES: "permission denied: choose an output directory that you may write to",
        errno.ENOTDIR: "a part of that path is a file, not a directory: choose another output directory",
        errno.EEXIST: "a file of that name is in the way: choose another output directory",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno) or ("the disk is full" if "No space left" in str(error) else None)
        if reason is None or str(path) in str(error.strerror):
            raise
        raise type(error)(error.errno, f"Could not write {path}: {reason}. Nothing was left behind.") from error
