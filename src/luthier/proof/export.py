"""The proof of export: a GGUF file, read back and computed, says what the trained model says.

The file is computed by `GGUFModel` and its tokenizer rebuilt by `GGUFTokenizer`, both from the file alone, and compared
with transformers' model and tokenizer: logits, tokens, template, stop tokens; weights, where a directory is compared with.
The result stands beside the file as ``<file>.proof.json``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from luthier.data.chat import strip_generation_marks
from luthier.data.read import read_dataset
from luthier.errors import ExportProofError, suggesting_names, unknown
from luthier.files import atomic_file, make_directory
from luthier.gguf import architectures, convert
from luthier.gguf.calibrate import calibrate
from luthier.gguf.chat import stop_tokens
from luthier.gguf.convert import break_token, output_paths, read_config
from luthier.gguf.dequantize import load_tensor
from luthier.gguf.imatrix import Importance, made_with_importance, read_importance
from luthier.gguf.lora import convert_lora_to_gguf
from luthier.gguf.metadata import metadata, rope_tensors
from luthier.gguf.mmproj import find_projector, mmproj_path, plan_vision
from luthier.gguf.ollama import write_ollama_modelfile
from luthier.gguf.plan import plan_tensors
from luthier.gguf.reader import GGUFFile
from luthier.gguf.source import CheckpointSource
from luthier.gguf.types import FILE_TYPES
from luthier.model.attention_interface import implementation_for
from luthier.model.gguf_export import write_merged_gguf
from luthier.model.load import load_model
from luthier.model.merge import Base, Merge
from luthier.model.original import computing_with, original_weights
from luthier.model.save import save_adapter, upload
from luthier.model.vision import load_vision_model
from luthier.proof.gguf_model import GGUFModel
from luthier.proof.header import close, damaged_header
from luthier.proof.logits import compare_logits
from luthier.proof.reference import Reference, reference_of
from luthier.proof.tensors import TensorComparison, compare_attention
from luthier.proof.tokens import compare_tokens
from luthier.proof.vision import compare_vision
from luthier.proof.weights import BF16_STEP, checksums, compare_weights, stored_damage
from luthier.terminal import table

# what a file says by leaving a number out
UNSAID = {
    "rope.freq_base": 10000.0, "rope.freq_base_swa": 10000.0, "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0,
    "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "attention.scale": 0.0, "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}  # fmt: skip
SHOWN = 10  # failures that a person is told; the JSON holds all


@dataclass
class Proof:
    """The outcome of one file's proof; ``failures`` is empty where it holds."""

    file: str
    file_type: str
    divergence: float = 0.0
    allowed_divergence: float = 0.0
    largest_gap: float = 0.0
    top1_agreement: float = 0.0
    positions: int = 0
    texts: int = 0
    stop_tokens: list[str] = field(default_factory=list)
    tensors: str = "not compared"  # what each of them computes, see `errors`
    adapter: str = ""
    attention: str = "not compared"
    weights: str = "not compared"  # their bytes
    vision: str = ""
    deviation: str = ""  # what llama.cpp computes otherwise, in any file of this model
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # of every matrix, as a share of what it computes
    checksums: dict[str, int] = field(default_factory=dict)  # CRC-32 of the header and of every tensor

    def show(self) -> None:
        """Print a table of what was compared."""
        rows = [
            ("divergence (KL)", f"{self.divergence:.2e}, allowed {self.allowed_divergence:.2e}"),
            ("largest logit gap", f"{self.largest_gap:.2e}"),
            ("same first choice", f"{self.top1_agreement:.1%} of {self.positions} positions"),
            ("tensors", self.tensors),
            *([("adapter", self.adapter)] if self.adapter else []),
            ("attention", self.attention),
            ("bytes of tensors", self.weights),
            *([("vision", self.vision)] if self.vision else []),
            ("tokens", f"equal in {self.texts} texts"),
            ("stop tokens", " ".join(self.stop_tokens)),
            *([("known difference", self.deviation)] if self.deviation else []),
            *(("note", note) for note in self.notes),
            *(("FAILED", failure) for failure in self.first_failures()),
        ]
        table(f"Proof of {self.file}", ["what", "result"], rows)

    def first_failures(self) -> list[str]:
        """For a person; a file of another model has hundreds."""
        more = len(self.failures) - SHOWN
        return self.failures[:SHOWN] + ([f"and {more} more"] if more > 0 else [])


