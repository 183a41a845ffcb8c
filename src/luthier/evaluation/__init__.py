"""Measuring a model: perplexity, competition problems, and base against tuned."""

from luthier.evaluation.aime import AIMEReport, aime
from luthier.evaluation.compare import Comparison, compare, measure_loss, measure_rewards
from luthier.evaluation.perplexity import Perplexity, perplexity

__all__ = [
    "AIMEReport",
    "Comparison",
    "Perplexity",
    "aime",
    "compare",
    "measure_loss",
    "measure_rewards",
    "perplexity",
]
