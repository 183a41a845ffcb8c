"""Attention in tiles, for what torch's own kernels do not know: soft caps, and windows and packed rows on every card.

    scores = cap(scale * q @ k.T)          cap(z) = softcap * tanh(z / softcap), or z
    out    = softmax(scores, over the keys that a query sees) @ v

What a query sees is an interval of keys (``Band``): a causal mask, a window, packed sequences and padding at either end
are all of that kind, so one kernel with two numbers a token knows them all and skips what lies outside. Forward and
backward keep one number a row, ``rows`` = log(sum(exp(scores))). The backward takes any ``out`` and ``rows`` that
belong together, so an attention sink is added to them afterwards (``ops.attention``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops.backend import jit, power_of_2, tl, triton
from luthier.ops.bands import Band

LOG2E = math.log2(math.e)
SCORES = 1 << 24  # that the reference holds at a time


def flash_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Band | Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> (out (B, H, T, D) in q's dtype, rows (B, H, T) fp32), some queries at a time.

    ``seen`` is a band (T = S) or a mask (B or 1, 1, T, S), bool (True: seen) or additive. A query that sees nothing gets 0.
    """
    outputs, rows = [], []
    for chunk, keys, hidden in _chunks(q, k, seen):
        scores, _ = _scores(_grouped(q[:, :, chunk], k), k[:, :, keys], scale, hidden, softcap)
        row = scores.logsumexp(-1)
        probabilities = scores.softmax(-1).masked_fill_((row == float("-inf")).unsqueeze(-1), 0.0)
        out = _product(probabilities, v[:, :, keys])
        outputs.append(out.view(*q.shape[:2], -1, v.shape[-1]).to(q.dtype))
        rows.append(row.view(*q.shape[:2], -1))
    return torch.cat(outputs, dim=2), torch.cat(rows, dim=2)


