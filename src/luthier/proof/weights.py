"""The weights in a GGUF file: against a checkpoint, and against what they were when their proof was written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from luthier.gguf.dequantize import dequantize
from luthier.gguf.imatrix import made_with_importance, read_importance
from luthier.gguf.mmproj import mmproj_path
from luthier.gguf.plan import Piece, Plan
from luthier.gguf.quantize import encode_in_chunks
from luthier.gguf.reader import GGUFFile
from luthier.gguf.source import TensorSource
from luthier.gguf.types import TensorType
from luthier.gguf.writer import THREADS

DAMAGE = 0.05  # fewer blocks than this differ: not another rounding of the weights, but damage
ROWS, DRAWS, DRAWN = 4, (64, 1024), 1 << 19  # of a tensor that differs so little: how often, and with how many weights in
# all, we encode what 16 bits may have stood for
SEVERAL = 2  # bytes, or weights that are stored as they are: beyond a flipped bit
CODES = 4  # in a byte
EXPECTED, SAMPLE = 40, 64  # bytes that a merge changes, of which one may be the only one; rows by which that is estimated
WORSE = 1.5  # times the error of a plain quantisation
BF16_STEP = 2.0**-8  # relative rounding of a model that was in 16 bits on the way
F16_SCALE = 2.0**-10  # relative step of scales
FAR = 4  # times the largest error of a block as we round it
MISFITS, MISFITS_OF_MOVED_SCALES = 2e-4, 0.015  # share of weights that may lie nearer to another code, or further off
MORE_MISFITS = 1.5  # times those of our own rounding
MOVED_SCALES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")  # after their codes were chosen, where there is an importance matrix
# tensor type -> bytes of a block with the lowest bits of its codes, which bits of each those are, and by how much of a step a
# code may be off because its scale was rounded to 16 bits after it
LOWEST_BITS = {
    "Q8_0": (slice(2, 34), 0x01, 0.125), "Q6_K": (slice(0, 128), 0x11, 0.002), "Q5_K": (slice(48, 176), 0x11, 0.002),
    "Q4_K": (slice(16, 144), 0x11, 0.002), "Q3_K": (slice(32, 96), 0x55, 0.002), "Q2_K": (slice(16, 80), 0x55, 0.002),
    "Q5_1": (slice(8, 24), 0x11, 0.035), "Q5_0": (slice(6, 22), 0x11, 0.035), "Q4_1": (slice(4, 20), 0x11, 0.02),
    "Q4_0": (slice(2, 18), 0x11, 0.02),
}  # fmt: skip
SIGNIFICANT, SMALLEST = {torch.bfloat16: 8, torch.float16: 11}, {torch.bfloat16: -133, torch.float16: -24}  # bits, exponent
UNROUNDED = {"F32": 2.0**-20, "F16": 2.0**-11, "BF16": 2.0**-8}  # types without codes, and their relative step
F16_STEP = 2.0**-24  # of numbers near zero in float16


def checksums(file: GGUFFile) -> dict[str, int]:
    """CRC-32 of every tensor, and of all else under the empty name; those of the vision part beside it, too."""
    header = 0
    for part in file.outside():
        header = zlib.crc32(part, header)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = {"": header} | dict(
            zip(file.tensors, pool.map(lambda name: zlib.crc32(file.data(name)), file.tensors), strict=True)
        )
    vision = mmproj_path(file.path)
    if vision == file.path or not vision.is_file():
        return sums
    return sums | {f"{vision.name} {name}".strip(): value for name, value in checksums(GGUFFile(vision)).items()}


def stored_damage(file: GGUFFile) -> list[str]:
    """What has changed in a file since the proof beside it was written."""
    beside = Path(f"{file.path}.proof.json")
    if not beside.is_file():
        return []
    stored, found = json.loads(beside.read_text("utf8"))["checksums"], checksums(file)
    changed = [name or "its header" for name in found if stored.get(name) != found[name]]
    return [f"changed since its proof was written: {', '.join(changed[:5])}"] if changed else []


def compare_weights(
    parts: Sequence[tuple[GGUFFile, Plan]],
    source: TensorSource,
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
) -> tuple[str, list[str]]:
    """Compare every tensor of the files with the checkpoint's, encoded the same way: a summary, and what is wrong.

    ``parts``: the language model's file and the vision part's, each with what becomes of the checkpoint's tensors there.
    """
    importance = read_importance(imatrix)
    missing = [name for file, planned in parts for name in planned.shapes if name not in file.tensors]
    if missing:
        return "not compared", [f"it lacks {', '.join(missing[:5])}"]
    verdicts = [
        (piece.name, _compare(file, piece, tensor, importance.get(piece.name)))
        for name, tensor in source
        for file, planned in parts
        for piece in planned.pieces.get(name, ())
    ]
    identical = sum(verdict == "" for _, verdict in verdicts)
    return f"{identical} of {len(verdicts)} tensors are identical", [f"{name} {wrong}" for name, wrong in verdicts if wrong]


def _compare(file: GGUFFile, piece: Piece, tensor: torch.Tensor, importance: torch.Tensor | None) -> str | None:
    """What is wrong with a tensor, or an expert's part: "" if it is identical, None if it is as good as another rounding.

    ``tensor``: the checkpoint's.
    """
    info, values = file.tensors[piece.name], piece.transform(tensor)
    values = values.reshape(-1, values.shape[-1])
    moved = None
    if tensor.dtype in SIGNIFICANT and values.dtype is not tensor.dtype:  # norms that are stored with one added
        changed = piece.transform(tensor.float() + _half_steps(tensor)) - piece.transform(tensor.float())
        moved = changed.abs().reshape(values.shape)
    start = 0
    if piece.expert is not None:
        start = len(values) * piece.expert
        importance = importance[piece.expert] if importance is not None and importance.ndim > 1 else importance
    if info.shape[-1] != values.shape[-1] or start + len(values) > info.rows:
        return f"has the shape {info.shape}"
    stored = file.data(piece.name)
    blocks, differing = len(values) * values.shape[1] // info.type.block, [0, 0]  # blocks, bytes
    errors, misfits, as_good, unlike_rows = [0.0, 0.0], [0, 0], True, []  # as stored, as we encode; errors squared
    far_off = 0  # blocks
    for row, wanted in encode_in_chunks(piece.name, values, info.type, importance):
        found = torch.from_numpy(stored[start + row : start + row + len(wanted)].copy())
        unlike = found != wanted
        differing[0] += int(unlike.view(-1, info.type.size).any(1).sum())
        differing[1] += int(unlike.sum())
        if differing[0]:
            ours = values[row : row + len(wanted)]
            exact = ours.float()
            for i, data in enumerate((found, wanted)):
                errors[i] += float((dequantize(data.to(exact.device), info.type) - exact).square().sum())
            steps = None if moved is None else moved[row : row + len(wanted)]
            misfits[0] += _fewest_misfits(found.to(exact.device), ours, info.type, steps)
            if importance is not None:
                misfits[1] += misfits_of(wanted.to(exact.device), exact, torch.zeros((), device=exact.device), info.type)
            as_good &= _is_as_good(found, wanted, exact, info.type)
            far_off += _far_off(found, wanted, ours, info.type)
            unlike_rows += (row + unlike.any(1).nonzero().flatten()[: ROWS - len(unlike_rows)]).tolist()
    if not differing[0]:
        return ""
    if differing[0] < max(DAMAGE * blocks, SEVERAL):
        found = torch.from_numpy(stored[[start + row for row in unlike_rows]])
        several = differing[0 if info.type.name in UNROUNDED else 1] >= SEVERAL
        expected = several or _changed_by_a_merge(piece.name, values, info.type, importance) <= EXPECTED
        if as_good and expected and _was_rounded(piece.name, found, values[unlike_rows], info.type, importance, several):
            return None
        return f"differs from the model's in {differing[1]} bytes: it is damaged"
    plain = not made_with_importance(file)
    known = plain or importance is not None
    stored_error, usual = ((error / values.numel()) ** 0.5 for error in errors)
    if known and not stored_error <= WORSE * usual + float(values.float().square().mean().sqrt()) * BF16_STEP:
        return f"is not the model's: its error is {stored_error:.2e}, where {usual:.2e} is usual"
    if plain and importance is None and far_off:
        return f"has {far_off} blocks further from the model's than any rounding puts them: it is damaged"
    share = MISFITS if known or info.type.name not in MOVED_SCALES else MISFITS_OF_MOVED_SCALES
    if misfits[0] > 1 + share * values.numel() + MORE_MISFITS * misfits[1] + 3 * misfits[1] ** 0.5:
        how = "are further off than 16 bits put them" if info.type.name in UNROUNDED else "lie nearer to the code beside"
        given = "" if known else ", or with an importance matrix that moves them far: give it (--imatrix)"
        return f"was rounded from other weights: {misfits[0] / values.numel():.2%} of the model's {how}{given}"
    return None


def _is_as_good(found: torch.Tensor, wanted: torch.Tensor, exact: torch.Tensor, kind: TensorType) -> bool:
    """Whether no block of ``found`` is further from the weights than 16 bits may put it."""
    blocks = exact.view(-1, kind.block)
    stored, ours = ((dequantize(data.to(exact.device), kind).view_as(blocks) - blocks).norm(dim=1) for data in (found, wanted))
    return bool((stored <= WORSE * ours + BF16_STEP * blocks.norm(dim=1)).all())


def _far_off(found: torch.Tensor, wanted: torch.Tensor, values: torch.Tensor, kind: TensorType) -> int:
    """How many blocks of ``found`` hold a weight that is much further off than any of that block as we encode it."""
    if kind.name in UNROUNDED:
        return 0
    exact = values.float()
    moved = _half_steps(values) if values.dtype in SIGNIFICANT else BF16_STEP / 2 * exact.abs()
    stored, ours = ((dequantize(data.to(exact.device), kind) - exact).abs() for data in (found, wanted))
    worst = ours.add(moved).view(-1, kind.block).amax(1).clamp_min(float(ours.square().mean().sqrt()))
    return int((stored.sub(moved).view(-1, kind.block).amax(1) > FAR * worst).sum())


def _was_rounded(
    name: str, found: torch.Tensor, values: torch.Tensor, kind: TensorType, importance: torch.Tensor | None, several: bool
) -> bool:
    """Whether a merge explains how rows ``found`` differ: other weights, which 16 bits round to ``values``, encode to that.

    Such weights are drawn; most of the numbers that differ have to lie among what they give. Unless ``several`` differ, no
    number that is stored as it is may, and where it is more than a code, a whole block has to be what one of the draws gives.
    """
    for dtype in SIGNIFICANT:  # by way of a file in 16 bits
        again = (data for _, data in encode_in_chunks(name, values.to(dtype).float(), kind, importance))
        if values.dtype is not dtype and torch.equal(found, torch.cat([*again])):
            return True
    if values.dtype not in SIGNIFICANT or (not several and kind.name in UNROUNDED):
        return False
    exact = values.float()
    generator = torch.Generator(exact.device).manual_seed(0)
    count = min(max(DRAWN // exact.numel(), DRAWS[0]), DRAWS[1])
    drawn = torch.rand(count, *exact.shape, generator=generator, device=exact.device).mul_(2).sub_(1)
    drawn[::2] = drawn[::2].sign()  # the furthest in every second draw
    drawn = torch.cat([exact[None], drawn.mul_(_half_steps(values)).add_(exact)])
    encoded = torch.cat([data for _, data in encode_in_chunks(name, drawn.flatten(0, 1), kind, importance)])
    given = dequantize(encoded.to(exact.device), kind).view_as(drawn)
    stored = dequantize(found.to(exact.device), kind)
    unlike = stored != given[0]
    if not several and unlike.sum() > CODES:
        blocks = encoded.view(count + 1, -1, kind.size)
        other = (blocks[0] != found.view(-1, kind.size)).any(1)
        return bool((blocks[1:, other] == found.view(-1, kind.size)[other]).all(-1).any(0).all())
    slack = F16_SCALE * stored.abs()  # the draw that reaches a code may have moved the last bit of its scale
    among = (given.amin(0) - slack <= stored) & (stored <= given.amax(0) + slack)
    return int(among[unlike].sum()) * 2 > int(unlike.sum())


def _changed_by_a_merge(name: str, values: torch.Tensor, kind: TensorType, importance: torch.Tensor | None) -> float:
    """How many bytes of a tensor are others if it is made of weights that 16 bits round to ``values``."""
    some = values[:: -(-len(values) // SAMPLE)]
    if some.dtype not in SIGNIFICANT:
        return 0.0
    drawn = torch.rand(some.shape, generator=torch.Generator(some.device).manual_seed(0), device=some.device).mul_(2).sub_(1)
    drawn = drawn.mul_(_half_steps(some)).add_(some.float())
    one, other = (
        torch.cat([data for _, data in encode_in_chunks(name, rows, kind, importance)]) for rows in (drawn, some.float())
    )
    return float((one != other).sum()) * len(values) / len(some)


def _half_steps(values: torch.Tensor) -> torch.Tensor:
    """How far weights may have been from what 16 bits made of them; float32 of the shape of ``values``."""
    exact, smallest = values.float(), SMALLEST[values.dtype]
    exponent = (torch.frexp(exact)[1] - SIGNIFICANT[values.dtype]).clamp_min(smallest)
    return torch.ldexp(torch.full_like(exact, 0.5), exponent).masked_fill(exact == 0, 2.0 ** (smallest - 1))


def _fewest_misfits(found: torch.Tensor, values: torch.Tensor, kind: TensorType, moved: torch.Tensor | None = None) -> int:
    """How many weights lie nearer to the code that differs in its lowest bit, wherever 16 bits moved them from; of a type
    without codes, how many are further off than that. The file may have been made by way of one in 16 bits.
    """
    if moved is None:
        moved = _half_steps(values) if values.dtype in SIGNIFICANT else torch.zeros((), device=values.device)
    fewest = values.numel()
    for dtype in dict.fromkeys((values.dtype, *SIGNIFICANT)):
        fewest = min(fewest, misfits_of(found, values.to(dtype).float(), moved, kind))
        if not fewest:
            break
    return fewest


def misfits_of(found: torch.Tensor, exact: torch.Tensor, moved: torch.Tensor, kind: TensorType) -> int:
    """``moved``: how far the weights may be from ``exact``."""
    stored = dequantize(found, kind)
    if kind.name in UNROUNDED:
        slack = 1.01 * moved + UNROUNDED[kind.name] * exact.abs() + F16_STEP
        return int(((stored - exact).abs() > slack).sum())
    if kind.name not in LOWEST_BITS:
        return 0
    place, bits, late = LOWEST_BITS[kind.name]
    beside = found.clone()
    beside.view(-1, kind.size)[:, place] ^= bits
    other = dequantize(beside, kind)
    return int(((stored - exact).abs() > (other - exact).abs() + 2.02 * moved + late * (stored - other).abs()).sum())
