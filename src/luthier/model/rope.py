"""Contexts beyond a model's native length, by scaling its rotary position embeddings."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from luthier.errors import UnsupportedError, unknown
from luthier.files import atomic_file

FACTOR_TYPES = ("linear", "llama3", "proportional")  # one factor stretches the positions
SELF_SCALING = ("dynamic", "longrope")  # these adapt to the length at hand
SCALING_FILE = "rope_scaling.json"  # beside an adapter that was trained over other positions than its base's own
SCALED_FIELDS = ("rope_parameters", "max_position_embeddings")


def native_length(config: PreTrainedConfig) -> int | None:
    """Tokens that the checkpoint was made for; None where nothing bounds them."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def scale_positions(config: PreTrainedConfig, max_seq_length: int | None, rope_scaling: dict | None = None) -> None:
    """Change ``config`` so that positions up to ``max_seq_length`` are within reach; ``rope_scaling`` overrides the scheme.

    Beyond the native length the checkpoint's own scheme is stretched, or a linear one applied, with a warning.
    """
    text = config.get_text_config()
    native = native_length(config)
    if rope_scaling is not None:
        if not isinstance(rope_scaling, dict):
            raise TypeError(f"rope_scaling is {rope_scaling!r}: give a dict such as {{'rope_type': 'linear', 'factor': 2.0}}.")
        kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise unknown("rope_type", kind, ("default", *ROPE_INIT_FUNCTIONS))
        factor = rope_scaling.get("factor", 1.0)
        if not isinstance(factor, int | float) or factor < 1:
            raise ValueError(f"The factor of rope_scaling is {factor!r}: it must be a number of at least 1.")
        _require_rope(text)
        for parameters in _full_attention(text):
            parameters.update({("rope_type" if key == "type" else key): value for key, value in rope_scaling.items()})
        if native is not None:
            text.max_position_embeddings = max(native, max_seq_length or 0)
        try:
            text.validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_scaling={rope_scaling!r} is not whole: {error.args[0]}.") from error
        return
    if native is None or max_seq_length is None or max_seq_length <= native:
        return
    _require_rope(text)
    ratio = max_seq_length / native
    for parameters in _full_attention(text):
        _stretch(parameters, ratio, max_seq_length)
    kinds = {parameters["rope_type"] for parameters in _full_attention(text)}
    if kinds != {"dynamic"}:  # which needs the native length to know when to start
        text.max_position_embeddings = max_seq_length
    warnings.warn(
        f"max_seq_length={max_seq_length} is beyond the model's native {native}: {' and '.join(sorted(kinds))} RoPE scaling "
        f"by {ratio:g} is applied, and saved with the model. Without training on long rows its quality drops.",
        UserWarning,
        stacklevel=4,
    )


def save_scaling(config: PreTrainedConfig, base_config: PreTrainedConfig, directory: Path) -> None:
    """Write the positions of ``config`` beside an adapter where they are not its base's own, which peft does not save."""
    scaled, own = ({name: getattr(c.get_text_config(), name, None) for name in SCALED_FIELDS} for c in (config, base_config))
    if scaled != own:
        with atomic_file(directory / SCALING_FILE) as place:
            place.write_text(json.dumps(scaled, indent=1), encoding="utf-8")


def restore_scaling(config: PreTrainedConfig, adapter: Path | None) -> None:
    """Give ``config`` the positions that the adapter in a directory was trained over."""
    if adapter is not None and (adapter / SCALING_FILE).exists():
        for name, value in json.loads((adapter / SCALING_FILE).read_text(encoding="utf-8")).items():
            setattr(config.get_text_config(), name, value)


def _require_rope(text: PreTrainedConfig) -> None:
    if not getattr(text, "rope_parameters", None):
        raise UnsupportedError(
            f"{text.model_type} has no rotary positions to scale: max_seq_length can be at most {native_length(text)}."
        )


def _full_attention(text: PreTrainedConfig) -> list[dict]:
    """The parameters to change, one dict or one per kind of layer; layers with a sliding window never see that far."""
    text.rope_parameters = copy.deepcopy(text.rope_parameters)
    if "rope_type" in text.rope_parameters:
        return [text.rope_parameters]
    return [value for kind, value in text.rope_parameters.items() if isinstance(value, dict) and kind != "sliding_attention"]


def _stretch(parameters: dict, ratio: float, length: int) -> None:
    kind = parameters["rope_type"]
    if kind == "default":
        parameters.update(rope_type="linear", factor=ratio)
    elif kind == "yarn":
        parameters["factor"] = length / parameters["original_max_position_embeddings"]
    elif kind in FACTOR_TYPES:
        parameters["factor"] *= ratio
    elif kind not in SELF_SCALING:
        raise UnsupportedError(f"RoPE scaling of type {kind!r} cannot be stretched automatically: pass rope_scaling={{...}}.")