def prove(path: str | Path, reference: Reference) -> Proof:
    """Compare the file with what the trained model says; never raises for a difference, see ``Proof.failures``.

    ``ValueError`` for a file that cannot be read, ``UnsupportedError`` for one of an architecture without a graph.
    """
    file = GGUFFile(path)
    ids = {kind.id: name for name, kind in FILE_TYPES.items()}
    proof = Proof(Path(path).name, ids.get(file.metadata.get("general.file_type"), "unknown"))
    proof.deviation = reference.deviation
    proof.checksums = checksums(file)
    if reference.vision is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        proof.vision, wrong = compare_vision(Path(path), reference.config, reference.vision, device)
        proof.failures += wrong
    if _compare_sizes(file, reference.config, proof):
        _compare_logits(file, reference, proof)
    _compare_tokens(file, reference, proof)
    _compare_chat(file, reference, proof)
    return proof


def verify(
    path: str | Path,
    against: str | Path,
    prompts: Sequence[str] | None = None,
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
) -> Proof:
    """Compare any GGUF file with the model in the directory ``against``: everything `prove` does, and every weight."""
    config = read_config(against)
    file = GGUFFile(path)
    if file.metadata.get("general.architecture") == "clip":
        raise ValueError(f"{path} is the vision part of a model: verify the text part beside it, which looks at both")
    source = CheckpointSource(against)
    reference = reference_of(_load(against, config, source), against, prompts, read_importance(imatrix))
    reference = replace(reference, slack=BF16_STEP)
    parts = [(file, plan_tensors(architectures.find(config), config, source.shapes))]
    vision = mmproj_path(file.path)
    if reference.vision is not None and vision.is_file():
        planned = plan_vision(find_projector(config), config, source.shapes, break_token(against))
        parts.append((GGUFFile(vision), planned))
    alone = reference.vision is not None and not vision.is_file()
    proof = prove(path, replace(reference, vision=None) if alone else reference)
    if alone:
        proof.notes.append(f"its vision part {vision.name} is not beside it: not compared")
    proof.failures += damaged_header(file, config, against, parts[0][1]) + stored_damage(file)
    proof.weights, wrong = compare_weights(parts, source, imatrix)
    proof.failures = list(dict.fromkeys(proof.failures + wrong))
    if imatrix is None and made_with_importance(file):
        proof.notes.append("it was rounded with an importance matrix: give that to have its bytes compared")
    return proof


def require(proof: Proof) -> None:
    """Show the proof; ``ExportProofError`` where it does not hold."""
    proof.show()
    if proof.failures:
        raise ExportProofError(f"{proof.file} does not say what the model says: {'; '.join(proof.first_failures())}.")


def write_proof(path: str | Path, proof: Proof) -> Path:
    """Write ``<path>.proof.json``."""
    target = Path(f"{path}.proof.json")
    with atomic_file(target) as place:
        place.write_text(json.dumps(asdict(proof), indent=1), encoding="utf8")
    return target


def _load(directory: str | Path, config: Any, source: CheckpointSource) -> Any:
    """The model in a directory, in 32 bits if it has at most two billion weights."""
    small = sum(torch.Size(shape).numel() for shape in source.shapes.values()) < 2e9
    auto = AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText
    dtype, attention = torch.float32 if small else torch.bfloat16, implementation_for(config)
    place = "auto" if torch.cuda.is_available() else None
    options = {"attn_implementation": attention, "device_map": place, "local_files_only": True}
    return auto.from_pretrained(directory, dtype=dtype, **options)


def _compare_sizes(file: GGUFFile, config: Any, proof: Proof) -> bool:
    """The sizes, norms and rotary embedding that the file names, and the tensors computed from them; whether it has sizes of
    the model's, so that it can be computed.
    """
    architecture = architectures.find(config)
    with warnings.catch_warnings(action="ignore"):  # the export has said it
        wanted = metadata(architecture, config, "")
    own = {key.removeprefix(f"{architecture.name}."): value for key, value in wanted.items()}
    head = own["embedding_length"] // own["attention.head_count"]
    unsaid = {**UNSAID, "attention.head_count_kv": own["attention.head_count"], "vocab_size": own["vocab_size"]}
    unsaid |= {f"attention.{what}_length": head for what in ("key", "value")}
    unsaid["rope.dimension_count"] = own["attention.key_length"]
    computable = True
    for key, value in (UNSAID | own).items():
        full = key if key.startswith("general.") else f"{architecture.name}.{key}"
        found = file.metadata.get(full, unsaid.get(key, value if key.startswith("general.") else None))
        found = found.tolist() if isinstance(found, np.ndarray) else found
        if key == "context_length" or found == value or close(found, value):
            continue
        said = "missing" if found is None else found
        proof.failures.append(f"{full} is {said} in the file and {value} in the model")
        computable &= found is not None and (isinstance(value, float) or key.endswith("context_length"))
    for name, tensor in rope_tensors(config).items():
        found = load_tensor(file, name) if name in file.tensors else None
        if found is None or found.shape != tensor.shape or not torch.allclose(found, tensor, rtol=1e-5):
            proof.failures.append(f"{name} is not the model's")
    return computable


