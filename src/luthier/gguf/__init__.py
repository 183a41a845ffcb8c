"""GGUF: writing, reading and quantising the files that llama.cpp and Ollama run, in plain Python and torch."""

from luthier.gguf.convert import convert_to_gguf, write_gguf
from luthier.gguf.ollama import (
    MODEL_TO_OLLAMA_TEMPLATE_MAPPER,
    OLLAMA_TEMPLATES,
    create_ollama_model,
    create_ollama_modelfile,
)
from luthier.gguf.quantize import quantize_gguf
from luthier.gguf.reader import GGUFFile
from luthier.gguf.tokenizer import fix_sentencepiece_gguf
from luthier.gguf.types import ALLOWED_QUANTS, print_quantization_methods

__all__ = [
    "ALLOWED_QUANTS",
    "GGUFFile",
    "MODEL_TO_OLLAMA_TEMPLATE_MAPPER",
    "OLLAMA_TEMPLATES",
    "convert_to_gguf",
    "create_ollama_model",
    "create_ollama_modelfile",
    "fix_sentencepiece_gguf",
    "print_quantization_methods",
    "quantize_gguf",
    "write_gguf",
]
