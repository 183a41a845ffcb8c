"""The proof of a vision part: its file, read back and computed on a made picture, against the trained model's own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.gguf.dequantize import load_tensor
from luthier.gguf.mmproj import find_projector, mmproj_path, normalisation, vision_metadata
from luthier.gguf.reader import GGUFFile
from luthier.proof.gguf_vision import BREAK, features, picture_for, read_vision

# type of the file's matrices -> error of a picture's features that is still allowed, as a share of them: ten times and more
# what F16 costs a tower of two layers, since published ones have thirty
ALLOWED = {"F32": 1e-5, "F16": 5e-3}
ROUGH_REFERENCE = 3e-2  # what a model in 16 bits adds
SAME_ROW = 2.0**-8  # an embedding that was in 16 bits on the way


@dataclass
class VisionReference:
    """What the trained model makes of ``picture``, uint8 ``[3, height, width]``: features float32 ``[tokens, width]``."""

    picture: torch.Tensor
    features: torch.Tensor
    mean: list[float]
    std: list[float]
    epsilons: set[float]  # of the norms in the tower
    break_row: torch.Tensor | None  # the embedding of what stands between the rows of a picture
    exact: bool
    done: dict[Path, tuple[str, list[str]]] = field(default_factory=dict)  # all quantisations share one file


def vision_reference_of(model: nn.Module, processor: Any, tokenizer: Any) -> VisionReference | None:
    """``processor``: the model's, or its directory. None for a model of text alone."""
    config = model.config
    if getattr(config, "vision_config", None) is None:
        return None
    if isinstance(processor, str | Path):
        mean, std = normalisation(Path(processor))
    else:
        mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    picture = picture_for(config)
    parts = [module for name, module in model.named_modules() if re.search(r"(^|\.)(visual|vision_tower)\.", name)]
    epsilons = {getattr(part, "variance_epsilon", getattr(part, "eps", None)) for part in parts} - {None}
    found = features(model, picture, list(mean), list(std))
    parameters = [parameter for part in parts for parameter in part.parameters() if parameter.is_floating_point()]
    exact = all(parameter.dtype == torch.float32 for parameter in parameters)
    row = None
    if "[IMG_BREAK]" in tokenizer.get_vocab():
        embedding = model.get_input_embeddings()
        token = torch.tensor([tokenizer.convert_tokens_to_ids("[IMG_BREAK]")], device=next(embedding.parameters()).device)
        with torch.no_grad():
            row = embedding(token)[0].float().cpu()
    return VisionReference(picture, found, list(mean), list(std), epsilons, row, exact)


def compare_vision(path: Path, config: Any, reference: VisionReference, device: str) -> tuple[str, list[str]]:
    """The vision part beside the GGUF file ``path`` against the model's: a summary, and what is wrong."""
    file = mmproj_path(path)
    if file not in reference.done:
        reference.done[file] = _compare(file, config, reference, device)
    return reference.done[file]


def _compare(path: Path, config: Any, reference: VisionReference, device: str) -> tuple[str, list[str]]:
    if not path.is_file():
        return "missing", [f"its vision part {path.name} is missing"]
    file = GGUFFile(path)
    wrong = [f"{path.name}: {what}" for what in _wrong_numbers(file, config, reference)]
    if wrong:
        return "not computed", wrong
    try:
        found = features(read_vision(file, config, device), reference.picture, *_colours(file))
    except ValueError as error:
        return "not computed", [f"{path.name}: {error}"]
    error = float((found - reference.features).norm() / reference.features.norm())
    kinds = {info.type.name for info in file.tensors.values()} - {"F32"}
    allowed = ALLOWED["F16" if kinds else "F32"] + (0 if reference.exact else ROUGH_REFERENCE)
    if not error <= allowed:
        wrong.append(f"{path.name}: what it makes of a picture is off by {error:.1e} of it, allowed {allowed:.0e}")
    if reference.break_row is not None and file.metadata["clip.projector_type"] == "pixtral":
        wrong += [f"{path.name}: {what}" for what in _wrong_break(file, reference.break_row)]
    return f"a picture's features are off by {error:.1e} of them, allowed {allowed:.0e}", wrong


def _wrong_numbers(file: GGUFFile, config: Any, reference: VisionReference) -> Iterator[str]:
    wanted = vision_metadata(find_projector(config), config, (reference.mean, reference.std))
    for key, value in wanted.items():
        if key not in file.metadata:
            yield f"{key} is missing"
            continue
        found = file.metadata[key]
        found = found.tolist() if isinstance(found, np.ndarray) else found
        if not _same(found, value):
            yield f"{key} is {found} in the file and {value} in the model"
    epsilon = file.metadata.get("clip.vision.attention.layer_norm_epsilon", 0.0)
    if not all(math.isclose(epsilon, own, rel_tol=1e-6) for own in reference.epsilons):
        yield f"clip.vision.attention.layer_norm_epsilon is {epsilon} in the file; the model has {sorted(reference.epsilons)}"


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same, found, wanted))
    return math.isclose(found, wanted, rel_tol=1e-6) if isinstance(wanted, float) else found == wanted


def _colours(file: GGUFFile) -> tuple[list[float], list[float]]:
    return tuple([float(value) for value in file.metadata[f"clip.vision.image_{name}"]] for name in ("mean", "std"))


def _wrong_break(file: GGUFFile, row: torch.Tensor) -> Iterator[str]:
    if BREAK not in file.tensors:
        yield f"it lacks {BREAK}"
    elif not (load_tensor(file, BREAK).flatten() - row).norm() <= SAME_ROW * row.norm():
        yield f"{BREAK} is not the embedding of [IMG_BREAK]"
