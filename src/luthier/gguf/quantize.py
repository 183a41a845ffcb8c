"""Weights to the bytes of a tensor type, and whole files from one type to another."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from luthier.errors import UnsupportedError
from luthier.files import atomic_file, require_space
from luthier.gguf import blocks, kquants, mixtures, weighted
from luthier.gguf.imatrix import Importance, check_importance, importance_metadata, read_importance, require_importance
from luthier.gguf.reader import GGUFFile
from luthier.gguf.types import PLAIN_DTYPES, FileType, TensorType, file_type
from luthier.gguf.writer import GGUFWriter, Layout, TensorInfo, Value, plan
from luthier.terminal import progress

CHUNK = 1 << (19 if blocks.compiled is None else 20)  # weights that a thread of the CPU encodes at once: about its cache
CUDA_CHUNK = 1 << 24
LARGEST_HALF = 65504.0
LARGEST_WEIGHTED = 1e17  # whose squares, added up with the importance of their columns, leave float32

# tensor type -> float32 [G, weights of a block] -> uint8 [G, bytes of a block]
QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": blocks.quantize_q4_0,
    "Q4_1": blocks.quantize_q4_1,
    "Q5_0": blocks.quantize_q5_0,
    "Q5_1": blocks.quantize_q5_1,
    "Q8_0": blocks.quantize_q8_0,
    "Q2_K": kquants.quantize_q2_k,
    "Q3_K": kquants.quantize_q3_k,
    "Q4_K": kquants.quantize_q4_k,
    "Q5_K": kquants.quantize_q5_k,
    "Q6_K": kquants.quantize_q6_k,
}
# the same with an importance matrix, see weighted.py; Q8_0 takes none
WEIGHTED_QUANTIZERS = {
    "Q4_0": weighted.quantize_q4_0,
    "Q4_1": weighted.quantize_q4_1,
    "Q5_0": weighted.quantize_q5_0,
    "Q5_1": weighted.quantize_q5_1,
    "Q2_K": weighted.quantize_q2_k,
    "Q3_K": weighted.quantize_q3_k,
    "Q4_K": weighted.quantize_q4_k,
    "Q5_K": weighted.quantize_q5_k,
    "Q6_K": weighted.quantize_q6_k,
}


def require_quantizer(kind: TensorType) -> None:
    """``UnsupportedError`` for a tensor type that cannot be written."""
    if kind.name not in PLAIN_DTYPES and kind.name not in QUANTIZERS:
        names = ", ".join((*PLAIN_DTYPES, *QUANTIZERS))
        raise UnsupportedError(f"Luthier cannot write {kind.name} tensors. It can write {names}.")


def encode(values: torch.Tensor, kind: TensorType, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float ``[rows, columns]`` -> uint8 ``[rows, bytes of a row]``, on the device of ``values``.

    ``importance``: float32 ``[rows, columns]``, how much the error of each weight counts (may be an expanded view).
    """
    rows, columns = values.shape
    if kind.name in PLAIN_DTYPES:
        return values.to(PLAIN_DTYPES[kind.name]).contiguous().view(torch.uint8).view(rows, -1)
    x = values.float().reshape(-1, kind.block)
    if importance is None or kind.name not in WEIGHTED_QUANTIZERS:
        encoded = QUANTIZERS[kind.name](x)
    else:
        encoded = WEIGHTED_QUANTIZERS[kind.name](x, importance.reshape(-1, kind.block), _mean_square(x, kind, columns))
    return encoded.view(rows, kind.row_bytes(columns))


