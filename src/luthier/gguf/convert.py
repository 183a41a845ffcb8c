"""From a Hugging Face checkpoint to GGUF files, tensor by tensor: read -> rename and reorder -> encode -> write.

Peak memory is one tensor, peak disk the files written. Several quantisations come from one reading.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from luthier.errors import UnsupportedError
from luthier.files import atomic_file, require_space
from luthier.gguf import architectures, mixtures
from luthier.gguf.architectures import Architecture
from luthier.gguf.chat import chat_metadata
from luthier.gguf.imatrix import Importance, check_importance, read_importance, require_importance
from luthier.gguf.metadata import kv_heads, metadata, rope_tensors
from luthier.gguf.quantize import encode_in_chunks, require_quantizer
from luthier.gguf.source import CheckpointSource, MemorySource, TensorSource
from luthier.gguf.tokenizer import tokenizer_metadata
from luthier.gguf.types import FileType, file_type
from luthier.gguf.writer import GGUFWriter, Layout, TensorInfo, Value, plan
from luthier.terminal import progress

# parts of a name that only say where the language model sits in a larger model
PREFIX = re.compile(r"^(model\.|language_model\.)*")
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry


@dataclass(frozen=True)
class Piece:
    """What becomes of a checkpoint's tensor: ``transform`` of it is the GGUF tensor ``name``, or its part for one expert."""

    name: str
    expert: int | None
    transform: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """A checkpoint's tensors and what becomes of each, with the shapes of the GGUF tensors."""

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]


def convert_to_gguf(
    model_dir: str | Path,
    out: str | Path,
    quantization_method: str | Sequence[str] = "bf16",
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
) -> list[Path]:
    """Write the model in ``model_dir`` as GGUF and give the paths of the files.

    ``model_dir``: a directory with config.json, safetensors and tokenizer.json. ``out``: a path that ends in ``.gguf``,
    or a directory, where files are named ``<model>-<QUANT>.gguf``. ``quantization_method``: one of `ALLOWED_QUANTS` or
    a list of them, all written in one pass.

    Raises ``FileNotFoundError`` for missing files, ``ValueError`` for a wrong value or a damaged checkpoint,
    ``UnsupportedError`` for what is not covered, all before anything is written.
    """
    model_dir = Path(model_dir)
    outputs = output_paths(out, model_dir.resolve().name, quantization_method)
    config = read_config(model_dir)
    architectures.find(config)
    return write_gguf(config, model_dir, CheckpointSource(model_dir), outputs, imatrix, model_dir.resolve().name)


def read_config(model_dir: str | Path) -> PreTrainedConfig:
    """The configuration in a directory, defaults filled in; ``UnsupportedError`` for a model transformers does not know."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {model_dir} is not the directory of a model.")
    kind = PreTrainedConfig.get_config_dict(model_dir, local_files_only=True)[0].get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"GGUF export does not cover the model type {kind!r} of {path}.")
    return AutoConfig.from_pretrained(model_dir, local_files_only=True)


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
    return {out / f"{name}-{method.upper()}.gguf": method for method in names}


def write_gguf(
    config: PreTrainedConfig,
    tokenizer_dir: str | Path,
    source: TensorSource | Mapping[str, torch.Tensor],
    outputs: Mapping[Path, str],
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
    name: str = "",
) -> list[Path]:
    """Write one file for each entry of ``outputs`` (path -> quantisation) from one pass over ``source``.

    ``source``: checkpoint names and tensors of the model that ``config`` describes, see `TensorSource`. The files
    appear under their names together, at the end.
    """
    architecture = architectures.find(config)
    source = MemorySource(source) if isinstance(source, Mapping) else source
    planned = plan_tensors(architecture, config, source.shapes)
    vocab_size = planned.shapes["token_embd.weight"][0]
    shared = metadata(architecture, config, _safe_name(architecture, name))
    shared |= tokenizer_metadata(tokenizer_dir, vocab_size) | chat_metadata(tokenizer_dir)
    types = {path: file_type(method) for path, method in outputs.items()}
    importance = read_importance(imatrix)
    for target in types.values():
        require_importance(target, importance)
    check_importance(importance, planned.shapes)
    model = _model_shape(config, planned, bool(importance))
    layouts = {path: _layout(planned, shared, target, model) for path, target in types.items()}
    require_space(next(iter(outputs)), sum(layout.size for layout in layouts.values()))
    with contextlib.ExitStack() as stack:
        places = {path: stack.enter_context(atomic_file(path)) for path in outputs}
        with contextlib.ExitStack() as open_files:
            writers = [open_files.enter_context(GGUFWriter(places[path], layout)) for path, layout in layouts.items()]
            _write_tensors(config, source, planned, importance, writers)
    return list(outputs)


def plan_tensors(architecture: Architecture, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Decide what becomes of every tensor; ``ValueError``/``UnsupportedError`` for tensors that are strange or missing."""
    pieces: dict[str, tuple[Piece, ...]] = {}
    unknown: list[str] = []
    for name in shapes:
        found = route(architecture, config, name)
        if found is None:
            unknown.append(name)
        else:
            pieces[name] = found
    if unknown:
        raise UnsupportedError(
            f"GGUF export does not know these tensors of the checkpoint: {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}. A quantised or adapter checkpoint must be merged first."
        )
    result: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in rope_tensors(config).items()}
    experts: dict[str, set[int]] = defaultdict(set)
    for name, found in pieces.items():
        for piece in found:
            shape = tuple(piece.transform(torch.empty(shapes[name], device="meta")).shape)
            if piece.expert is not None:
                experts[piece.name].add(piece.expert)
                shape = (_expert_count(architecture, config), *shape)
            if result.setdefault(piece.name, shape) != shape:
                raise ValueError(f"The checkpoint's experts differ in shape: {piece.name} is {result[piece.name]} and {shape}.")
    _check_complete(architecture, config, result, experts)
    return Plan(pieces, result)


