"""Answers of a GGUF file through llama.cpp, where its Python package ``xllamacpp`` is installed.

The server runs in a process of its own, which ends without closing it: closing one waits for ever now and then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 600  # seconds


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def answers(gguf: Path, conversations: list[list[dict]], max_tokens: int) -> list[str]:
    """The greedy answer to each conversation, rendered by llama.cpp with the template inside the file."""
    command = [sys.executable, "-m", "luthier.demo.llama_cpp", str(gguf), str(max_tokens)]
    done = subprocess.run(command, input=json.dumps(conversations), capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import xllamacpp

    gguf, max_tokens = sys.argv[1:]
    settings = xllamacpp.CommonParams()
    settings.model.path = gguf
    settings.n_ctx = 1024
    settings.n_parallel = 1
    settings.verbosity = -1
    settings.sampling.temp = 0.0
    server = xllamacpp.Server(settings)
    found = []
    for conversation in json.load(sys.stdin):
        request = {"messages": conversation, "max_tokens": int(max_tokens), "temperature": 0.0, "cache_prompt": False}
        found.append(server.handle_chat_completions(request)["choices"][0]["message"]["content"])
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