def flash_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rows: Tensor,
    scale: float,
    seen: Band | Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes and dtypes, from that of the output."""
    dq, dk, dv = torch.empty_like(q), _wide(torch.zeros_like(k)), _wide(torch.zeros_like(v))
    for chunk, keys, hidden in _chunks(q, k, seen):
        queries, given = _grouped(q[:, :, chunk], k), _grouped(grad[:, :, chunk], k)
        scores, slope = _scores(queries, k[:, :, keys], scale, hidden, softcap)
        row = _grouped(rows[:, :, chunk, None], k)
        probabilities = (scores - row.masked_fill(row == float("-inf"), 0.0)).exp_()
        delta = (_wide(given) * _wide(_grouped(out[:, :, chunk], k))).sum(-1, keepdim=True)
        dv[:, :, keys] += _product(probabilities.mT, given)
        of_scores = probabilities * (_product(given, v[:, :, keys].mT) - delta) * scale
        of_scores = of_scores if slope is None else of_scores * slope
        dq[:, :, chunk] = _product(of_scores, k[:, :, keys]).view(*q.shape[:2], -1, q.shape[-1]).to(q.dtype)
        dk[:, :, keys] += _product(of_scores.mT, queries)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _chunks(q: Tensor, k: Tensor, seen: Band | Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, the keys that any of them sees, their mask as something to add) a chunk."""
    batch, heads, length, _ = q.shape
    rows = max(16, SCORES // (batch * heads * k.shape[2]))
    for start in range(0, length, rows):
        chunk, keys = slice(start, min(start + rows, length)), slice(0, k.shape[2])
        if isinstance(seen, Band):
            keys = slice(int(seen.first[:, chunk].min()), int(seen.last[:, chunk].max()) + 1)
        mask = seen.sees(chunk)[..., keys] if isinstance(seen, Band) else seen[:, :, chunk]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float32, device=q.device).masked_fill_(~mask, float("-inf"))
        yield chunk, keys, mask.repeat(1, 1, heads // k.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(scores, the cap's derivative there), with ``-inf`` or what else ``hidden`` adds."""
    scores = _product(q, k.mT) * scale
    if softcap is None:
        return scores + hidden, None
    capped = torch.tanh(scores / softcap)
    return softcap * capped + hidden, 1 - capped.square()


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, t, D) -> (B, Hkv, group * t, D): the queries of all heads that read the same keys, one below the other."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, or fp64; a GPU multiplies 16 bits as they are, with sums in fp32, so ``a`` is rounded to b's dtype."""
    if b.is_cuda and b.itemsize == 2:
        return torch.bmm(a.flatten(0, 1).to(b.dtype), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, b.shape[:2])
    return _wide(a) @ _wide(b)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: rows of its own tile, rows of the tiles it walks over, warps, and loads under way."""

    own: int
    walked: int
    warps: int
    stages: int


# capability -> kernel -> width of a head (at most) -> tiles; a card takes the row of the largest capability not above its own
TILES: dict[tuple[int, int], dict[str, dict[int, Tiles]]] = {
    (8, 0): {
        "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 4, 2)},
        "dq": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 1)},
        "dkdv": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 1)},
    },
    (8, 6): {
        "forward": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 32, 4, 2), 256: Tiles(64, 32, 4, 1)},
        "dq": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
        "dkdv": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
    },
    (9, 0): {
        "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(128, 64, 8, 2)},
        "dq": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(128, 32, 8, 2)},
        "dkdv": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 64, 8, 1)},
    },
}
ALIKE = {(8, 7): (8, 0), (12, 0): (8, 6), (12, 1): (8, 6)}  # cards whose shared memory and products are those of older ones


def tiles(kernel: str, width: int, capability: tuple[int, int]) -> Tiles:
    """From the table; ``width`` is the head's, rounded up to a power of two."""
    capability = ALIKE.get(capability, capability)
    row = TILES[max(known for known in TILES if known <= max(capability, (8, 0)))]
    return row[kernel][max(64, width)]


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """``flash_reference`` in one kernel. The elements of a head must lie side by side; D is at most 256."""
    batch, heads, length, width = q.shape
    out = _by_tokens(q)
    rows = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    cut, constants = _launch("forward", q, softcap)
    _forward[(triton.cdiv(length, cut.own), batch * heads)](
        q, k, v, out, rows, band.first, band.last, *_strides(q, k, v, out), length, heads, heads // k.shape[1],
        _row_stride(band), *_factors(scale, softcap), OWN=cut.own, WALKED=cut.walked, **constants,
    )  # fmt: skip
    return out, rows


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rows: Tensor,
    scale: float,
    band: Band,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``flash_backward_reference`` in two kernels: one walks over keys for dq, one over queries for dk and dv."""
    batch, heads, length, width = q.shape
    group, factors = heads // k.shape[1], _factors(scale, softcap)
    dq, dk, dv = _by_tokens(q), _by_tokens(k), _by_tokens(v)
    delta = torch.empty_like(rows)
    cut, constants = _launch("dq", q, softcap)
    _backward_q[(triton.cdiv(length, cut.own), batch * heads)](
        q, k, v, out, grad, dq, rows, delta, band.first, band.last, *_strides(q, k, v, out, grad, dq), length, heads, group,
        _row_stride(band), *factors, OWN=cut.own, WALKED=cut.walked, **constants,
    )  # fmt: skip
    cut, constants = _launch("dkdv", q, softcap)
    for of_k, of_v in ((True, True),) if width <= 128 else ((False, True), (True, False)):  # both would not fit into registers
        _backward_kv[(triton.cdiv(length, cut.own), batch * k.shape[1])](
            q, k, v, grad, dk, dv, rows, delta, band.first_query, band.last_query, *_strides(q, k, v, grad, dk, dv), length,
            heads, group, _row_stride(band), *factors, OWN=cut.own, WALKED=cut.walked, OF_K=of_k, OF_V=of_v, **constants,
        )  # fmt: skip
    return dq, dk, dv


def _launch(kernel: str, q: Tensor, softcap: float | None) -> tuple[Tiles, dict]:
    width = max(16, power_of_2(q.shape[-1]))
    cut = tiles(kernel, width, torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0))
    constants = {"D": q.shape[-1], "WIDTH": width, "CAPPED": softcap is not None}
    return cut, {**constants, "num_warps": cut.warps, "num_stages": cut.stages}


def _by_tokens(like: Tensor) -> Tensor:
    """(B, H, T, D) in which a token's heads lie side by side."""
    batch, heads, length, width = like.shape
    return torch.empty(batch, length, heads, width, dtype=like.dtype, device=like.device).transpose(1, 2)


def _strides(*tensors: Tensor) -> Iterator[int]:
    return (stride for tensor in tensors for stride in tensor.stride()[:3])


def _row_stride(band: Band) -> int:
    return 0 if band.first.shape[0] == 1 else band.first.stride(0)


def _factors(scale: float, softcap: float | None) -> tuple[float, float, float]:
    """(of q @ k, of what comes out of the cap, of the gradient): the kernels' scores are in powers of two."""
    return (scale * LOG2E, 1.0, scale) if softcap is None else (scale / softcap, softcap * LOG2E, scale)


@jit
def _load(X, row, stride, length, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """(rows, WIDTH), zeros outside of (length, D)."""
    column = tl.arange(0, WIDTH)
    at = X + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=(row < length)[:, None] & (column < D)[None, :], other=0.0)
    if WIDTH != D:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tl.load(at)


