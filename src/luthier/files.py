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

WEIGHTS = "model*.safetensors*"  # of a whole model: its shards and their index


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``, on error removed."""
    path = _followed(path)
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

    Files already in ``path`` that were not written again are kept, except the weights of a model that was written again. A
    directory that cannot be renamed (a mounted volume, the working directory) is filled file by file, weights first.
    """
    path = _followed(path)
    make_directory(path.parent)
    fixed = _stays_in_place(path)
    with _explained(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path if fixed else path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        with _explained(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if fixed:
                _move_into(path, temporary)
            elif path.exists():
                _keep_other_files(path, temporary)
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """``mkdir -p`` whose failure says what to do."""
    with _explained(path), _no_such_place():
        path.mkdir(parents=True, exist_ok=True)


def require_writable(path: str | Path) -> None:
    """Raise ``OSError`` if nothing could be written at ``path``; it is not made."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    with _explained(Path(path)), _no_such_place(), tempfile.TemporaryFile(dir=place):
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


def _followed(path: str | Path) -> Path:
    """The place that links lead to, so that a link stays one and the disk behind it is the one that is written."""
    return Path(path).resolve()


def _stays_in_place(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return directory.is_mount() or Path.cwd().is_relative_to(directory) or not os.access(directory.parent, os.W_OK)


def _move_into(directory: Path, new: Path) -> None:
    for file in _stale(directory, new):
        file.unlink()
    for entry in sorted(new.iterdir(), key=lambda entry: not entry.match(WEIGHTS)):
        if entry.is_dir():
            shutil.rmtree(directory / entry.name, ignore_errors=True)
        os.replace(entry, directory / entry.name)


def _stale(old: Path, new: Path) -> list[Path]:
    """The weights in ``old`` that those in ``new``, if there are any, take the place of."""
    return list(old.glob(WEIGHTS)) if any(new.glob(WEIGHTS)) else []


def _keep_other_files(old: Path, new: Path) -> None:
    stale = _stale(old, new)
    for entry in old.iterdir():
        if entry not in stale and not (new / entry.name).exists():
            shutil.copytree(entry, new / entry.name, copy_function=_link) if entry.is_dir() else _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without hard links
        shutil.copy2(source, target)


def _exchange(temporary: Path, path: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.rename(path, aside / path.name)
    os.rename(temporary, path)
    shutil.rmtree(aside)


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
def _no_such_place() -> Iterator[None]:
    """A directory that is there and still has no room for a new name, such as /proc, denies permission."""
    try:
        yield
    except FileNotFoundError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which output could not be written, why, and what to do, instead of a bare errno."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space or choose another output directory",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another output directory",
        errno.EFBIG: "a file may not be that large there (FAT32 ends at 4 GB, and see ulimit -f): choose another directory",
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
