"""llama.cpp's own rendering of chat templates, in a process that ends without closing its servers: that may never end."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path


def rendered(gguf: Path, cases: list[dict]) -> list[str]:
    """The prompt of each case ``{"jinja", "messages", "settings"}`` over the vocabulary of a GGUF file."""
    done = subprocess.run(
        [sys.executable, __file__, str(gguf)], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def start(gguf: str, jinja: str):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.chat_template, params.use_jinja = gguf, jinja, True
    params.n_ctx, params.cpuparams.n_threads, params.warmup, params.port = 64, 1, False, 0
    return xllamacpp.Server(params)


def main() -> None:
    prompts, servers = [], []
    for case in json.load(sys.stdin):
        servers.append(start(sys.argv[1], case["jinja"]))
        body = json.dumps({"messages": case["messages"], "chat_template_kwargs": case["settings"]}).encode()
        address = servers[-1].listening_address + "/apply-template"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            prompts.append(json.load(answer)["prompt"])
    print(json.dumps(prompts), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
