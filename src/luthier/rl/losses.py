"""The losses by the names their papers gave them, as settings of TRL's ``GRPOConfig``.

All share the group-relative advantage; they differ in how the probability ratio is clipped and how tokens are
averaged. A ``defaults`` entry fills a setting that the user left at None; a ``fixed`` one is what makes the loss that loss.

=======  ===============================================  ==================================  ================
name     ratio                                            average over                        paper
=======  ===============================================  ==================================  ================
grpo     per token, clipped to [1 - eps, 1 + eps_high]    tokens of a sequence, sequences     arXiv:2402.03300
dr_grpo  as grpo; advantages not divided by the std       max_completion_length, sequences    arXiv:2503.20783
dapo     as grpo                                          tokens of the whole step            arXiv:2503.14476
bnpo     as grpo                                          tokens of the micro-batch           arXiv:2506.02864
gspo     per sequence (geometric mean), clipped           sequences                           arXiv:2507.18071
cispo    capped at eps_high, detached; weighs log p       tokens of the whole step            arXiv:2506.13585
sapo     soft gate (sigmoid) instead of a clip            tokens of a sequence, sequences     arXiv:2511.20347
=======  ===============================================  ==================================  ================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.errors import unknown


@dataclass(frozen=True)
class Loss:
    """What a loss asks of TRL's arguments."""

    loss_type: str
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


# What TRL itself takes for a setting left at None.
TRL_DEFAULTS = {"importance_sampling_level": "token", "scale_rewards": "group", "epsilon_high": None}

LOSSES = {
    "grpo": Loss("grpo"),
    "dr_grpo": Loss("dr_grpo", defaults={"scale_rewards": "none"}),
    "dapo": Loss("dapo"),
    "bnpo": Loss("bnpo"),
    "gspo": Loss("grpo", fixed={"importance_sampling_level": "sequence"}),
    # cispo caps the ratio itself, not its distance from 1: TRL's fallback, epsilon = 0.2, would cap every token.
    "cispo": Loss("cispo", defaults={"epsilon_high": 5.0}),
    "sapo": Loss("sapo"),
    "luspo": Loss("luspo", defaults={"importance_sampling_level": "sequence"}),
    "vespo": Loss("vespo"),
}


def trl_settings(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """TRL's arguments for the loss ``name``; ``given`` holds the user's values (None = not set) of ``TRL_DEFAULTS``.

    Raises ``ValueError`` for an unknown name, and for a value that contradicts what the name means.
    """
    if name not in LOSSES:
        raise unknown("loss_type", name, LOSSES)
    loss = LOSSES[name]
    for key, value in loss.fixed.items():
        if given.get(key) not in (None, value):
            raise ValueError(f"loss_type={name!r} means {key}={value!r}, but {key}={given[key]!r} was given: leave it out")
    chosen = {key: value for key, value in given.items() if value is not None}
    return {**TRL_DEFAULTS, **loss.defaults, **chosen, **loss.fixed, "loss_type": loss.loss_type}
