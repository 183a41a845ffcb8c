"""The logits of a GGUF file against the trained model's, and how far apart they may be.

A table says what each type usually costs (docs/gguf.md). Some models lose more by the same rounding, one of random weights
most. Of these the two things that logits depend on are judged apart: what stands in the header, by computing the model's own
weights as it says; and the weights, which are compared one by one (`tensors.py`), by what errors of their size cost.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.gguf.dequantize import load_tensor
from luthier.gguf.reader import GGUFFile
from luthier.proof.gguf_model import GGUFModel
from luthier.proof.reference import Reference
from luthier.proof.tensors import TensorComparison

# file type -> KL divergence from the trained model that is still allowed, mean over positions, in nats: about five times
# what is usual (docs/gguf.md), as models of a few hundred million parameters lose more than those of eight billion
THRESHOLDS = {
    "f32": 1e-8, "f16": 1e-4, "bf16": 2e-3, "q8_0": 1e-3, "q6_k": 0.025, "q5_k_m": 0.05, "q5_k_s": 0.08, "q5_1": 0.09,
    "q5_0": 0.11, "q4_k_m": 0.15, "q4_k_s": 0.2, "q4_1": 0.35, "q4_0": 0.35, "q3_k_l": 0.45, "q3_k_m": 0.5, "q3_k_s": 1.1,
    "q2_k": 2.2, "q2_k_s": 3.0,
}  # fmt: skip
F32_GAP = 1e-4  # largest difference of a logit, as a share of the largest logit, in an F32 file
ROUNDINGS = 4  # times what errors of the precision it was computed in cost the model, where that is more than the limit
CHAOS = 1.0  # divergence that the precision of a computation costs a model whose logits say nothing
ERRORS = 10  # times what errors of the size of its weights' do, which are compared one by one
DRAWS = 2  # of the signs of these errors; the one that costs more counts
ROUGH_REFERENCE = 5e-3  # what a reference in 16 bits adds to the divergence
# where two experts are as good, rounding chooses another: of a model with experts, the share of positions that are left out,
# those which diverge most, and what is added for what they do to the others; not where nothing is rounded
TIES, NEAR_TIES = 0.1, 2e-3


@dataclass
class LogitComparison:
    """How the logits of a file compare. ``gap``: the largest difference of one; ``largest``: the largest of the model's."""

    divergence: float
    allowed: float
    gap: float
    largest: float
    agreement: float  # share of positions with the same first choice
    positions: int
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare_logits(
    file: GGUFFile, file_type: str, reference: Reference, found: Sequence[Tensor], tensors: TensorComparison, strange: bool
) -> LogitComparison:
    """Compare ``found``, the file's logits for ``reference.sequences``. ``strange``: something else is wrong with the file, so
    that nothing is allowed beyond the table.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # a directory may hold in 16 bits what the file holds in 32
    strict = file_type == "f32" and reference.exact and not reference.slack
    ties = TIES if f"{file.metadata['general.architecture']}.expert_count" in file.metadata and not strict else 0.0
    result = _plainly_compared(reference.logits, found, device, ties)
    result.allowed = THRESHOLDS.get(file_type, THRESHOLDS["f16"])  # a mixture of one's own is measured
    if ties:
        result.allowed += NEAR_TIES
        result.notes.append(f"the {ties:.0%} of positions that diverge most are left out: rounding chooses other experts there")
    if not reference.exact:
        result.allowed += ROUGH_REFERENCE
        result.notes.append("the model was computed in 16 bits")
    gap = F32_GAP * result.largest if strict else float("inf")
    if not (result.divergence <= result.allowed and result.gap <= gap) and not strange:
        gap = max(gap, _allow_for_errors(file, reference, tensors, device, ties, result))
    if not result.divergence <= result.allowed:
        result.failures.append(f"its logits diverge by {result.divergence:.2e}, allowed {result.allowed:.2e}")
    if not result.gap <= gap:
        result.failures.append(f"a logit is off by {result.gap:.2e}")
    return result


def _plainly_compared(wanted: Sequence[Tensor], found: Sequence[Tensor], device: str, ties: float) -> LogitComparison:
    result = LogitComparison(_divergence(wanted, found, device, ties), 0.0, 0.0, 1.0, 0.0, sum(map(len, wanted)))
    for one, two in zip(wanted, found, strict=True):
        one, two = one.to(device), two[:, : one.shape[-1]].to(device)
        result.gap = max(result.gap, float((one - two).abs().max()))
        result.largest = max(result.largest, float(one.abs().max()))
        result.agreement += int((one.argmax(-1) == two.argmax(-1)).sum()) / result.positions
    return result


def _allow_for_errors(
    file: GGUFFile, reference: Reference, tensors: TensorComparison, device: str, ties: float, result: LogitComparison
) -> float:
    """Allow what errors of the size of the file's cost this model, measured on its own weights: the largest gap of a logit.

    First these have to give the model's logits when they are computed as the header says, but for the precision that the
    model was computed in.
    """

    def computed(errors: bool, draw: int, jitter: float) -> list[Tensor]:
        def tensor(name: str) -> Tensor:
            own = tensors.trained(name, device)
            return own + _signs(name, draw, own) * (load_tensor(file, name, device) - own) if errors else own

        return GGUFModel(file, device, tensor, jitter).logits(reference.sequences)

    jitter = reference.probes.rounding
    own = computed(False, 0, 0.0)
    imprecise = _divergence(own, computed(False, 0, jitter), device, ties)
    bare = _divergence(reference.logits, own, device, ties)
    limit = max(THRESHOLDS["f32"], ROUNDINGS * imprecise) + (NEAR_TIES if ties and not reference.exact else 0.0)
    if imprecise > CHAOS:
        result.notes.append(f"precision alone makes this model diverge by {imprecise:.1g}: its logits cannot judge its header")
    elif not bare <= limit:
        result.failures.append(
            f"the model's own weights, computed as its header says, give logits that diverge by {bare:.2e}, allowed {limit:.2e}"
        )
        return 0.0
    rough = [_plainly_compared(own, computed(True, draw, jitter), device, ties) for draw in range(DRAWS)]
    usual = max(one.divergence for one in rough)
    if ERRORS * usual > result.allowed:
        result.allowed = ERRORS * usual
        result.notes.append(f"this model is sensitive: errors of the size of its rounding make it diverge by {usual:.1e}")
    return ERRORS * max(one.gap for one in rough)


def _signs(name: str, draw: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()) + draw)
    return 2.0 * torch.randint(0, 2, like.shape, generator=generator, device=like.device) - 1


def _divergence(wanted: Sequence[Tensor], found: Sequence[Tensor], device: str, left_out: float) -> float:
    """KL divergence, mean over positions but a share of them, which are those that diverge most."""
    positions = []
    for one, two in zip(wanted, found, strict=True):
        p, q = (logits.to(device)[:, : one.shape[-1]].double().log_softmax(-1) for logits in (one, two))
        positions.append((p.exp() * (p - q)).sum(-1))
    divergences = torch.cat(positions).sort().values  # NaN last
    return float(divergences[: max(1, round(len(divergences) * (1 - left_out)))].mean())
