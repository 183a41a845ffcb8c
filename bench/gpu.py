"""What most benches need."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def require_gpu() -> None:
    """Stop with a sentence where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("This bench needs an NVIDIA GPU, and torch sees none: `luthier doctor` says what is missing.")


def run_worker(options: list[str], **environment: str) -> dict:
    """The last line of JSON that this script prints in a process of its own, given these options; or how that failed."""
    command = [sys.executable, sys.argv[0], *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines and not done.returncode else {"failed": f"exit code {done.returncode}"}
