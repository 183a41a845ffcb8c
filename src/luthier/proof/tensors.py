"""Every tensor of a GGUF file against what the trained model's own layers compute (`probes.py`).

Rounding hides a wrong tensor in the logits, not here: a matrix whose rows are another's, or in another order, is off by
more than all of itself, where 2 bits round by a third. What looks wrong is compared whole, with the same weights rounded
anew, so that a model of unusual weights is never refused for them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.gguf.dequantize import dequantize, load_tensor
from luthier.gguf.imatrix import Importance, made_with_importance
from luthier.gguf.quantize import encode_in_chunks
from luthier.gguf.reader import GGUFFile
from luthier.gguf.types import TensorType
from luthier.proof.gguf_model import GRAPHS, GGUFModel
from luthier.proof.probes import Names, Probe, Probes
from luthier.proof.weights import MISFITS, MORE_MISFITS, misfits_of

# tensor type -> what rounding normal weights to it costs, root mean square as a share of theirs
ROUNDING = {
    "Q8_0": 0.0054, "Q6_K": 0.018, "Q5_K": 0.036, "Q5_1": 0.038, "Q5_0": 0.043, "Q4_K": 0.072, "Q4_1": 0.079, "Q4_0": 0.086,
    "Q3_K": 0.15, "Q2_K": 0.30, "BF16": 0.0017, "F16": 0.0002,
}  # fmt: skip
USUAL, USUAL_ROW = 2.0, 3.0  # times what the type rounds normal weights by: beyond, a matrix or a row is looked at whole
NOTHING = 0.9  # error of a matrix that has nothing of the model's; of another it is 1.4
WORSE, WORSE_ROW = 1.5, 2.0  # times the error of rounding the model's own weights anew
WHOLE = 1 << 16  # weights of a matrix that is looked at whole in any case
SEEN = 0.125  # standard deviation of an adapter's measured share that lets it be judged
OTHER = 0.25  # of its share that may be missing or too much
CERTAIN = 5  # standard deviations of it, where that is more
PARTS = 8  # of a matrix, in each of which an adapter is looked for; or its experts
GAIN = 0.03  # what a matrix may be too large or too small by, beyond the square of its error: so much smaller are best codes
EXACT = 1e-5  # rounding of a computation that moves hardly any code
# times the rounding's error that two roundings of the same weights may differ by (searches for scales that are as good find
# others), and which share of blocks
SAME, SAME_BLOCKS = 1.0, 0.15
ATTENTION, ATTENTION_IN_16_BITS = 1e-3, 0.05  # what attention may be off by, as a share of it
ROUNDINGS = 4  # times what rounding queries and keys to 16 bits does to it, where that is more
FAINT = 1.5  # times the computation's own rounding that an adapter's effect must have


def compare_attention(model: GGUFModel, probes: Probes, slack: float = 0.0) -> tuple[str, list[str]]:
    """The attention of every layer, its rotary embedding above all, on the trained model's own queries, keys and values.

    No matrix takes part, so no rounding of the file does. ``slack``: what norms of queries and keys may be off by. A summary,
    and what is wrong.
    """
    errors, wrong = {}, []
    for layer, seen in sorted(probes.attention.items()):
        wanted = seen["attn_output"].float().to(model.device)
        projected = {name: values for name, values in seen.items() if name != "attn_output"}
        found, allowed = model.attended(layer, projected), ATTENTION + slack
        if probes.rounding > ATTENTION:
            sensitive = model.attended(layer, projected, rounded=True) - found
            allowed = max(ATTENTION_IN_16_BITS, ROUNDINGS * float(sensitive.norm() / wanted.norm()))
        errors[layer] = float((found - wanted).norm() / wanted.norm())
        if not errors[layer] <= allowed:
            wrong.append(
                f"the attention of layer {layer} is off by {errors[layer]:.1%} of it, allowed {allowed:.1%}: "
                "its rotary embedding, window or scale"
            )
    if not errors:
        return "not compared", []
    worst = max(errors, key=lambda layer: errors[layer])
    return f"off by at most {errors[worst]:.1e} of it, in layer {worst}", wrong[:3]


@dataclass
class TensorComparison:
    """`see` every tensor of a file once, then `finish`. ``errors``: of every matrix, as a share of what it computes."""

    file: GGUFFile
    probes: Probes
    importance: Importance
    rounding: float  # what an output may be off by besides, as a share of it
    strict: bool = True  # the file was made of the model's own weights, rounded with this importance
    errors: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)  # share of the adapter's change that is in the matrix
    hidden: int = 0  # adapters too small to be seen behind the rounding
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matrices: dict[str, list[tuple[Names, Probe]]] = defaultdict(list)
        self.vectors: dict[str, Tensor] = {}
        for names, probe in self.probes.matrices.items():
            name = self._held(names)
            if name is not None and self._has_shape(name, (probe.outputs.shape[1], probe.inputs.shape[1])):
                self.matrices[name].append((names, probe))
        for names, vector in self.probes.vectors.items():
            name = self._held(names, bool(vector.any()))
            if name is not None and self._has_shape(name, (len(vector),)):
                self.vectors[name] = vector
        self.waiting = {*self.matrices, *self.vectors}

    def _held(self, names: Names, needed: bool = True) -> str | None:
        found = next((name for name in names if name in self.file.tensors), None)
        if found is None and needed:
            self.failures.append(f"it lacks {names[0]}")
        return found

    def _has_shape(self, name: str, wanted: tuple[int, ...]) -> bool:
        """``wanted``: as a matrix ``(out, in)``, those of experts one below the other, or as a vector."""
        info = self.file.tensors[name]
        found = (info.rows, info.shape[-1]) if len(wanted) > 1 else (info.rows * info.shape[-1],)
        if found != wanted:
            self.failures.append(f"{name} has the shape {info.shape}, in the model {wanted}")
        return found == wanted

    def see(self, name: str, tensor: Tensor) -> None:
        """A tensor of the file, dequantised."""
        if name not in self.waiting:
            return
        self.waiting.remove(name)
        rows = self._as_transformers(name, tensor)
        if name in self.vectors:
            self._compare_vector(name, rows.flatten(), self.vectors[name].to(rows.device).float())
        for names, probe in self.matrices[name]:
            self._compare_matrix(name, names, rows.reshape(-1, rows.shape[-1]), probe)

    def finish(self, device: torch.device | str) -> None:
        """See what has not been seen."""
        for name in sorted(self.waiting):
            self.see(name, load_tensor(self.file, name, device))

    @property
    def unknown(self) -> list[str]:
        """Tensors of the file that the model was not asked about; those of the rotary embedding are compared by themselves."""
        return [name for name in self.file.tensors if name not in self.matrices | self.vectors and not name.startswith("rope_")]

    def summary(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name] / self._usual(name), default=None)
        if worst is None:
            return "none compared"
        kind = self.file.tensors[worst].type.name
        usual = f"; {kind} usually rounds by {ROUNDING[kind]:.1%}" if kind in ROUNDING else ""
        return f"{len(self.matrices | self.vectors)} compared; worst {worst}, off by {self.errors[worst]:.1%}{usual}"

    def adapter_summary(self) -> str:
        """Where the adapter was found, "" where there is none."""
        if not self.adapters:
            return f"too small to be seen behind the rounding in all of {self.hidden} matrices" if self.hidden else ""
        low, high = min(self.adapters.values()), max(self.adapters.values())
        hidden = f"; too small to be seen in {self.hidden} more" if self.hidden else ""
        return f"{low:.0%} to {high:.0%} of it in {len(self.adapters)} matrices{hidden}"

    def _usual(self, name: str) -> float:
        return ROUNDING.get(self.file.tensors[name].type.name, 0.0) + self.rounding

    def trained(self, name: str, device: torch.device | str) -> Tensor:
        """The model's own tensor in the file's order; the file's, where the model was not asked for it."""
        if name in self.vectors:
            own = self.vectors[name]
        elif name in self.matrices:
            own = self.probes.whole(self.matrices[name][0][0])
        else:
            return load_tensor(self.file, name, device)
        own, heads = own.to(device).float(), self._turned_heads(name)
        if heads:
            own = own.reshape(heads, 2, -1, *own.shape[1:]).transpose(1, 2)
        return own.reshape(self.file.tensors[name].shape)

    def _as_transformers(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of queries and keys in transformers' order, halves and not pairs, where llama.cpp's graph turns pairs."""
        heads = self._turned_heads(name)
        if not heads:
            return tensor
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def _turned_heads(self, name: str) -> int:
        """How many heads a tensor of queries or keys has whose rows stand in pairs; 0 for any other."""
        architecture, stem = self.file.metadata["general.architecture"], name.split(".")[-2]
        if stem not in ("attn_q", "attn_k") or not GRAPHS[architecture].pairs:
            return 0
        heads = self.file.metadata[f"{architecture}.attention.head_count"]
        return self.file.metadata.get(f"{architecture}.attention.head_count_kv", heads) if stem == "attn_k" else heads

    def _compare_vector(self, name: str, found: Tensor, wanted: Tensor) -> None:
        slack = self.rounding * (2 * wanted.abs() + wanted.abs().mean())
        wrong = ~((found - wanted).abs() <= slack)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            self.failures.append(f"{name} is not the model's: number {i} is {found[i]:.6g} instead of {wanted[i]:.6g}")

    def _compare_matrix(self, name: str, names: Names, rows: Tensor, probe: Probe) -> None:
        inputs, wanted = probe.inputs.to(rows.device).float(), probe.outputs.to(rows.device).float()
        found = inputs @ rows.T
        made, off = wanted[: probe.random], (found - wanted)[: probe.random]
        size, row_errors = made.norm(dim=0), off.norm(dim=0)
        error, gain = float(row_errors.norm() / size.norm()), float((off * made).sum() / made.square().sum())
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        worst_row = float((row_errors / size.clamp_min(1e-3 * float(size.square().mean().sqrt()))).max())
        usual = self._usual(name)
        odd = not (error <= USUAL * usual and worst_row <= USUAL_ROW * usual and abs(gain + error**2) <= max(GAIN, usual**2))
        odd |= probe.base is not None and self._is_adapter_odd(name, found, wanted, probe)
        if not error <= NOTHING:
            self.failures.append(f"{name} is not the model's: what it computes is off by {error:.0%}")
        elif odd or (self.strict and rows.numel() <= WHOLE):
            self._look_at_whole(name, names, rows, probe)

    def _is_adapter_odd(self, name: str, found: Tensor, wanted: Tensor, probe: Probe) -> bool:
        """Note how much of what the adapter adds is in the file's matrix, if that can be told from rounding; whether it may be
        other than all of it, somewhere in the matrix.
        """
        change, off = _effects(found - wanted, wanted, probe)
        if not change.any():
            return False  # a new adapter
        share, noise = _along(off.flatten(), change.flatten())
        faint = float(change.norm()) <= FAINT * self.rounding * float((wanted[-len(change) :] - change).norm())
        if faint or not noise <= SEEN:
            self.hidden += 1
            return not faint and self.rounding <= EXACT
        self.adapters[name] = 1 + float(share)
        shape = self.file.tensors[name].shape
        parts = shape[0] if len(shape) > 2 else PARTS if change.shape[1] % PARTS == 0 else 1
        shares, noises = _along(*(part.reshape(len(change), parts, -1) for part in (off, change)))
        odd = ~(shares.abs() <= (CERTAIN * noises).clamp_min(OTHER)) & (noises <= SEEN)
        return bool(odd.any()) or not abs(float(share)) <= OTHER

    def _look_at_whole(self, name: str, names: Names, rows: Tensor, probe: Probe) -> None:
        wanted = self.probes.whole(names).to(rows.device)
        kind, importance = self.file.tensors[name].type, self.importance.get(name)
        again = torch.cat(
            [dequantize(data.to(rows.device), kind) for _, data in encode_in_chunks(name, wanted, kind, importance)]
        )
        off, usual = ((matrix - wanted).norm(dim=1) for matrix in (rows, again))
        size, slack = wanted.norm(dim=1), self.rounding
        error, allowed = float(off.norm()), float(WORSE * usual.norm() + slack * size.norm())
        wrong = (~(off <= WORSE_ROW * usual + 4 * slack * size)).nonzero().flatten().tolist()
        unknown = not self.strict and importance is None and made_with_importance(self.file)
        if unknown:  # what counted more there is off by less, all else by more
            allowed, wrong = float("inf"), (~(off <= NOTHING * size)).nonzero().flatten().tolist()
        if not error <= allowed:
            error, usual = error / float(size.norm()), float(usual.norm() / size.norm())
            self.failures.append(f"{name} is not the model's: it is off by {error:.1%}, where rounding costs {usual:.1%}")
        elif wrong:
            self.failures.append(f"{name} is not the model's: {len(wrong)} of its rows are others, row {wrong[0]} first")
        elif not unknown:
            self._compare_roundings(name, rows, again, wanted, probe)

    def _compare_roundings(self, name: str, rows: Tensor, again: Tensor, wanted: Tensor, probe: Probe) -> None:
        """A file made of the very weights ``wanted`` has the codes of ``again``, but for those that the precision of the
        model's computation moves. What `verify` is given may have been rounded otherwise.
        """
        slack, kind = self.rounding, self.file.tensors[name].type
        usual, size, apart = (float(part.norm()) for part in (again - wanted, wanted, rows - again))
        others = int((rows != again).view(-1, kind.block).any(1).sum())
        allowed = SAME * usual + 2 * (usual * slack * size) ** 0.5 + slack * size
        if self.strict and not apart <= allowed:
            apart, allowed = apart / size, allowed / size
            self.failures.append(
                f"{name} is not the model's: it is {apart:.2%} away from rounding the model's own, allowed {allowed:.2%}"
            )
        elif self.strict and slack <= EXACT and kind.block > 1 and others > max(SAME_BLOCKS * rows.numel() / kind.block, 2):
            self.failures.append(f"{name} is not the model's: {others} of its {rows.numel() // kind.block} blocks are others")
        elif self.strict and slack > EXACT and kind.block > 1 and not self._fit(name, wanted, kind):
            self.failures.append(f"{name} is not the model's: its weights lie nearer to the codes beside their own")
        elif probe.base is not None and name in self.adapters:
            inputs, made = (part.to(rows.device).float() for part in (probe.inputs, probe.outputs))
            off = inputs @ rows.T - made - inputs @ (again - wanted).T  # less what rounding does to the adapter
            change, off = _effects(off, made, probe)
            share, noise = _along(off.flatten(), change.flatten())
            if not abs(float(share)) <= max(OTHER, CERTAIN * float(noise)):
                self.failures.append(f"{name} has {self.adapters[name]:.0%} of what the adapter adds to it")

    def _fit(self, name: str, wanted: Tensor, kind: TensorType) -> bool:
        """Whether the weights ``wanted`` lie nearest to their codes, but for what the model's precision moves them by."""
        codes = torch.from_numpy(self.file.data(name).copy())
        codes = self._as_transformers(name, codes).reshape(len(wanted), -1).to(wanted.device)
        own = 0
        if name in self.importance:  # it moves scales after codes were chosen
            rounded = torch.cat([data for _, data in encode_in_chunks(name, wanted, kind, self.importance[name])])
            own = misfits_of(rounded.to(wanted.device), wanted, torch.zeros_like(wanted), kind)
        moved = self.rounding * (wanted.abs() + wanted.abs().mean())  # of what was added up to a weight
        found = misfits_of(codes, wanted, moved, kind)
        return found <= 1 + MISFITS * wanted.numel() + MORE_MISFITS * own + 3 * own**0.5


def _effects(off: Tensor, wanted: Tensor, probe: Probe) -> tuple[Tensor, Tensor]:
    """What the adapter changes ``[n, out]``, and how far the file is off there: along what it reads, where that is known."""
    first = probe.random if len(wanted) > probe.random else 0
    return wanted[first:] - probe.base.to(wanted.device).float()[first:], off[first:]


def _along(off: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Which share of ``change`` is in ``off``, and the standard deviation of that, by vectors of the last dimension."""
    squared = change.square().sum(-1)
    share = (off * change).sum(-1) / squared
    noise = (off - share[..., None] * change).square().mean(-1).sqrt() / squared.sqrt()
    return share, noise
