"""``luthier doctor``: versions, GPU, what is missing, and the exact command that mends it."""

from __future__ import annotations

import importlib.metadata
import json as json_format
import platform
import shutil
from dataclasses import asdict, dataclass

import torch
from packaging.version import Version

from luthier.model.torchvision_repair import repair_torchvision
from luthier.terminal import table

OLDEST = {"torch": "2.11", "transformers": "5.17", "trl": "1.16", "peft": "0.21", "bitsandbytes": "0.50", "accelerate": "1.15"}
BELOW = {"transformers": "6", "trl": "1.17"}
PRESENT = ("datasets", "safetensors", "tokenizers", "jiwer", "tyro", "pydantic")
OPTIONAL = {
    "torchvision": "vision",
    "numba": "gguf",
    "vllm": "vllm",
    "tensorboard": "report",
    "wandb": "report",
    "trackio": "report",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` is the command that mends it, empty where nothing is wrong."""

    what: str
    found: str
    remedy: str = ""
    optional: bool = False


def doctor(json: bool = False) -> int:
    """Versions, GPU, what is missing, and the exact command that mends it. Exit code 1 if something needs mending.

    Args:
        json: Print the findings as JSON on standard output.
    """
    findings = [*_python(), *_packages(), *_device()]
    if json:
        print(json_format.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table("luthier doctor", ("what", "found", "to do"), [(f.what, f.found, f.remedy) for f in findings])
    return int(any(finding.remedy and not finding.optional for finding in findings))


def _python() -> list[Finding]:
    version = platform.python_version()
    known = Version("3.11") <= Version(version) < Version("3.14")
    return [Finding("python", version, "" if known else "use Python 3.11, 3.12 or 3.13")]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for package, oldest in OLDEST.items():
        version = installed(package)
        wanted = f">={oldest}" + (f",<{BELOW[package]}" if package in BELOW else "")
        fits = version is not None and Version(oldest) <= Version(version) < Version(BELOW.get(package, "999"))
        findings.append(Finding(package, version or "missing", "" if fits else f'pip install "{package}{wanted}"'))
    for package in PRESENT:
        version = installed(package)
        findings.append(Finding(package, version or "missing", "" if version else f"pip install {package}"))
    for package, extra in OPTIONAL.items():
        version = installed(package)
        remedy = "" if version else f'pip install "luthier[{extra}]"'
        findings.append(Finding(f"{package} (optional)", version or "not installed", remedy, optional=True))
    if installed("torchvision") and repair_torchvision():
        findings.append(Finding("torchvision", "built for another torch: repaired at run time", "", optional=True))
    return findings


def _device() -> list[Finding]:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        card = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        old = (major, minor) < (7, 5)
        precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return [
            Finding("GPU", card, "use a card of Turing (sm_75) or newer" if old else ""),
            Finding("precision", precision),
            _triton(),
        ]
    if shutil.which("nvidia-smi"):
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        remedy = "pip install --force-reinstall torch" if torch.version.cuda is None else "update the NVIDIA driver"
        return [Finding("GPU", f"there is an NVIDIA driver, but torch ({build}) sees no GPU", remedy)]
    return [Finding("GPU", "none: everything runs on the CPU, slowly; use it for small models only", "", optional=True)]


def _triton() -> Finding:
    version = installed("triton")
    return Finding("triton", version or "missing", "" if version else "pip install triton")
