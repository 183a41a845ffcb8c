"""The export of a QLoRA model to GGUF, proof included: seconds by phase, peak memory, and each quantiser's own speed.

    python bench/export.py [--model llama-8b] [--quant q4_k_m] [--base 16bit] [--layers 32] [--directory /tmp]

A random 16-bit checkpoint is written (and so lies in the page cache), loaded in 4 bits, given an adapter, and exported. Needs
three times the model's 16-bit size on the disk, and a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from models import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier import ExportProofError, FastLanguageModel, files
from luthier.gguf import convert, quantize, reader, writer
from luthier.gguf.types import TENSOR_TYPES
from luthier.model import gguf_export, merge
from luthier.proof import export, gguf_model, tensors

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
SAMPLE = 1 << 27  # weights that a quantiser is timed on
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU only to see that it runs


class Phases:
    """Seconds of the main thread by phase; what is called inside a phase counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = ["rest"]
        self._since = time.perf_counter()

    def switch(self, change: Callable[[], object]) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
        change()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **named):
            self.switch(lambda: self._open.append(name))
            try:
                result = function(*arguments, **named)
            finally:
                self.switch(self._open.pop)
            return self._timed_iterator(name, result) if isinstance(result, Iterator) else result

        return call

    def _timed_iterator(self, name: str, iterator: Iterator) -> Iterator:
        step = self.timed(name, lambda: next(iterator, None))
        while (item := step()) is not None:
            yield item


PHASES = {  # phase -> the functions that it is spent in
    "merge": [(merge.Merge, "tensors"), (merge.Merge, "__init__")],
    "read": [(merge.Merge, "read")],
    "quantise": [(convert, "encode_in_chunks")],
    "write": [(writer.GGUFWriter, "write")],
    "read back": [(writer.GGUFWriter, "_check")],
    "model over its base": [(export, "load_model"), (export, "save_adapter")],
    "trained model's logits": [(export, "reference_of")],
    "file's checksums": [(export, "checksums")],
    "file's tensors, attention": [
        (tensors.TensorComparison, "see"),
        (tensors.TensorComparison, "finish"),
        (export, "compare_attention"),
    ],
    "file's logits": [(gguf_model.GGUFModel, "logits")],
    "proof's tokens, template": [(export, "_compare_tokens"), (export, "_compare_chat"), (reader.GGUFFile, "__init__")],
    "tokenizer, template": [
        (convert, "tokenizer_metadata"),
        (convert, "chat_metadata"),
        (gguf_export, "create_ollama_modelfile"),
        (PreTrainedTokenizerFast, "save_pretrained"),
    ],
    "to the disk": [(files, "_fsync")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="a shape of bench/models.py")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--base", default="16bit", choices=("16bit", "nf4"))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--directory", type=Path, help="where there is room (default: the place of temporary files)")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    print(f"{card}, {arguments.model} to {arguments.quant} over {arguments.base}")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        export_model(arguments, Path(place))
    for name in quantize.QUANTIZERS if DEVICE == "cuda" else ():
        print(f"{name:8}{seconds_of(name, None):8.2f} s for 8e9 weights, from {SAMPLE} on the GPU", end="")
        print(f"{seconds_of(name, torch.rand(4096)):8.2f} s with an importance matrix" if name != "Q8_0" else "")


def export_model(arguments: argparse.Namespace, place: Path) -> None:
    start = time.perf_counter()
    tokenizer = random_checkpoint(arguments.model, arguments.layers, place / "base")
    model, _ = FastLanguageModel.from_pretrained(str(place / "base"), load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    print(f"made, saved and loaded in {time.perf_counter() - start:.1f} s")
    phases, resident = Phases(), gpu_memory(reset=True)
    with timing(phases), host_memory() as peak:
        start = time.perf_counter()
        try:
            (file,) = export.save_pretrained_gguf(model, place / "out", tokenizer, arguments.quant, base=arguments.base)
        except ExportProofError as error:
            print(error)
            file = None
        total = time.perf_counter() - start
        phases.switch(lambda: None)
    size = sum(entry.stat().st_size for entry in (place / "base").glob("*.safetensors"))
    written = f"{file.stat().st_size / 1e9:.2f} GB" if file else "nothing, for its proof failed"
    print(f"export of {size / 2e9:.2f}e9 weights to {written}: {total:.1f} s")
    for name, seconds in sorted(phases.seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:24}{seconds:7.2f} s")
    gpu = (gpu_memory() - resident) / 2**30
    print(f"peak beyond the model: GPU {gpu:.2f} GiB (the model {resident / 2**30:.2f}), host {peak[0] / 2**30:.2f} GiB")


def random_checkpoint(shape: str, layers: int | None, directory: Path) -> PreTrainedTokenizerFast:
    """Write a random bf16 checkpoint with a tokenizer of nearly as many tokens as it has rows."""
    model = random_model(shape, DEVICE, four_bit=False, layers=layers)
    # rounding changes what a random model of many layers says far more than what a trained one does: less for smaller logits
    model.get_output_embeddings().weight.data.mul_(0.125)
    tokenizer = large_tokenizer(model.config.vocab_size - 256)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory, max_shard_size="5GB")
    tokenizer.save_pretrained(directory)
    del model
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return tokenizer


def large_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` tokens: bytes, pairs of them, and so on. Small ones would hide what large ones cost."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters]
    pairs = list(itertools.product(letters, letters))
    triples = itertools.product(map("".join, pairs), letters)
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - len(tokens)))
    vocabulary = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, *others = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, extra_special_tokens=others
    )
    fast.chat_template = CHATML
    return fast


@contextlib.contextmanager
def timing(phases: Phases) -> Iterator[None]:
    """While open, the functions of `PHASES` are timed."""
    with contextlib.ExitStack() as patches:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                patches.enter_context(mock.patch.object(owner, name, phases.timed(phase, getattr(owner, name))))
        yield


@contextlib.contextmanager
def host_memory() -> Iterator[list[int]]:
    """While open, watch how much memory of its own the process holds more than at first: ``[bytes]``."""
    done, peak, first = threading.Event(), [0], own_memory()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], own_memory() - first)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def gpu_memory(reset: bool = False) -> int:
    """The most bytes that tensors held on the GPU since the last reset; at a reset, what they hold."""
    if DEVICE == "cpu":
        return 0
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def own_memory() -> int:
    """Bytes of the process that are no pages of a file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def seconds_of(name: str, importance: torch.Tensor | None) -> float:
    """Seconds to quantise 8e9 bf16 weights that are on the GPU, taken from `SAMPLE` of them."""
    values = torch.randn(SAMPLE // 4096, 4096, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    weights = None if importance is None else importance.cuda()

    def run() -> None:
        for chunk in values.split(quantize.CUDA_CHUNK // 4096):
            quantize.encode(chunk, TENSOR_TYPES[name], None if weights is None else weights.expand(chunk.shape))
        torch.cuda.synchronize()

    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 8e9 / SAMPLE


if __name__ == "__main__":
    main()
