"""Writing whole or not at all; errors that say what to do."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from luthier import files
from luthier.errors import missing_extra, unknown


def contents(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_file_appears_whole(tmp_path):
    with files.atomic_file(tmp_path / "new" / "out.txt") as place:
        place.write_text("whole")
        assert not (tmp_path / "new" / "out.txt").exists()
    assert (tmp_path / "new" / "out.txt").read_text() == "whole"
    assert contents(tmp_path / "new") == {"out.txt"}


def test_a_failed_file_leaves_the_old_one(tmp_path):
    (tmp_path / "out.txt").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(tmp_path / "out.txt") as place:
        place.write_text("half")
        raise RuntimeError
    assert (tmp_path / "out.txt").read_text() == "old"
    assert contents(tmp_path) == {"out.txt"}


def test_a_directory_takes_the_place_of_the_old_one(tmp_path):
    old = tmp_path / "model"
    (old / "notes").mkdir(parents=True)
    (old / "notes" / "mine.txt").write_text("mine")
    (old / "model-00001-of-00002.safetensors").write_text("stale")
    (old / "config.json").write_text("old")
    with files.atomic_directory(old) as place:
        (place / "config.json").write_text("new")
        (place / "model.safetensors").write_text("new")
        assert (old / "config.json").read_text() == "old"
    assert contents(old) == {"notes", "config.json", "model.safetensors"}
    assert (old / "config.json").read_text() == "new"
    assert (old / "notes" / "mine.txt").read_text() == "mine"
    assert contents(tmp_path) == {"model"}


def test_other_weights_are_not_stale(tmp_path):
    for name in ("model.safetensors", "mine.safetensors"):
        (tmp_path / name).write_text("kept")
    with files.atomic_directory(tmp_path) as place:
        (place / "adapter_model.safetensors").write_text("new")
    assert contents(tmp_path) == {"model.safetensors", "mine.safetensors", "adapter_model.safetensors"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with files.atomic_directory(tmp_path / "link") as place:
        (place / "config.json").write_text("new")
        assert place.parent == tmp_path / "disk", "on the disk that it will be on"
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk" / "model") == {"config.json"}


@pytest.mark.parametrize("reason", ["mounted", "working directory"])
def test_a_directory_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, reason):
    volume = tmp_path / "volume"
    volume.mkdir()
    for name in ("model-00001-of-00002.safetensors", "mine.txt", "config.json"):
        (volume / name).write_text("old")
    before = volume.stat().st_ino
    if reason == "mounted":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    else:
        monkeypatch.chdir(volume)
    with files.atomic_directory("." if reason == "working directory" else volume) as place:
        (place / "model.safetensors").write_text("new")
        (place / "config.json").write_text("new")
        assert (volume / "config.json").read_text() == "old" and place.is_relative_to(volume)
    assert volume.stat().st_ino == before and contents(volume) == {"model.safetensors", "mine.txt", "config.json"}
    assert (volume / "config.json").read_text() == "new"


def test_a_failed_directory_leaves_the_old_one(tmp_path):
    old = tmp_path / "model"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(old) as place:
        (place / "config.json").write_text("half")
        raise RuntimeError
    assert (old / "config.json").read_text() == "old"
    assert contents(tmp_path) == {"model"}


REASONS = [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EFBIG, "FAT32")]


@pytest.mark.parametrize(("code", "words"), REASONS)
def test_what_the_disk_says_is_explained(tmp_path, monkeypatch, code, words):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=words) as caught, files.atomic_file(tmp_path / "out.txt") as place:
        place.write_text("text")
    assert str(tmp_path / "out.txt") in str(caught.value)
    assert contents(tmp_path) == set()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another output directory"), files.atomic_file(tmp_path / "file" / "out.txt"):
        pass


def test_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    files.require_space(tmp_path / "not" / "there" / "yet", 5)
    with pytest.raises(OSError, match="needs .* GB but only") as caught:
        files.require_space(tmp_path / "model", 6)
    assert caught.value.errno == errno.ENOSPC


def test_names_get_the_nearest_suggestion():
    message = str(unknown("chat template", "lama-3", ["llama-3", "chatml"], "See docs."))
    assert message == "Unknown chat template 'lama-3'. Did you mean 'llama-3'? Allowed: chatml, llama-3. See docs."
    assert "Did you mean" not in str(unknown("chat template", "zzz", ["llama-3"]))


def test_a_missing_package_names_its_extra():
    assert 'pip install "luthier[vllm]"' in str(missing_extra("vllm", "vllm", "rollout='vllm'"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("check", [files.make_directory, files.require_writable])
def test_a_place_where_nothing_can_be_made_is_named(check):
    with pytest.raises(PermissionError, match="Could not write /proc/x: permission denied"):
        check(Path("/proc/x"))
