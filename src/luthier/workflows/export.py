"""Export: an adapter or a model directory becomes merged weights or GGUF files."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from luthier.fast import FastModel
from luthier.model.checkpoint import is_adapter
from luthier.proof.export import convert_to_gguf
from luthier.proof.export import verify as prove_file
from luthier.terminal import table


def merge(
    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")],
    output: str = "merged",
    save_method: Literal["merged_16bit", "merged_4bit"] = "merged_16bit",
    base: Literal["16bit", "nf4"] = "16bit",
    max_shard_size: str = "5GB",
    json: bool = False,
) -> None:
    """Write the merged weights of an adapter.

    Args:
        adapter: Directory of the adapter; its base model is found through its config.
        output: Directory for the merged model.
        save_method: merged_16bit, or merged_4bit for NF4 weights.
        base: Merge onto the original checkpoint (16bit) or onto the 4-bit weights that were trained against (nf4).
        max_shard_size: Largest file, such as 5GB.
        json: Print the result as JSON on standard output.
    """
    if not is_adapter(Path(adapter)):
        raise ValueError(f"{adapter} holds no adapter_config.json, so there is nothing to merge: give an adapter directory")
    model, processor = FastModel.from_pretrained(adapter)
    path = model.save_pretrained_merged(output, processor, save_method=save_method, base=base, max_shard_size=max_shard_size)
    _show({save_method: path}, json)


def gguf(
    model: Annotated[Positional[str], arg(metavar="DIR")],
    quant: list[str] | None = None,
    output: str | None = None,
    base: Literal["16bit", "nf4"] = "16bit",
    imatrix: str | None = None,
    json: bool = False,
) -> None:
    """Write GGUF files for llama.cpp and Ollama.

    Args:
        model: Directory of a model, or of an adapter, which is merged on the way.
        quant: GGUF types, separated by commas or spaces. Default: q8_0.
        output: Directory or .gguf file to write. Default: the model's directory.
        base: For an adapter: the weights to merge onto.
        imatrix: Importance matrix file.
        json: Print the result as JSON on standard output.
    """
    if not Path(model).is_dir():
        raise FileNotFoundError(f"There is no directory {model}: give that of a model or of an adapter")
    types = [name for entry in quant or ["q8_0"] for name in entry.replace(",", " ").split()]
    if is_adapter(Path(model)):
        loaded, processor = FastModel.from_pretrained(model)
        files = loaded.save_pretrained_gguf(output or model, processor, quantization_method=types, imatrix=imatrix, base=base)
    else:
        files = convert_to_gguf(model, output or model, types, imatrix=imatrix)
    _show({path.name: path for path in files}, json)


def verify(
    file: Annotated[Positional[str], arg(metavar="FILE")], against: str, imatrix: str | None = None, json: bool = False
) -> int:
    """Prove that a GGUF file says what a model says. Exit code 1 where it does not, with the tensor or token that differs.

    Args:
        file: The GGUF file.
        against: Directory of the model that it was made from.
        imatrix: Importance matrix file that it was made with.
        json: Print the proof as JSON on standard output.
    """
    if is_adapter(Path(against)):
        raise ValueError(f"{against} is an adapter: merge it first (luthier merge {against}) and give that directory")
    proof = prove_file(file, against, imatrix=imatrix)
    if json:
        print(json_format.dumps(asdict(proof), indent=1))
    else:
        proof.show()
    return int(bool(proof.failures))


def _show(written: dict[str, Path], as_json: bool) -> None:
    if as_json:
        print(json_format.dumps({kind: str(path) for kind, path in written.items()}, indent=1))
    else:
        table("Written", ["what", "where"], list(written.items()))
