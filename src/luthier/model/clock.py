"""How long a user waits for the first training step, said once: loading, adapters, the step with what it compiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from luthier.terminal import say


class Clock:
    """Runs from the moment when a model begins to load until it has trained its first step."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.parts: dict[str, float] = {}  # seconds by what they went into
        self.step_began: float | None = None
        self.waits_for_trainer = False  # which knows where a step of several batches ends
        self.is_over = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Clock]:
        started = time.monotonic()
        yield self
        self.parts[name] = time.monotonic() - started

    def forward_begins(self, device: torch.device) -> None:
        """In training. The second one is the end of the first step, unless a trainer says when that is."""
        if self.is_over:
            return
        if self.step_began is None:
            self.step_began = time.monotonic()
        elif not self.waits_for_trainer:
            self.step_ends(device)

    def step_ends(self, device: torch.device) -> None:
        if self.is_over or self.step_began is None:
            return
        self.is_over = True
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.monotonic()
        self.parts["first step"] = now - self.step_began
        between = now - self.began - sum(self.parts.values())
        parts = [f"{seconds:.1f} s {name}" for name, seconds in self.parts.items()]
        parts += [f"{between:.1f} s between them"] if between >= 0.1 else []
        say(f"First step {now - self.began:.1f} s after loading began: {', '.join(parts)}")
