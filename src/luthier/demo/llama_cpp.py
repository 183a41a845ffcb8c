"""Answers of a GGUF file through llama.cpp, where its Python package ``xllamacpp`` is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def answers(gguf: Path, conversations: list[list[dict]], max_tokens: int) -> list[str]:
    """The greedy answer to each conversation, rendered by llama.cpp with the template inside the file."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx = 1024
    settings.n_parallel = 1
    settings.verbosity = -1
    settings.sampling.temp = 0.0
    server = xllamacpp.Server(settings)
    found = []
    for conversation in conversations:
        request = {"messages": conversation, "max_tokens": max_tokens, "temperature": 0.0, "cache_prompt": False}
        found.append(server.handle_chat_completions(request)["choices"][0]["message"]["content"])
    return found
