"""Tiny random models of every text family, and a tokenizer trained on the spot: nothing is downloaded."""

from __future__ import annotations

import functools
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from luthier.model.torchvision_repair import repair_torchvision

repair_torchvision()

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

VOCAB = 480  # every word id that the tokenizer can produce is below it, with room for a few added tokens
PAD, BOS, EOS, START, END = "<|pad|>", "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,  # a multiple of 64: bitsandbytes on a CPU misreads others (see model/cpu_4bit.py)
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # ten times the usual: random logits that differ enough for greedy tokens to mean something
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "intermediate_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# family -> (model_type, what it changes in BASE); None drops a key that the family does not have
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"head_dim": None}),
    "granite": ("granite", {"head_dim": None, "attention_multiplier": 0.25, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "cohere2": ("cohere2", {"sliding_window": 16}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "olmo3": ("olmo3", {"head_dim": None, "sliding_window": 16}),
    "smollm3": ("smollm3", {"head_dim": None, "no_rope_layer_interval": 2}),
    "glm4": ("glm4", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "rope_parameters": YARN_ROPE}),
}


@functools.cache
def _trained_bpe() -> str:
    """A byte-level BPE over Python's own documentation, as the JSON of a tokenizers.Tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:60_000]
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[PAD, BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat: bool = True, bos: bool = False, extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A new tokenizer of 448 tokens (plus ``extra_tokens``): pad 0, bos 1, eos 2, ``<|im_start|>`` 3, ``<|im_end|>`` 4.

    ``chat`` gives it a ChatML template, ``bos`` a post-processor that puts ``<|bos|>`` before every text.
    """
    tokenizer = Tokenizer.from_str(_trained_bpe())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra_tokens])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[START, END],
    )
    if chat:
        fast.chat_template = CHATML
    return fast


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """The configuration of a two-layer model of ``family``, hidden size 64; every width divides by 32."""
    model_type, changes = FAMILIES[family]
    settings = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random model of ``family`` on the CPU, the same for the same seed; norms and biases are random too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = "eager" if family == "gemma2" else None  # transformers' sdpa would leave its soft caps out
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():  # initialisation leaves them at one and zero, where a wrong treatment would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def save_tiny(
    family: str,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "50GB",
) -> Path:
    """Write a tiny model and its tokenizer to ``directory`` as a checkpoint of safetensors, and give the directory back."""
    directory = Path(directory)
    tiny_model(family, seed, dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory
