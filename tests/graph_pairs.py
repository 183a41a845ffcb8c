"""A model twice, with graphs and without, where there is no GPU: what tests of graphs share.

``Again`` stands for the graphs' memory, and its graphs run the recorded function once more, on the objects it was made with.
Whatever a key does not notice shows in the numbers, as it would with kernels; and what a graph left there is gone when
another one starts. Backwards are counted: a forward may start in vain.
"""

from __future__ import annotations

import types

import pytest
import torch
from peft.tuners.lora import LoraLayer
from stock_pairs import difference, with_lora
from tiny import VOCAB, tiny_model

from luthier.model.accelerate import accelerate, graphs_of
from luthier.model.graphs import REPEATS


class Again:
    made = replayed = 0

    def __init__(self, size, device):
        self.size, self.device, self.bytes = size, device, size
        self.programs = []

    @staticmethod
    def fits(x):
        return True

    @staticmethod
    def alias(tensor):
        return tensor

    @staticmethod
    def aside(function, device):
        function()

    def record(self, function):
        function()
        Again.made += 1
        own, modules = function.__self__, (function.__self__.layers, function.__self__.trained)
        starts = function.__name__ == "forward"
        self.programs += [function.__self__] if starts else []

        def replay():
            for program in self.programs if starts else ():
                if program is not own:
                    program.buffers.mapped(lambda t: t.fill_(torch.nan if t.is_floating_point() else 99))
                    for piece in [piece for layer in program.gradients for piece in layer.pieces.values()]:
                        piece.fill_(torch.nan)
            left, (own.layers, own.trained) = (own.layers, own.trained), modules
            function()
            own.layers, own.trained = left
            Again.replayed += not starts

        return types.SimpleNamespace(replay=replay)


@pytest.fixture(autouse=True)
def counters():
    Again.made = Again.replayed = 0


def batch(rows: int = 2, length: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole rows, every token of which trains."""
    ids = torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def packed(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of these lengths in one, as a padding-free collator gives them."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = batch(1, sum(lengths), seed)["input_ids"]
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def graphed(model: torch.nn.Module) -> torch.nn.Module:
    graphs = graphs_of(accelerate(model))
    graphs.arena_class = Again
    return model.train()


def pair(family: str = "llama3", **settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model twice: with graphs, and without."""
    models = [graphed(with_lora(tiny_model(family), **settings)) for _ in range(2)]
    graphs_of(models[1]).enabled = False
    return tuple(models)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: torch.nn.Module, inputs: dict, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def assert_equal(models, inputs, replays: int | None = None, exact: bool = True) -> None:
    """Both models give the same step, and the first one took so many backwards from graphs."""
    before = Again.replayed
    (loss, gradients), (expected, truth) = (step(model, inputs) for model in models)
    if exact:
        assert torch.equal(loss, expected) and gradients.keys() == truth.keys()
        assert all(torch.equal(gradients[name], truth[name]) for name in truth)
    else:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert difference(gradients, truth) < 1e-5
    if replays is not None:
        assert Again.replayed - before == replays


def warm(models, inputs=None) -> None:
    for _ in range(REPEATS):
        assert_equal(models, batch() if inputs is None else inputs, replays=0)
    assert_equal(models, batch() if inputs is None else inputs, replays=1)


def change_scaling(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 0.5