def _compare_logits(file: GGUFFile, reference: Reference, proof: Proof) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounding = max(reference.probes.rounding, reference.slack)
    tensors = TensorComparison(file, reference.probes, reference.importance, rounding, strict=not reference.slack)
    model = GGUFModel(file, device, watch=tensors.see)
    if tensors.failures:  # it lacks some: nothing can be computed
        _note_tensors(tensors, device, proof)
        return
    found = model.logits(reference.sequences)
    _note_tensors(tensors, device, proof)
    proof.attention, wrong = compare_attention(model, reference.probes, reference.slack)
    proof.failures += wrong
    logits = compare_logits(file, proof.file_type, reference, found, tensors, bool(proof.failures))
    proof.divergence, proof.allowed_divergence, proof.largest_gap = logits.divergence, logits.allowed, logits.gap
    proof.top1_agreement, proof.positions = logits.agreement, logits.positions
    proof.notes += logits.notes
    proof.failures += logits.failures


def _note_tensors(tensors: TensorComparison, device: str, proof: Proof) -> None:
    tensors.finish(device)
    proof.tensors, proof.adapter, proof.errors = tensors.summary(), tensors.adapter_summary(), tensors.errors
    proof.failures += tensors.failures
    if tensors.unknown:
        proof.notes.append(f"the model was not asked for {', '.join(tensors.unknown)}")


def _compare_tokens(file: GGUFFile, reference: Reference, proof: Proof) -> None:
    tokens = compare_tokens(file, reference.tokenizer, reference.texts)
    proof.texts, proof.notes = tokens.equal, proof.notes + tokens.notes
    proof.failures += tokens.failures


def _compare_chat(file: GGUFFile, reference: Reference, proof: Proof) -> None:
    embedded = file.metadata.get("tokenizer.chat_template")
    if reference.template is not None and embedded != strip_generation_marks(reference.template):
        proof.failures.append("its chat template is not the tokenizer's" if embedded else "it has no chat template")
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = {tokens[i] for i in ends if i is not None and i < len(tokens)}
    proof.stop_tokens = list(stop_tokens(reference.tokenizer))
    lost = [token for token in proof.stop_tokens[:3] if token not in known]
    if lost:
        proof.failures.append(f"it does not stop at {', '.join(lost)}")


@suggesting_names
def save_pretrained_gguf(
    model: Any,
    directory: str | Path,
    tokenizer: Any,
    quantization_method: str | Sequence[str] = "q8_0",
    imatrix: str | Path | Mapping[str, torch.Tensor] | Iterable | None = None,
    save_method: str | None = None,
    base: Base = "16bit",
    prompts: Sequence[str] | None = None,
) -> list[Path]:
    """Write GGUF files of the model, each proved: they appear under their names once their proof holds.

    ``quantization_method``: one of ``ALLOWED_QUANTS`` or a list, all written in one pass, each with an Ollama Modelfile.

    ``imatrix``: an importance matrix (a GGUF file, or tensors by name), or the data to compute one from: a dataset, its
    file, or texts.

    The model says what it says over the chosen ``base``: for ``"16bit"`` under a model that was trained in 4 bits, the
    adapter is loaded over the original checkpoint for it. ``prompts``: held-out texts of the user's own to compare on.
    ``save_method="lora"`` writes the adapter alone, for ``--lora`` beside the GGUF file of its base. Raises
    ``ExportProofError`` where a proof fails; nothing is left behind then.
    """
    directory = Path(directory)
    if save_method not in (None, "lora"):
        raise unknown("save_method", save_method, ("lora",), "Without it the merged model is written.")
    if save_method == "lora":
        return [_save_lora(model, directory, tokenizer)]
    architectures.find(model.config)  # what is not covered is refused before there is a directory
    output_paths(directory, directory.resolve().name, quantization_method)
    imatrix = _importance(model, tokenizer, imatrix)
    make_directory(directory)
    with tempfile.TemporaryDirectory(prefix=".luthier-", dir=directory) as place:
        place = Path(place) / directory.resolve().name  # the name that the files get
        write_merged_gguf(model, place, tokenizer, quantization_method, imatrix, base)
        with _over_base(model, tokenizer, base) as trained:
            return _publish_proved(place, directory, reference_of(trained, tokenizer, prompts, imatrix))


