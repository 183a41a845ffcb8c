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
from luthier.gguf.imatrix import Importance
from luthier.gguf.quantize import encode_in_chunks
from luthier.gguf.reader import GGUFFile
from luthier.proof.gguf_model import GRAPHS, GGUFModel
from luthier.proof.probes import Names, Probe, Probes

# tensor type -> what rounding normal weights to it costs, root mean square as a share of theirs
ROUNDING = {
    "Q8_0": 0.0054, "Q6_K": 0.018, "Q5_K": 0.036, "Q5_1": 0.038, "Q5_0": 0.043, "Q4_K": 0.072, "Q4_1": 0.079, "Q4_0": 0.086,
    "Q3_K": 0.15, "Q2_K": 0.30, "BF16": 0.0017, "F16": 0.0002,
}  # fmt: skip
USUAL, USUAL_ROW = 2.0, 3.0  # times what the type rounds normal weights by: beyond, a matrix or a row is looked at whole
NOTHING = 0.9  # error of a matrix that has nothing of the model's; of another it is 1.4
WORSE, WORSE_ROW = 1.5, 2.0  # times the error of rounding the model's own weights anew
SEEN = 0.125  # standard deviation of an adapter's measured share that lets it be judged
OTHER = 0.5  # of its share that may be missing or too much
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
    errors: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)  # share of the adapter's change that is in the matrix
    hidden: int = 0  # adapters too small to be seen behind the rounding
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matrices: dict[str, list[tuple[Names, Probe]]] = defaultdict(list)
        self.vectors: dict[str, Tensor] = {}
        for names, probe in self.probes.matrices.items():
            if (name := self._held(names)) is not None:
                self.matrices[name].append((names, probe))
        for names, vector in self.probes.vectors.items():
            if (name := self._held(names, bool(vector.any()))) is not None:
                self.vectors[name] = vector
        self.waiting = {*self.matrices, *self.vectors}

    def _held(self, names: Names, needed: bool = True) -> str | None:
        found = next((name for name in names if name in self.file.tensors), None)
        if found is None and needed:
            self.failures.append(f"it lacks {names[0]}")
        return found

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
        if found.shape != wanted.shape:
            self.failures.append(f"{name} has {len(found)} numbers, in the model {len(wanted)}")
            return
        slack = self.rounding * (2 * wanted.abs() + wanted.abs().mean())
        wrong = ~((found - wanted).abs() <= slack)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            self.failures.append(f"{name} is not the model's: number {i} is {found[i]:.6g} instead of {wanted[i]:.6g}")

    def _compare_matrix(self, name: str, names: Names, rows: Tensor, probe: Probe) -> None:
        inputs, wanted = probe.inputs.to(rows.device).float(), probe.outputs.to(rows.device).float()
        if (len(rows), rows.shape[1]) != (wanted.shape[1], inputs.shape[1]):
            self.failures.append(f"{name} has the shape {tuple(rows.shape)}, in the model {(wanted.shape[1], inputs.shape[1])}")
            return
        found = inputs @ rows.T
        size, off = (part[: probe.random].norm(dim=0) for part in (wanted, found - wanted))
        error = float(off.norm() / size.norm())
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        worst_row = float((off / size.clamp_min(1e-3 * float(size.square().mean().sqrt()))).max())
        usual = self._usual(name)
        share = None if probe.base is None else self._share_of_adapter(found, wanted, probe)
        if share is not None:
            self.adapters[name] = share
        if not error <= NOTHING:
            self.failures.append(f"{name} is not the model's: what it computes is off by {error:.0%}")
        elif not (
            error <= USUAL * usual and worst_row <= USUAL_ROW * usual and abs((1.0 if share is None else share) - 1) <= OTHER
        ):
            self._look_at_whole(name, names, rows, probe, share)

    def _share_of_adapter(self, found: Tensor, wanted: Tensor, probe: Probe) -> float | None:
        """How much of what the adapter adds is in the file's matrix; None where it is too small to be told from rounding."""
        first = probe.random if len(wanted) > probe.random else 0
        base = probe.base.to(wanted.device).float()[first:]
        change, off = wanted[first:] - base, (found - wanted)[first:]
        size = float(change.norm())
        if size == 0:
            return None  # a new adapter
        along = float((off * change).sum()) / size**2
        noise = float((off - along * change).norm()) / change.numel() ** 0.5
        if size <= FAINT * self.rounding * float(base.norm()) or noise > SEEN * size:
            self.hidden += 1
            return None
        return 1 + along

    def _look_at_whole(self, name: str, names: Names, rows: Tensor, probe: Probe, share: float | None) -> None:
        wanted = self.probes.whole(names).to(rows.device)
        kind, importance = self.file.tensors[name].type, self.importance.get(name)
        again = torch.cat(
            [dequantize(data.to(rows.device), kind) for _, data in encode_in_chunks(name, wanted, kind, importance)]
        )
        off, usual = ((matrix - wanted).norm(dim=1) for matrix in (rows, again))
        size, slack = wanted.norm(dim=1), self.rounding
        error, allowed = float(off.norm()), float(WORSE * usual.norm() + slack * size.norm())
        wrong = (~(off <= WORSE_ROW * usual + 4 * slack * size)).nonzero().flatten().tolist()
        if not error <= allowed:
            error, usual = error / float(size.norm()), float(usual.norm() / size.norm())
            self.failures.append(f"{name} is not the model's: it is off by {error:.1%}, where rounding costs {usual:.1%}")
        elif wrong:
            self.failures.append(f"{name} is not the model's: {len(wrong)} of its rows are others, row {wrong[0]} first")
        elif share is not None:
            inputs = probe.inputs.to(rows.device).float()
            usual = self._share_of_adapter(inputs @ again.T, probe.outputs.to(rows.device).float(), probe)
            if not abs(share - (1.0 if usual is None else usual)) <= OTHER:
                self.failures.append(f"{name} has {share:.0%} of what the adapter adds to it")
