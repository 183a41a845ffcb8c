"""From a Hugging Face checkpoint to GGUF files, tensor by tensor: read -> rename and reorder -> encode -> write.

Peak memory is one tensor, peak disk the files written. Several quantisations come from one reading.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from luthier.errors import Damaged, UnsupportedError
from luthier.files import atomic_file, require_space
from luthier.gguf import architectures, mixtures
from luthier.gguf.chat import chat_metadata
from luthier.gguf.imatrix import Importance, check_importance, importance_metadata, read_importance, require_importance
from luthier.gguf.metadata import is_tied, kv_heads, metadata, rope_tensors
from luthier.gguf.mmproj import (
    Projector,
    find_projector,
    is_vision,
    mmproj_path,
    normalisation,
    plan_vision,
    vision_metadata,
    vision_type,
)
from luthier.gguf.plan import Piece, Plan, plan_tensors, same
from luthier.gguf.quantize import encode_in_chunks, require_quantizer
from luthier.gguf.reader import GGUFFile
from luthier.gguf.source import CheckpointSource, MemorySource, TensorSource
from luthier.gguf.tokenizer import model_name, tokenizer_metadata
from luthier.gguf.types import FILE_TYPES, FileType, TensorType, file_type
from luthier.gguf.writer import GGUFWriter, Layout, TensorInfo, Value, plan
from luthier.terminal import progress

FILE_ENDINGS = (".gguf", ".ggml", ".bin", ".safetensors", ".pt", ".pth")  # no directory is called so


def convert_to_gguf(
    model_dir: str | Path,
    out: str | Path,
    quantization_method: str | Sequence[str] = "bf16",
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
    overrides: Mapping[str, TensorType] | None = None,
) -> list[Path]:
    """Write the model in ``model_dir`` as GGUF and give the paths of the files.

    ``model_dir``: a directory with config.json, safetensors and tokenizer.json. ``out``: a path that ends in ``.gguf``,
    or a directory, where files are named ``<model>-<QUANT>.gguf``. ``quantization_method``: one of `ALLOWED_QUANTS` or
    a list of them, all written in one pass. ``overrides``: tensors that get another type than the quantisation's, by GGUF
    name, see ``mixed.py``.

    Raises ``FileNotFoundError`` for missing files, ``ValueError`` for a wrong value or a damaged checkpoint,
    ``UnsupportedError`` for what is not covered, all before anything is written.
    """
    model_dir = Path(model_dir)
    outputs = output_paths(out, model_dir.resolve().name, quantization_method)
    config = read_config(model_dir)
    architectures.find(config)
    return write_gguf(config, model_dir, CheckpointSource(model_dir), outputs, imatrix, model_dir.resolve().name, overrides)


def read_config(model_dir: str | Path) -> PreTrainedConfig:
    """The configuration in a directory, defaults filled in; ``UnsupportedError`` for a model transformers does not know.

    A head that is stored beside the embeddings and differs from them is not tied, whatever the file says: as transformers
    reads it.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {model_dir} is not the directory of a model.")
    with Damaged(path):
        kind = PreTrainedConfig.get_config_dict(model_dir, local_files_only=True)[0].get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UnsupportedError(f"GGUF export does not cover the model type {kind!r} of {path}.")
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    if is_tied(config) and _has_own_head(CheckpointSource(model_dir)):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return config


def _has_own_head(source: CheckpointSource) -> bool:
    tables = [name for end in ("lm_head.weight", "embed_tokens.weight") for name in source.shapes if name.endswith(end)]
    return len(tables) == 2 and not torch.equal(*map(source.read, tables))


def output_paths(out: str | Path, name: str, quantization_method: str | Sequence[str]) -> dict[Path, str]:
    """Each file to write and its quantisation."""
    methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    names = list(dict.fromkeys(file_type(method).name for method in methods))
    if not names:
        raise ValueError("quantization_method is an empty list: name at least one, such as 'q8_0'.")
    out = Path(out)
    if out.suffix == ".gguf":
        if len(names) > 1:
            raise ValueError(f"{out} is one file, but {len(names)} quantisations were asked for: give a directory.")
        return {out: names[0]}
    if out.suffix.lower() in FILE_ENDINGS and not out.is_dir():
        raise ValueError(
            f"{out} looks like a file: a GGUF file ends in .gguf, and a directory gets a name without {out.suffix}."
        )
    return {out / f"{name}-{method.upper()}.gguf": method for method in names}


def write_gguf(
    config: PreTrainedConfig,
    tokenizer_dir: str | Path,
    source: TensorSource | Mapping[str, torch.Tensor],
    outputs: Mapping[Path, str],
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
    name: str = "",
    overrides: Mapping[str, TensorType] | None = None,
) -> list[Path]:
    """Write one file for each entry of ``outputs`` (path -> quantisation) from one pass over ``source``.

    ``source``: checkpoint names and tensors of the model that ``config`` describes, see `TensorSource`. The files
    appear under their names together, at the end. The vision part of a model that has one goes to a file of its own beside
    them (`mmproj_path`).
    """
    architecture, projector = architectures.find(config), find_projector(config)
    source = MemorySource(source) if isinstance(source, Mapping) else source
    planned = plan_tensors(architecture, config, source.shapes)
    vocab_size = planned.shapes["token_embd.weight"][0]
    shared = header(config, tokenizer_dir, vocab_size, name)
    types = {path: file_type(method) for path, method in outputs.items()}
    importance = read_importance(imatrix)
    for target in types.values():
        require_importance(target, importance)
    check_importance(importance, planned.shapes)
    shared |= importance_metadata(importance)
    model = _model_shape(config, planned, bool(importance))
    parts = [Part(planned, {path: _layout(planned, shared, target, model, overrides or {}) for path, target in types.items()})]
    if projector is not None and any(map(is_vision, source.shapes)):
        parts.append(_vision_part(projector, config, tokenizer_dir, source, types))
    require_space(next(iter(outputs)), sum(layout.size for part in parts for layout in part.layouts.values()))
    with contextlib.ExitStack() as stack:
        places = {path: stack.enter_context(atomic_file(path)) for part in parts for path in part.layouts}
        with contextlib.ExitStack() as open_files:
            for part in parts:
                part.writers += [
                    open_files.enter_context(GGUFWriter(places[path], layout)) for path, layout in part.layouts.items()
                ]
            for name, tensor in rope_tensors(config).items():
                _write_piece(Piece(name, None, same), tensor, None, parts[0].writers)
            _write_tensors(source, parts, importance)
    return list(outputs)


