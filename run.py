#!/usr/bin/env python3
"""Set Luthier up and run a job: ``python3 run.py demo`` or ``python3 run.py test``. Standard library only.

The first call makes .venv and installs into it; later calls find it ready. With an NVIDIA driver the CUDA build of torch
is installed, otherwise the CPU build where one is offered. SETUP=0 uses the interpreter at hand and installs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TESTS = ["-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
JOBS = {
    "demo": ["-m", "luthier", "demo"],
    "test": TESTS,
    "test-newest": TESTS,
    "test-llama-cpp": [*TESTS[:-4], "tests/test_llama_cpp.py"],
    "lint": ["-m", "ruff", "check", "src", "tests", "bench", "run.py"],
    "bench": ["bench/step.py"],
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in JOBS:
        print(f"usage: python3 run.py {'|'.join(JOBS)} [arguments of the job]", file=sys.stderr)
        return 2
    job, rest = arguments[0], arguments[1:]
    prepared = os.environ.get("SETUP") == "0"
    python = sys.executable if prepared else str(set_up(newest=job == "test-newest"))
    if job == "test-llama-cpp" and not prepared:  # compiles llama.cpp, once
        print("Compiling llama.cpp (many minutes, once) ...", flush=True)
        pinned = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([python, "-m", "pip", "install", "-q", *pinned, "llama-cpp-python"], check=True)
    return subprocess.run([python, *JOBS[job], *rest], cwd=ROOT, env=environment(job), check=False).returncode


def set_up(newest: bool = False) -> Path:
    """Make the virtual environment if it is not there or not current, and give back its interpreter."""
    venv = ROOT / ".venv-newest" if newest else VENV
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / "luthier-setup"
    wanted = fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    check_interpreter()
    if not python.exists():
        print(f"Making {venv.name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    print("Installing (a few minutes, once) ...", flush=True)
    pinned = [] if newest else ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([str(python), "-m", "pip", "install", "-q", *pinned, *torch_index(), "-e", f"{ROOT}[test]"], check=True)
    subprocess.run([str(python), "-c", "from luthier.model.torchvision_hook import main; main()"], check=True)
    stamp.write_text(wanted)
    return python


def check_interpreter() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Luthier needs Python 3.11, 3.12 or 3.13; this is {sys.version.split()[0]}. Try: python3.12 run.py ...")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            sys.exit(f"Python's module {module!r} is missing. On Debian or Ubuntu: sudo apt install python{version}-venv")


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def torch_index() -> list[str]:
    """Without a GPU, offer PyTorch's CPU builds (0.2 GB instead of 3 GB) where that index can be reached."""
    if has_gpu():
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=3).close()
    except (urllib.error.URLError, OSError):
        return []
    return ["--extra-index-url", CPU_INDEX]


def fingerprint() -> str:
    """Changes when the requirements or the kind of machine change."""
    text = "".join((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(f"{text} gpu={has_gpu()} python={sys.version_info[:2]} root={ROOT}".encode()).hexdigest()


def environment(job: str) -> dict[str, str]:
    """Thread settings: OpenMP's busy waiting makes small models on a busy CPU up to a hundred times slower."""
    settings = dict(os.environ)
    settings.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if job.startswith("test"):
        settings["OMP_NUM_THREADS"] = "1"  # more would be waited for in vain by tests that fork
        if not has_gpu():
            settings.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("SETUP") == "0":
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), settings.get("PYTHONPATH")]))
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