@suggesting_names
def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any,
    quantization_method: str | Sequence[str] = "q8_0",
    imatrix: str | Path | Mapping[str, torch.Tensor] | Iterable | None = None,
    base: Base = "16bit",
    token: str | bool | None = None,
    private: bool | None = None,
    prompts: Sequence[str] | None = None,
) -> str:
    """`save_pretrained_gguf` into a Hub repository, made if it is not there -> the address of the commit.

    Nothing is uploaded unless every proof holds.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        directory = Path(place) / repo_id.rsplit("/", 1)[-1]
        save_pretrained_gguf(model, directory, tokenizer, quantization_method, imatrix, base=base, prompts=prompts)
        return upload(directory, repo_id, token, private)


def _save_lora(model: Any, directory: Path, tokenizer: Any) -> Path:
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        save_adapter(model, Path(place) / "adapter", tokenizer)
        out = directory / f"{directory.resolve().name}-LORA.gguf"
        return convert_lora_to_gguf(Path(place) / "adapter", model.config, out)


def convert_to_gguf(
    model_dir: str | Path,
    out: str | Path,
    quantization_method: str | Sequence[str] = "bf16",
    imatrix: str | Path | Mapping[str, torch.Tensor] | None = None,
    prompts: Sequence[str] | None = None,
) -> list[Path]:
    """`luthier.gguf.convert_to_gguf`, proved; see `save_pretrained_gguf` here."""
    out = Path(out)
    outputs = list(output_paths(out, Path(model_dir).resolve().name, quantization_method))
    make_directory(outputs[0].parent)
    with tempfile.TemporaryDirectory(prefix=".luthier-", dir=outputs[0].parent) as place:
        single = Path(place) / outputs[0].name if out.suffix == ".gguf" else Path(place)
        for file in convert.convert_to_gguf(model_dir, single, quantization_method, imatrix):
            write_ollama_modelfile(model_dir, file)
        model = _load(model_dir, read_config(model_dir), CheckpointSource(model_dir))
        reference = reference_of(model, model_dir, prompts, read_importance(imatrix))
        return _publish_proved(Path(place), outputs[0].parent, reference)


def _importance(model: Any, tokenizer: Any, imatrix: Any) -> Importance | None:
    """An importance matrix as it was given, or computed from the data that was."""
    if imatrix is None or isinstance(imatrix, Mapping):
        return imatrix
    if isinstance(imatrix, str | Path):
        if Path(imatrix).suffix == ".gguf":
            return read_importance(imatrix)
        imatrix = read_dataset(str(imatrix))
    return calibrate(model, tokenizer, imatrix).importance


def _publish_proved(place: Path, directory: Path, reference: Reference) -> list[Path]:
    """Prove every GGUF file in ``place``, then move everything in it to ``directory``."""
    files = [file for file in sorted(place.glob("*.gguf")) if not file.name.startswith("mmproj-")]
    for file in files:
        proof = prove(file, reference)
        require(proof)
        write_proof(file, proof)
    for path in place.iterdir():
        path.replace(directory / path.name)
    return [directory / file.name for file in files]


@contextlib.contextmanager
def _over_base(model: Any, tokenizer: Any, base: Base) -> Iterator[Any]:
    """The model whose weights are exported: itself, or its adapter over the original checkpoint."""
    merge = Merge(model, base)
    if merge.source is None:
        yield model
        return
    weights = original_weights(merge)
    if weights is not None:
        with computing_with(model, weights):
            yield model
        return
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        save_adapter(model, Path(place) / "adapter", tokenizer)
        load = load_model if getattr(model.config, "vision_config", None) is None else load_vision_model
        yield load(Path(place) / "adapter", load_in_16bit=True)[0]