def header(config: PreTrainedConfig, tokenizer_dir: str | Path, vocab_size: int, name: str = "") -> dict[str, Value]:
    """The metadata of the model, whatever its file's type."""
    model = metadata(architectures.find(config), config, model_name(tokenizer_dir, name))
    return model | tokenizer_metadata(tokenizer_dir, vocab_size) | chat_metadata(tokenizer_dir)


@dataclass
class Part:
    """The language model or the vision part: what becomes of its tensors, and the files that they go to."""

    plan: Plan
    layouts: Mapping[Path, Layout]
    writers: list[GGUFWriter] = field(default_factory=list)


def _vision_part(
    row: Projector, config: PreTrainedConfig, processor_dir: str | Path, source: TensorSource, types: Mapping[Path, FileType]
) -> Part:
    planned = plan_vision(row, config, source.shapes, break_token(processor_dir))
    target = FILE_TYPES["f32" if all(target.name == "f32" for target in types.values()) else "f16"]
    infos = [TensorInfo(name, shape, vision_type(name, shape, target)) for name, shape in planned.shapes.items()]
    metadata = vision_metadata(row, config, normalisation(Path(processor_dir))) | target.metadata
    return Part(planned, {mmproj_path(next(iter(types))): plan(metadata, infos)})


def break_token(directory: str | Path) -> int | None:
    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json")).token_to_id("[IMG_BREAK]")


def _model_shape(config: PreTrainedConfig, planned: Plan, imatrix: bool) -> mixtures.ModelShape:
    text = config.get_text_config()
    expert_shapes = [shape for name, shape in planned.shapes.items() if name.endswith("_exps.weight")]
    return mixtures.ModelShape(
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=kv_heads(text),
        experts=expert_shapes[0][0] if expert_shapes else 0,
        tied="output.weight" not in planned.shapes,
        imatrix=imatrix,
    )


def file_types(config: PreTrainedConfig, planned: Plan, file: GGUFFile) -> list[str]:
    """The file types whose tensors have the types of those in ``file``; none for a mixture of one's own."""
    models = [_model_shape(config, planned, imatrix) for imatrix in (False, True)]
    stored = {name: info.type for name, info in file.tensors.items()}

    def fits(target: FileType, model: mixtures.ModelShape) -> bool:
        return all(
            stored.get(name) == mixtures.tensor_type(name, shape, target, model) for name, shape in planned.shapes.items()
        )

    return [name for name, target in FILE_TYPES.items() if any(fits(target, model) for model in models)]


def _layout(
    planned: Plan,
    shared: Mapping[str, Value],
    target: FileType,
    model: mixtures.ModelShape,
    overrides: Mapping[str, TensorType],
) -> Layout:
    strange = [name for name in overrides if name not in planned.shapes]
    if strange:
        raise ValueError(f"overrides names the tensor {strange[0]!r}, which the file does not have.")
    infos = [
        TensorInfo(name, shape, overrides.get(name) or mixtures.tensor_type(name, shape, target, model))
        for name, shape in planned.shapes.items()
    ]
    for kind in {info.type for info in infos}:
        require_quantizer(kind)
    return plan({**shared, **target.metadata}, infos)


def _write_tensors(source: TensorSource, parts: Sequence[Part], importance: Importance) -> None:
    with progress("Writing GGUF", total=len(source.shapes)) as bar:
        for name, tensor in source:
            if tuple(tensor.shape) != tuple(source.shapes[name]):
                raise ValueError(f"{name} was announced as {source.shapes[name]} and came as {tuple(tensor.shape)}.")
            for part in parts:
                for piece in part.plan.pieces.get(name, ()):
                    _write_piece(piece, tensor, importance.get(piece.name), part.writers)
            del tensor  # before there is the next one
            bar.advance(1, note=name)


def _write_piece(piece: Piece, tensor: torch.Tensor, importance: torch.Tensor | None, writers: Sequence[GGUFWriter]) -> None:
    values = piece.transform(tensor)
    values = values.reshape(-1, values.shape[-1])
    start = 0
    if piece.expert is not None:
        start = len(values) * piece.expert
        importance = importance[piece.expert] if importance is not None and importance.ndim > 1 else importance
    by_type: dict[str, list[GGUFWriter]] = defaultdict(list)
    for writer in writers:
        by_type[writer.layout.tensors[piece.name].type.name].append(writer)
    for alike in by_type.values():
        kind = alike[0].layout.tensors[piece.name].type
        for row, encoded in encode_in_chunks(piece.name, values, kind, importance):
            for writer in alike:
                writer.write(piece.name, encoded, start + row)