@jit
def _store(X, value, row, stride, length, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = X + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, value.to(X.dtype.element_ty), mask=(row < length)[:, None] & (column < D)[None, :])


@jit
def _blocks(FIRST, LAST, row, length, WALKED: tl.constexpr):
    """The interval of each row, and what of it to walk over in blocks.

    (first, last, block where it begins, blocks before the whole ones, first whole block, block behind the last whole one,
    blocks that are not whole): a whole block is seen by every row.
    """
    at = tl.minimum(row, length - 1)
    first, last = tl.load(FIRST + at), tl.minimum(tl.load(LAST + at), length - 1)  # a band may be cut from a longer one
    begin = tl.min(first, 0) // WALKED
    end = tl.maximum(tl.cdiv(tl.max(last, 0) + 1, WALKED), begin)
    whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, 0), WALKED), begin), end)
    behind = tl.maximum(tl.minimum((tl.min(last, 0) + 1) // WALKED, end), whole)
    before = whole - begin
    return first, last, begin, before, whole, behind, before + end - behind


@jit
def _scored(a, b, factor, height, CAPPED: tl.constexpr):
    """(scores a @ b.T in powers of two, the derivative of the cap)."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee") * factor
    slope = 1.0
    if CAPPED:  # tanh: what cancels near zero is a bit of the cap, far below one of the scores' own in 16 bits
        x = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
        slope = 1.0 - x * x
        x = x * height
    return x, slope


@jit
def _walk_keys(
    acc, total, peak, q, K, V, first, last, begin, before, behind, start, stop, k_token, v_token, length, factor, height,
    D: tl.constexpr, WIDTH: tl.constexpr, WALKED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for index in range(start, stop):
        block = tl.where(index < before, begin + index, behind + index - before) if MASKED else index
        key = block * WALKED + tl.arange(0, WALKED)
        k = _load(K, key, k_token, length, D, WIDTH, MASKED)
        scores, _ = _scored(q, k, factor, height, CAPPED)
        if MASKED:
            seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new) if MASKED else new
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v = _load(V, key, v_token, length, D, WIDTH, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new
    return acc, total, peak


@jit
def _forward(
    Q, K, V, OUT, ROWS, FIRST, LAST, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, length, heads, group, band_row, factor, height, scale,
    OWN: tl.constexpr, WALKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN + tl.arange(0, OWN)  # the longest first
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    q = _load(Q + batch * q_batch + head * q_head, row, q_token, length, D, WIDTH, True)
    bands = FIRST + batch * band_row, LAST + batch * band_row
    first, last, begin, before, whole, behind, rest = _blocks(bands[0], bands[1], row, length, WALKED)
    acc = tl.zeros((OWN, WIDTH), tl.float32)
    total, peak = tl.zeros((OWN,), tl.float32), tl.full((OWN,), -float("inf"), tl.float32)
    acc, total, peak = _walk_keys(
        acc, total, peak, q, K, V, first, last, begin, before, behind, whole, behind, k_token, v_token, length, factor,
        height, D, WIDTH, WALKED, CAPPED, False,
    )  # fmt: skip
    acc, total, peak = _walk_keys(
        acc, total, peak, q, K, V, first, last, begin, before, behind, 0, rest, k_token, v_token, length, factor,
        height, D, WIDTH, WALKED, CAPPED, True,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store(OUT + batch * out_batch + head * out_head, acc, row, out_token, length, D, WIDTH)
    rows = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(ROWS + tl.program_id(1).to(tl.int64) * length + row, rows, mask=row < length)


@jit
def _walk_keys_back(
    acc, q, grad, K, V, rows, delta, first, last, begin, before, behind, start, stop, k_token, v_token, length, factor,
    height, D: tl.constexpr, WIDTH: tl.constexpr, WALKED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for index in range(start, stop):
        block = tl.where(index < before, begin + index, behind + index - before) if MASKED else index
        key = block * WALKED + tl.arange(0, WALKED)
        k = _load(K, key, k_token, length, D, WIDTH, MASKED)
        v = _load(V, key, v_token, length, D, WIDTH, MASKED)
        scores, slope = _scored(q, k, factor, height, CAPPED)
        p = tl.exp2(scores - rows[:, None])
        if MASKED:
            p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None]), p, 0.0)
        of_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        of_scores = p * (of_p - delta[:, None]) * slope
        acc = tl.dot(of_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@jit
def _backward_q(
    Q, K, V, OUT, GRAD, DQ, ROWS, DELTA, FIRST, LAST, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, out_batch, out_head, out_token, grad_batch, grad_head, grad_token,
    dq_batch, dq_head, dq_token, length, heads, group, band_row, factor, height, scale,
    OWN: tl.constexpr, WALKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN + tl.arange(0, OWN)
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    q = _load(Q + batch * q_batch + head * q_head, row, q_token, length, D, WIDTH, True)
    grad = _load(GRAD + batch * grad_batch + head * grad_head, row, grad_token, length, D, WIDTH, True)
    out = _load(OUT + batch * out_batch + head * out_head, row, out_token, length, D, WIDTH, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at = tl.program_id(1).to(tl.int64) * length + row
    tl.store(DELTA + at, delta, mask=row < length)
    rows = tl.load(ROWS + at, mask=row < length, other=0.0) * 1.4426950408889634
    bands = FIRST + batch * band_row, LAST + batch * band_row
    first, last, begin, before, whole, behind, rest = _blocks(bands[0], bands[1], row, length, WALKED)
    acc = tl.zeros((OWN, WIDTH), tl.float32)
    acc = _walk_keys_back(
        acc, q, grad, K, V, rows, delta, first, last, begin, before, behind, whole, behind, k_token, v_token, length,
        factor, height, D, WIDTH, WALKED, CAPPED, False,
    )  # fmt: skip
    acc = _walk_keys_back(
        acc, q, grad, K, V, rows, delta, first, last, begin, before, behind, 0, rest, k_token, v_token, length,
        factor, height, D, WIDTH, WALKED, CAPPED, True,
    )  # fmt: skip
    _store(DQ + batch * dq_batch + head * dq_head, acc * scale, row, dq_token, length, D, WIDTH)


@jit
def _walk_queries_back(
    dk, dv, k, v, Q, GRAD, ROWS, DELTA, first, last, begin, before, behind, start, stop, q_token, grad_token, length, factor,
    height, D: tl.constexpr, WIDTH: tl.constexpr, WALKED: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for index in range(start, stop):
        block = tl.where(index < before, begin + index, behind + index - before) if MASKED else index
        row = block * WALKED + tl.arange(0, WALKED)
        q = _load(Q, row, q_token, length, D, WIDTH, MASKED)
        grad = _load(GRAD, row, grad_token, length, D, WIDTH, MASKED)
        rows = tl.load(ROWS + row, mask=row < length, other=0.0) * 1.4426950408889634
        scores, slope = _scored(k, q, factor, height, CAPPED)
        p = tl.exp2(scores - rows[None, :])
        if MASKED:
            p = tl.where((row[None, :] >= first[:, None]) & (row[None, :] <= last[:, None]), p, 0.0)
        if OF_V:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        if OF_K:
            delta = tl.load(DELTA + row, mask=row < length, other=0.0)
            of_scores = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :]) * slope
            dk = tl.dot(of_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@jit
def _backward_kv(
    Q, K, V, GRAD, DK, DV, ROWS, DELTA, FIRST, LAST, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, grad_batch, grad_head, grad_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    length, heads, group, band_row, factor, height, scale, OWN: tl.constexpr, WALKED: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    key = tl.program_id(0) * OWN + tl.arange(0, OWN)
    k = _load(K + batch * k_batch + kv_head * k_head, key, k_token, length, D, WIDTH, True)
    v = _load(V + batch * v_batch + kv_head * v_head, key, v_token, length, D, WIDTH, True)
    bands = FIRST + batch * band_row, LAST + batch * band_row
    first, last, begin, before, whole, behind, rest = _blocks(bands[0], bands[1], key, length, WALKED)
    dk, dv = tl.zeros((OWN, WIDTH), tl.float32), tl.zeros((OWN, WIDTH), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        queries = Q + batch * q_batch + head * q_head
        grads = GRAD + batch * grad_batch + head * grad_head
        offset = (batch * heads + head) * length
        dk, dv = _walk_queries_back(
            dk, dv, k, v, queries, grads, ROWS + offset, DELTA + offset, first, last, begin, before, behind, whole, behind,
            q_token, grad_token, length, factor, height, D, WIDTH, WALKED, OF_K, OF_V, CAPPED, False,
        )  # fmt: skip
        dk, dv = _walk_queries_back(
            dk, dv, k, v, queries, grads, ROWS + offset, DELTA + offset, first, last, begin, before, behind, 0, rest,
            q_token, grad_token, length, factor, height, D, WIDTH, WALKED, OF_K, OF_V, CAPPED, True,
        )  # fmt: skip
    if OF_K:
        _store(DK + batch * dk_batch + kv_head * dk_head, dk * scale, key, dk_token, length, D, WIDTH)
    if OF_V:
        _store(DV + batch * dv_batch + kv_head * dv_head, dv, key, dv_token, length, D, WIDTH)
