"""run.py: what it says where a machine is not ready, and that a second call sets nothing up."""

import importlib.util
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Version = namedtuple("Version", "major minor micro")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module whose root is an empty place."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    return module


def test_it_needs_nothing_but_the_standard_library():
    done = subprocess.run([sys.executable, "-S", "-I", ROOT / "run.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo|test" in done.stderr


def test_an_old_python_is_named(run, monkeypatch):
    monkeypatch.setattr(sys, "version_info", Version(3, 10, 1))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11"):
        run.check_interpreter()


def test_a_missing_venv_is_named_with_its_remedy(run, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(SystemExit, match="apt install python3.*-venv"):
        run.check_interpreter()


def test_a_second_call_sets_nothing_up(run, monkeypatch):
    calls = []

    def record(command, **options):
        calls.append(command)
        if "venv" in command:
            python = run.VENV / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(run.subprocess, "run", record)
    monkeypatch.setattr(run, "torch_index", lambda: [])
    first = run.set_up()
    assert len(calls) == 3
    assert run.set_up() == first
    assert len(calls) == 3
    (run.ROOT / "constraints.txt").write_text("changed")
    run.set_up()
    assert len(calls) == 5  # installed anew into the same environment


def test_tests_run_on_one_thread_each(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    assert run.environment("test")["OMP_NUM_THREADS"] == "1"
    assert run.environment("test")["TRITON_INTERPRET"] == "1"
    assert "OMP_NUM_THREADS" not in run.environment("demo")
    assert run.environment("demo")["OMP_WAIT_POLICY"] == "PASSIVE"
