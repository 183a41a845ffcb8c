"""The quantisers' kernels give the bytes that the torch code gives, which test_gguf_quantize.py holds against llama.cpp."""

import os

import pytest
import torch
from quantiser_inputs import column_importance, inputs

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from luthier.gguf import blocks, kernels
from luthier.gguf.quantize import QUANTIZERS, WEIGHTED_QUANTIZERS, encode
from luthier.gguf.types import TENSOR_TYPES
from luthier.ops.backend import triton

ON_GPU = torch.cuda.is_available()
KERNELS_RUN = triton is not None and (ON_GPU or not isinstance(kernels._ordered_sum, triton.runtime.JITFunction))
pytestmark = pytest.mark.skipif(not KERNELS_RUN, reason="no Triton, or TRITON_INTERPRET=1 was not set")
# in the interpreter those that differ in their kernels; the others take its time for nothing
PLAIN = QUANTIZERS if ON_GPU else ("Q2_K", "Q3_K", "Q4_K", "Q6_K")
WEIGHTED = WEIGHTED_QUANTIZERS if ON_GPU else ("Q2_K", "Q3_K", "Q4_K", "Q4_0")
INPUTS = {name: torch.from_numpy(values) for name, values in inputs().items()}
COLUMNS = next(iter(INPUTS.values())).shape[1]


def differing_inputs(name, weights, monkeypatch):
    """The kinds of input whose bytes are not those of the torch code on the CPU."""
    kind, values = TENSOR_TYPES[name], torch.cat(list(INPUTS.values()))
    expanded = None if weights is None else weights.expand(values.shape)
    monkeypatch.setattr(blocks, "compiled", None)
    expected = encode(values, kind, expanded)
    if ON_GPU:
        found = encode(values.cuda(), kind, None if expanded is None else expanded.cuda()).cpu()
    else:
        monkeypatch.setattr(blocks, "has_kernels", lambda x: True)
        monkeypatch.setattr(kernels, "LANES", 1 << 12)  # the interpreter takes its time for a program, not for a lane
        found = encode(values, kind, expanded)
    alike = (found == expected).all(1).split([len(values) for values in INPUTS.values()])
    return [what for what, same in zip(INPUTS, alike, strict=True) if not same.all()]


@pytest.mark.parametrize("name", PLAIN)
def test_a_gpu_gives_the_same_bytes(name, monkeypatch):
    assert differing_inputs(name, None, monkeypatch) == []


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_gpu_gives_the_same_bytes_with_an_importance_matrix(name, monkeypatch):
    assert differing_inputs(name, torch.from_numpy(column_importance(COLUMNS)), monkeypatch) == []
