"""Random models of real shapes, made on the GPU in seconds: properly quantised normal weights, as a checkpoint has them.

Zeros or NaN would run faster than any trained model does (the card is power-limited), so they are of no use for timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from luthier.model.experts import STACKS, Nf4Experts, expert_stacks, is_experts, run_in_4bit
from luthier.model.lora import register_experts
from luthier.ops.fp8 import quantise_rows_reference

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    **LLAMA_8B,
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
GPT_OSS = {
    **LLAMA_8B,
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rope_parameters": None,
}
CHECK = {**LLAMA_8B, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
CHECK |= {"num_attention_heads": 16, "num_key_value_heads": 4}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = {
    **LLAMA_8B,
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "head_dim": 256,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
    "rope_parameters": None,
    "tie_word_embeddings": True,
}
SHAPES = {
    "llama-8b": LLAMA_8B,
    "check": CHECK,
    "qwen3-30b-a3b": QWEN3_MOE,
    "gpt-oss-20b": GPT_OSS,
    "check-qwen3-moe": {**QWEN3_MOE, "vocab_size": 32000, "num_experts": 32, "num_hidden_layers": 2},
    "check-gpt-oss": {**GPT_OSS, "vocab_size": 32000, "num_local_experts": 8, "num_hidden_layers": 2},
    "llama-3.1-8b": {**LLAMA_8B, "rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}},
    "qwen3-8b": {**LLAMA_8B, "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36},
    "llama-3.2-1b": {
        **LLAMA_8B,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {  # heads wider together than the model
        **LLAMA_8B,
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "smollm3-3b": {  # every fourth layer does not rotate
        **LLAMA_8B,
        "model_type": "smollm3",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": None,
        "tie_word_embeddings": True,
    },
    "olmo2-7b": {  # norms behind the branches, and over whole rows of q and k
        **LLAMA_8B,
        "model_type": "olmo2",
        "vocab_size": 100352,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "head_dim": None,
    },
    "qwen2.5-7b": {
        **LLAMA_8B,
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "mistral-7b": {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None},
    "gemma3-4b": {
        **GEMMA3,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gemma3-12b": {
        **GEMMA3,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma2-9b": {  # soft caps on scores and logits
        **GEMMA3,
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "sliding_window": 4096,
        "rope_parameters": LLAMA_8B["rope_parameters"],
    },
    "phi-4": {
        **LLAMA_8B,
        "model_type": "phi3",
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "head_dim": None,
    },
    "phi-3-mini": {  # heads 96 wide, and a window shorter than most training rows
        **LLAMA_8B,
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": 32,
        "head_dim": None,
        "sliding_window": 2047,
    },
    "granite-8b": {
        **LLAMA_8B,
        "model_type": "granite",
        "vocab_size": 49155,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "head_dim": None,
        "attention_multiplier": 1 / 128,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    },
}
TINY = {  # widths with which a script of this folder can be tried on a CPU
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "pad_token_id": 0,
}


def random_model(
    shape: str,
    device: str = "cuda",
    four_bit: bool = True,
    seed: int = 0,
    layers: int | None = None,
    four_bit_experts: bool = True,
    **changes: int,
) -> nn.Module:
    """A bf16 model of ``shape`` on ``device`` whose decoder's linear layers and experts are NF4 with double quantisation.

    ``four_bit=False``: they stay bf16; ``four_bit_experts=False``: the experts do, as bitsandbytes leaves them. ``changes``:
    fields of the config that differ from the shape's.
    """
    settings = {key: value for key, value in {**SHAPES[shape], **changes}.items() if value is not None}
    settings |= {"num_hidden_layers": layers} if layers else {}
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and four_bit:
                setattr(module, name, _nf4_linear(_random(child, child.weight.shape, generator, device), child.bias))
        if is_experts(module) and four_bit and four_bit_experts:
            for name in [name for name, _ in module.named_parameters(recurse=False) if name in STACKS]:
                setattr(module, name, _nf4(_random(module, getattr(module, name).shape, generator, device)))
            run_in_4bit(module)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = _random(module, parameter.shape, generator, device)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:  # Gemma's embedding scale
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, leaf, torch.tensor(config.hidden_size**0.5, device=device))
    model.tie_weights()
    model.is_loaded_in_4bit = four_bit
    return model.requires_grad_(False)


def write_checkpoint(directory: str, shape: str, layers: int | None = None, **changes: int) -> None:
    """A bf16 checkpoint of ``shape`` as transformers saves one, with a tokenizer of four words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_model(shape, device, four_bit=False, layers=layers, **changes).save_pretrained(directory, max_shard_size="5GB")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = Tokenizer(WordLevel({token: index for index, token in enumerate((*special.values(), "<unk>"))}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(directory)


def load_stock(directory: str, four_bit: bool = True) -> nn.Module:
    """A checkpoint as transformers' documentation loads it, in bf16, its linear layers in NF4 or not."""
    settings = {"dtype": torch.bfloat16, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    if four_bit:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    return AutoModelForCausalLM.from_pretrained(directory, **settings)


def with_lora(model: nn.Module, r: int = 16) -> nn.Module:
    """fp32 adapters on all linear layers and experts, B away from zero as after some training."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", target_parameters=list(expert_stacks(model)) or None)
    register_experts(model, config)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # peft gives a stack's the dtype of the stack
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def dequantised(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model with its 4-bit weights written out in ``dtype``, and everything else in that too."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, bnb.nn.Linear4bit):
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight, linear.bias = _written_out(child.weight), child.bias
                setattr(module, name, linear)
        if isinstance(module, Nf4Experts):
            module.__class__ = type(module).__mro__[2]
            for name, stack in list(expert_stacks(module).items()):
                setattr(module, name.strip("."), _written_out(stack))
    model.is_loaded_in_4bit = False
    return model.to(dtype)


def _written_out(weight: bnb.nn.Params4bit) -> nn.Parameter:
    return nn.Parameter(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), requires_grad=False)


@contextlib.contextmanager
def emulating_8_bits(model: nn.Module, everywhere: bool) -> Iterator[None]:
    """While open, the decoder's frozen linear layers round to e4m3 as 8-bit compute does: ``everywhere``, or backwards only."""
    layers = [m for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in n and "lora_" not in n]
    for layer in layers:
        layer.forward = lambda x, weight=layer.weight: _Emulated.apply(x, weight, everywhere)
    yield
    for layer in layers:
        del layer.forward


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, everywhere):
        ctx.save_for_backward(weight)
        return _rounded(x) @ _rounded(weight).T if everywhere else x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return _rounded(grad) @ _rounded(ctx.saved_tensors[0].T).T, None, None


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return quantise_rows_reference(x.reshape(-1, x.shape[-1])).dequantised().view(x.shape)


def in_nf4(model: nn.Module) -> nn.Module:
    """The model with the linear layers of its decoder quantised, and frozen."""
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _nf4_linear(child.weight.data, child.bias))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def _nf4_linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    new.weight, new.bias = _nf4(weight), bias
    return new


def _nf4(weight: torch.Tensor) -> bnb.nn.Params4bit:
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return packed.to(weight.device)


def _random(module: nn.Module, shape: torch.Size, generator: torch.Generator, device: str) -> torch.Tensor:
    if len(shape) == 1 and not isinstance(module, nn.Linear):  # a norm; Gemma's scale is one plus its weight
        return torch.full(shape, float("Gemma" not in type(module).__name__), dtype=torch.bfloat16, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02)
