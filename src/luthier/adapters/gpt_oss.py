"""gpt-oss 20B and 120B: attention sinks, experts with biases and a clamped gate."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="GptOss",
    norm="scale_then_cast",
    rotary="half_width",
    mlp="experts",
    sinks="sinks",
    mlp_targets=(),
    expert_gate="clamped",
    window="attention",
)
