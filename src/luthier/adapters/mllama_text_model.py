"""The decoder of Llama 3.2 Vision: every fifth layer attends to the image instead of the text."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Mllama", layers=("SelfAttentionDecoderLayer",), norms=("TextRMSNorm",))