def route(architecture: Architecture, config: PreTrainedConfig, name: str) -> tuple[Piece, ...] | None:
    """What becomes of one tensor: nothing (an empty tuple), some pieces, or None for a name that is not known."""
    short = PREFIX.sub("", name)
    if DERIVED.search(short) or (short == "lm_head.weight" and config.tie_word_embeddings):
        return ()
    module, _, leaf = short.rpartition(".")
    if module in architectures.OUTSIDE and leaf == "weight":
        return (Piece(f"{architectures.OUTSIDE[module]}.{leaf}", None, _norm_offset(architecture, module)),)
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", short)
    if match is None:
        return None
    layer, path = match.groups()
    if path in architecture.split:
        return tuple(Piece(f"blk.{layer}.{target}", None, function) for target, function in architecture.split[path])
    stem = architecture.layer.get(path)  # a parameter that is not a module's weight or bias, such as attention sinks
    if stem is not None:
        return (Piece(f"blk.{layer}.{stem}.weight", None, _same),)
    module, _, leaf = path.rpartition(".")
    expert = re.search(r"(?<=experts\.)\d+(?=\.)", module)
    if expert:
        module = f"{module[: expert.start()]}{{e}}{module[expert.end() :]}"
    if module not in architecture.layer or leaf not in ("weight", "bias"):
        return None
    transform = _rope_order(architecture, config, module) or _norm_offset(architecture, module)
    return (Piece(f"blk.{layer}.{architecture.layer[module]}.{leaf}", int(expert[0]) if expert else None, transform),)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _norm_offset(architecture: Architecture, module: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if architecture.norm_offset and module.endswith("norm"):
        return lambda tensor: tensor.float() + architecture.norm_offset
    return _same


def _rope_order(
    architecture: Architecture, config: PreTrainedConfig, module: str
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """For q and k: rows of a head from (first half, second half) to pairs (one of each), as llama.cpp rotates them."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": kv_heads(config)}.get(module)
    if heads is None or not architecture.interleaved_rope:
        return None
    return lambda tensor: tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _expert_count(architecture: Architecture, config: PreTrainedConfig) -> int:
    return getattr(config, architecture.keys["expert_count"]) if "expert_count" in architecture.keys else 0


def _check_complete(
    architecture: Architecture,
    config: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    experts: Mapping[str, set[int]],
) -> None:
    """Collect what the checkpoint lacks and raise once."""
    targets = [f"{stem}.weight" for stem in architecture.layer.values()]
    targets += [target for row in architecture.split.values() for target, _ in row]
    wanted = [f"blk.{i}.{target}" for i in range(config.num_hidden_layers) for target in targets]
    wanted += ["token_embd.weight", "output_norm.weight"] + ([] if config.tie_word_embeddings else ["output.weight"])
    missing = [name for name in wanted if name not in shapes]
    count = _expert_count(architecture, config)
    missing += [f"an expert of {name}" for name, found in experts.items() if found != set(range(count))]
    extra = [name for name in shapes if name.startswith("blk.") and int(name.split(".")[1]) >= config.num_hidden_layers]
    if missing or extra:
        raise ValueError(
            "The checkpoint does not fit its config.json: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
                for what, names in (("it lacks", missing), ("it has layers too many:", extra))
                if names
            )
        )


def _safe_name(architecture: Architecture, name: str) -> str:
    """``general.name``; left out where llama.cpp would take the name itself for a promise about the tokenizer."""
    return "" if architecture.name == "phi3" else name


def _model_shape(config: PreTrainedConfig, planned: Plan, imatrix: bool) -> mixtures.ModelShape:
    expert_shapes = [shape for name, shape in planned.shapes.items() if name.endswith("_exps.weight")]
    return mixtures.ModelShape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        experts=expert_shapes[0][0] if expert_shapes else 0,
        tied="output.weight" not in planned.shapes,
        imatrix=imatrix,
    )


def _layout(planned: Plan, shared: Mapping[str, Value], target: FileType, model: mixtures.ModelShape) -> Layout:
    infos = [
        TensorInfo(name, shape, mixtures.tensor_type(name, shape, target, model)) for name, shape in planned.shapes.items()
    ]
    for kind in {info.type for info in infos}:
        require_quantizer(kind)
    return plan({**shared, **target.metadata}, infos)


def _write_tensors(
    config: PreTrainedConfig, source: TensorSource, planned: Plan, importance: Importance, writers: Sequence[GGUFWriter]
) -> None:
    for name, tensor in rope_tensors(config).items():
        _write_piece(Piece(name, None, _same), tensor, None, writers)
    with progress("Writing GGUF", total=len(planned.pieces)) as bar:
        for name, tensor in source:
            if tuple(tensor.shape) != tuple(source.shapes[name]):
                raise ValueError(f"{name} was announced as {source.shapes[name]} and came as {tuple(tensor.shape)}.")
            for piece in planned.pieces[name]:
                _write_piece(piece, tensor, importance.get(piece.name), writers)
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
    for same in by_type.values():
        kind = same[0].layout.tensors[piece.name].type
        for row, encoded in encode_in_chunks(piece.name, values, kind, importance):
            for writer in same:
                writer.write(piece.name, encoded, start + row)
