"""What the tokens of a row see, where it holds several sequences, padding, or windows: for each an interval of keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.ops.backend import power_of_2


@dataclass(frozen=True)
class Band:
    """Query i sees the keys ``first[i]`` to ``last[i]``; key j is seen by the queries ``first_query[j]`` to ``last_query[j]``.

    All (B or 1, T) int32, none of them decreasing along a row; an interval that ends before it begins is empty.
    """

    first: Tensor
    last: Tensor
    first_query: Tensor
    last_query: Tensor

    @staticmethod
    def of(first: Tensor, last: Tensor) -> Band:
        key = torch.arange(first.shape[1], device=first.device, dtype=torch.int32).expand_as(first).contiguous()
        first_query = torch.searchsorted(last, key, out_int32=True)
        last_query = torch.searchsorted(first, key, right=True, out_int32=True) - 1
        return Band(first, last, first_query, last_query)

    def cut(self, length: int) -> Band:
        """Of the first ``length`` tokens, in the same memory."""
        return Band(*(t[:, :length] for t in (self.first, self.last, self.first_query, self.last_query)))

    def sees(self, rows: slice) -> Tensor:
        """(B or 1, 1, rows, T) bool."""
        key = torch.arange(self.first.shape[1], device=self.first.device)
        return ((key >= self.first[:, rows, None]) & (key <= self.last[:, rows, None])).unsqueeze(1)


@dataclass(frozen=True)
class Segments:
    """Sequences packed into one row (B = 1): where they begin and end, (count + 1,) int32 from 0, and the longest of them."""

    bounds: Tensor
    longest: int
    bands: dict[int | None, Band] = field(default_factory=dict, compare=False, repr=False)  # by window, as they are asked for

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences; reading them waits for the device."""
        return tuple(self.bounds.diff().tolist())


@dataclass(frozen=True)
class Padding:
    """Rows with padding at their ends: the first and the last token of each that is none, (B,) int32."""

    first: Tensor
    last: Tensor
    bands: dict[int | None, Band] = field(default_factory=dict, compare=False, repr=False)


def band(length: int, window: int | None, segments: Segments | Padding | None, device: torch.device) -> Band:
    """What each token sees, causally, within its window and its segment or row; computed once for a structure."""
    if segments is None:
        return _band_of_window(power_of_2(length), window, device).cut(length)
    if window not in segments.bands:
        token = torch.arange(length, device=device, dtype=torch.int32)
        if isinstance(segments, Padding):
            first, last = segments.first[:, None].repeat(1, length), torch.minimum(token, segments.last[:, None])
        else:
            bounds = segments.bounds.to(torch.int32)
            first, last = bounds[torch.searchsorted(bounds, token, right=True) - 1][None], token[None]
        segments.bands[window] = _causal_band(first, last, window)
    return segments.bands[window]


@functools.cache  # of few lengths, and for good: CUDA graphs read where a band lies
def _band_of_window(length: int, window: int | None, device: torch.device) -> Band:
    token = torch.arange(length, device=device, dtype=torch.int32)[None]
    return _causal_band(torch.zeros_like(token), token, window)


def _causal_band(first: Tensor, last: Tensor, window: int | None) -> Band:
    if window is not None:
        token = torch.arange(first.shape[1], device=first.device, dtype=torch.int32)
        first = torch.maximum(first, token - window + 1)
    return Band.of(first, last)
