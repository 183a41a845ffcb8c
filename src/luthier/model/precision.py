"""In how many bits a model is held, and the dtype it computes in."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from luthier.errors import UnsupportedError, unknown
from luthier.model.experts import quantising_config

Precision = Literal["nf4", "int8", "16bit", "full"]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def is_bfloat16_supported() -> bool:
    """Whether the current device computes in bfloat16 (a GPU that only emulates it does not)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True  # every CPU that torch runs on


def choose_precision(
    load_in_4bit: bool | None, load_in_8bit: bool, load_in_16bit: bool, load_in_fp8: bool, full_finetuning: bool
) -> Precision:
    """The one precision asked for; NF4 if none was. Two of them are a ``ValueError``."""
    if load_in_fp8:
        raise UnsupportedError(
            "load_in_fp8=True is not in this version. Allowed: load_in_4bit (the smallest), load_in_8bit or load_in_16bit."
        )
    if full_finetuning and (load_in_4bit or load_in_8bit):
        quantised = "load_in_4bit" if load_in_4bit else "load_in_8bit"
        raise ValueError(
            f"full_finetuning=True trains every weight in 16 bits, and {quantised}=True holds them quantised: choose one. "
            "For less memory, leave full_finetuning out and train an adapter."
        )
    wanted = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit}
    asked = [name for name, value in wanted.items() if value]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(f'{name}=True' for name in asked)} were given: choose one precision.")
    if full_finetuning:
        return "full"
    if load_in_8bit:
        return "int8"
    if load_in_16bit or load_in_4bit is False:
        return "16bit"
    return "nf4"


def choose_dtype(dtype: torch.dtype | str | None, trains_all: bool = False) -> torch.dtype:
    """The compute dtype: as given, else bfloat16 where the device has it, else float16; float32 on a CPU.

    ``trains_all``: the weights themselves train, which in float16 lose most of what they learn; float32 instead.
    """
    if dtype is None or dtype == "auto":
        if not torch.cuda.is_available() or (trains_all and not is_bfloat16_supported()):
            return torch.float32
        return torch.bfloat16 if is_bfloat16_supported() else torch.float16
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype.removeprefix("torch.")]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch dtype or its name, not {dtype!r}. Allowed: {', '.join(DTYPES)}.")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}: a model computes in bfloat16, float16 or float32.")
    if dtype == torch.bfloat16 and not is_bfloat16_supported():
        warnings.warn("This GPU has no bfloat16: float16 is used instead.", UserWarning, stacklevel=3)
        return torch.float16
    return dtype


def quantisation(precision: Precision, dtype: torch.dtype, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """What transformers quantises with while loading; None for 16 bits."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision != "nf4":
        return None
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    return quantising_config(**settings) if has_experts(config) else BitsAndBytesConfig(**settings)


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a config describes a mixture of experts."""
    text = config.get_text_config()
    return any(isinstance(getattr(text, name, None), int) and getattr(text, name) > 1 for name in EXPERT_COUNTS)
