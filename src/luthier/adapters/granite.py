"""Granite 3: scaled residuals, logits divided by a constant."""

from luthier.adapters.spec import Head, Spec

SPEC = Spec(prefix="Granite", residual_scale="residual_multiplier", head=Head(divisor="logits_scaling"))
