"""A model for Ollama: a Modelfile whose template says the same as the one the model was trained with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.files import atomic_file
from luthier.gguf.chat import known_template, load_tokenizer, stop_tokens
from luthier.gguf.mmproj import mmproj_path
from luthier.gguf.ollama_templates import MODEL_TO_OLLAMA_TEMPLATE_MAPPER, OLLAMA_TEMPLATES, TURNS, go

__all__ = ["MODEL_TO_OLLAMA_TEMPLATE_MAPPER", "OLLAMA_TEMPLATES", "create_ollama_model", "create_ollama_modelfile"]


def create_ollama_modelfile(
    tokenizer: Any,
    gguf_path: str | Path,
    system: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """The text of a Modelfile for the GGUF file at ``gguf_path``, to be saved beside that file.

    ``tokenizer``: a tokenizer, a processor, or the directory of one; its chat template is the one the model was trained
    with. ``system``: a default system message. ``parameters``: such as ``{"temperature": 0.7, "num_ctx": 8192}``.

    A template that renders like one of `OLLAMA_TEMPLATES` gets that Go template. For any other the Modelfile has none, and
    Ollama (0.30 or newer) takes the Jinja template in the GGUF file. Every stop token is named. Raises
    ``FileNotFoundError`` if there is no file at ``gguf_path``.
    """
    gguf_path = Path(gguf_path)
    if not gguf_path.is_file():
        raise FileNotFoundError(f"{gguf_path} does not exist: write the GGUF file first, then its Modelfile.")
    tokenizer = load_tokenizer(tokenizer)
    lines = [f"FROM ./{path.name}" for path in (gguf_path, mmproj_path(gguf_path)) if path.is_file()]
    known = known_template(tokenizer)
    if known is not None and known.template.name in TURNS:
        template = go(TURNS[known.template.name], tokenizer.eos_token or "", tokenizer.bos_token or "")
        template = template.replace(known.template.eos_token, known.stop) if known.stop else template
        lines.append(f'TEMPLATE """{template}"""')
        system = system or known.system
    elif tokenizer.chat_template:
        lines.append("# No TEMPLATE: Ollama 0.30 and newer read the exact Jinja template in the GGUF file.")
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in (parameters or {}).items()]
    lines += [f'PARAMETER stop "{token}"' for token in stop_tokens(tokenizer)]
    return "\n".join(lines) + "\n"


def write_ollama_modelfile(tokenizer: Any, gguf_path: str | Path) -> Path:
    """Write ``Modelfile-<name>`` beside the GGUF file."""
    gguf_path = Path(gguf_path)
    target = gguf_path.with_name(f"Modelfile-{gguf_path.stem}")
    with atomic_file(target) as place:
        place.write_text(create_ollama_modelfile(tokenizer, gguf_path), encoding="utf8")
    return target


def create_ollama_model(name: str, modelfile: str | Path) -> None:
    """Run ``ollama create`` for the Modelfile at this path. ``FileNotFoundError`` where it, or Ollama, is missing."""
    modelfile = Path(modelfile)
    if not modelfile.is_file():
        raise FileNotFoundError(f"{modelfile} does not exist: save the text of create_ollama_modelfile beside its GGUF file.")
    program = shutil.which("ollama")
    if program is None:
        raise FileNotFoundError("The program 'ollama' is not installed: see https://ollama.com/download.")
    subprocess.run([program, "create", name, "-f", modelfile.name], cwd=modelfile.parent, check=True)