def _mean_square(x: torch.Tensor, kind: TensorType, columns: int) -> torch.Tensor:
    """``[B]``: the mean square of a superblock, or of the whole row that a block of 32 is part of."""
    span = kind.block if kind.block == 256 else columns
    spans = blocks.groups_of(x, span)
    mean = blocks.ordered_sum(spans * spans) / torch.full_like(spans[0], float(span))
    return mean.repeat_interleave(span // kind.block)


def encode_in_chunks(
    name: str, values: torch.Tensor, kind: TensorType, importance: torch.Tensor | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Encode the tensor ``name`` piece by piece: yields (first row, uint8 ``[some rows, bytes of a row]`` on the CPU).

    On the GPU where there is one, else on as many threads as torch is set to. ``importance``: float32 ``[columns]``, or
    ``[experts, columns]`` for the stacked weights of experts. ``ValueError`` for values that cannot be stored.
    """
    rows, columns = values.shape
    on_gpu = values.is_cuda or (torch.cuda.is_available() and kind.name not in PLAIN_DTYPES)
    step = max(1, (CUDA_CHUNK if on_gpu else CHUNK) // columns)
    starts = range(0, rows, step)

    def encode_from(first: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The row, what is encoded from there on, and the largest magnitude that went into it (NaN if any is)."""
        chunk = values[first : first + step]
        chunk = chunk.cuda() if on_gpu else chunk
        weights = None if importance is None else _importance_of_rows(importance.to(chunk.device), rows, first, len(chunk))
        return first, encode(chunk, kind, weights), chunk.abs().amax()

    if on_gpu:
        results = _copied_to_host(map(encode_from, starts))
    elif len(starts) == 1:
        results = map(encode_from, starts)
    else:
        results = _in_threads(encode_from, starts)
    for first, encoded, largest in results:
        _check_range(name, largest.item(), kind, importance is not None)
        yield first, encoded


def _in_threads(function: Callable, arguments: Iterable) -> Iterator:
    """The results in order, a few computed ahead and not all."""
    with _one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future] = deque()
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _copied_to_host(results: Iterable[tuple]) -> Iterator[tuple]:
    """Tuples of a number and tensors on the GPU, the tensors on the CPU: the GPU is a tuple or two ahead of who takes them."""
    waiting: deque[tuple] = deque()
    for first, *tensors in results:
        host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for place, tensor in zip(host, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        waiting.append((copied, first, *host))
        if len(waiting) > 2:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(copied: torch.cuda.Event, *result: object) -> tuple:
    copied.synchronize()
    return result


def _importance_of_rows(importance: torch.Tensor, rows: int, first: int, count: int) -> torch.Tensor:
    """float32 ``[count, columns]`` for ``count`` of ``rows`` rows that are shared out evenly between the experts."""
    experts = importance.float().reshape(-1, importance.shape[-1])
    if len(experts) == 1:
        return experts.expand(count, -1)
    return experts[torch.arange(first, first + count, device=experts.device) // (rows // len(experts))]


@contextlib.contextmanager
def _one_thread_an_operation() -> Iterator[int]:
    """Torch's own threads wait for each other after every operation; here each works on its own chunk instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _check_range(name: str, largest: float, kind: TensorType, weighted: bool) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"The tensor {name} holds NaN or infinite values: the checkpoint is damaged or its training diverged.")
    if largest > LARGEST_HALF and kind.name == "F16":
        raise ValueError(f"The tensor {name} holds {largest:g}; float16 ends at 65504. Choose bf16.")
    if largest >= LARGEST_WEIGHTED and weighted and kind.name in WEIGHTED_QUANTIZERS:
        raise ValueError(
            f"The tensor {name} holds {largest:g}; with an importance matrix, errors of weights from {LARGEST_WEIGHTED:g} on "
            f"overflow in {kind.name}. Choose bf16."
        )


def quantize_gguf(
    input: str | Path,
    output: str | Path,
    quant_type: str,
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the GGUF file ``input`` (f32, f16 or bf16) as ``output`` in ``quant_type``, one of `ALLOWED_QUANTS`.

    ``imatrix``: an importance matrix, a file or tensors by name. Raises ``FileNotFoundError``, ``ValueError`` for a file
    that cannot be read, ``UnsupportedError`` for one that is already quantised; nothing is left behind then.
    """
    target = file_type(quant_type)
    source = GGUFFile(input)
    importance = read_importance(imatrix)
    require_importance(target, importance)
    check_importance(importance, {name: info.shape for name, info in source.tensors.items()})
    quantised = [name for name, info in source.tensors.items() if info.type.name not in PLAIN_DTYPES]
    if quantised:
        kind = source.tensors[quantised[0]].type.name
        raise UnsupportedError(f"{input} is already quantised ({kind}); start from a file of type f32, f16 or bf16.")
    layout = _quantised_layout(source, target, importance)
    require_space(output, layout.size)
    with atomic_file(output) as place, GGUFWriter(place, layout) as writer:
        with progress("Quantising", total=len(layout.tensors)) as bar:
            for name, info in layout.tensors.items():
                _requantise(source, info, importance, writer)
                bar.advance(1, note=name)
    return Path(output)


def _quantised_layout(source: GGUFFile, target: FileType, importance: Importance) -> Layout:
    model = _shape_of(source, bool(importance))
    infos = []
    for name, info in source.tensors.items():
        kind = mixtures.tensor_type(name, info.shape, target, model)
        kept = kind.name == "F32" and target.name != "f32"  # what is never quantised stays as it is
        infos.append(TensorInfo(name, info.shape, info.type if kept else kind))
    metadata: dict[str, Value] = {**source.encoded, **target.metadata, **importance_metadata(importance)}
    return plan(metadata, infos)


def _requantise(source: GGUFFile, info: TensorInfo, importance: Importance, writer: GGUFWriter) -> None:
    before = source.tensors[info.name].type
    if before == info.type:
        writer.write(info.name, source.read(info.name))
        return
    values = source.read(info.name, "cuda" if torch.cuda.is_available() else "cpu").view(PLAIN_DTYPES[before.name])
    for row, encoded in encode_in_chunks(info.name, values, info.type, importance.get(info.name)):
        writer.write(info.name, encoded, row)


def _shape_of(source: GGUFFile, imatrix: bool) -> mixtures.ModelShape:
    name = source.metadata.get("general.architecture")

    def number(key: str, default: int | None = None) -> int:
        value = source.metadata.get(f"{name}.{key}", default)
        if value is None:
            raise ValueError(f"{source.path} does not say {name}.{key}: it is not the file of a language model.")
        return int(value) if isinstance(value, int) else int(max(value))  # a list has one number for each layer

    heads = number("attention.head_count")
    return mixtures.ModelShape(
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        experts=number("expert_count", 0),
        tied="output.weight" not in source.tensors,
        imatrix=imatrix,
    )
