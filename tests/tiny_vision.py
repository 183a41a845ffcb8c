"""Tiny random vision-language models with their processors: nothing is downloaded. Pictures are 8 to 64 patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tiny import VOCAB, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

VISION_VOCAB = VOCAB + 32
# Widths are multiples of 64: bitsandbytes' own dequantisation is wrong for others on a CPU, and tests compare with it.
TEXT = {
    "vocab_size": VISION_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "initializer_range": 0.1}
PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
SMOLVLM_PLACES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
SIGLIP_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PIXTRAL_VISION = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}

# family -> (special tokens, what the template writes for a picture)
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "qwen2_vl": (QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2_5_vl": (QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": (QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>"),
    "gemma3": (("<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>"),
    "mllama": (("<|image|>", "<|python_tag|>"), "<|image|>"),
    "llava": (PIXTRAL_TOKENS, "[IMG]"),
    "mistral3": (PIXTRAL_TOKENS, "[IMG]"),
    "internvl": (("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), "<IMG_CONTEXT>"),
    "smolvlm": (("<image>", "<fake_token_around_image>", "<global-img>", *SMOLVLM_PLACES), "<image>"),
}
# attributes of the tokenizer that a processor reads -> the first special tokens
NAMED_TOKENS = {
    "gemma3": ("boi_token", "eoi_token", "image_token"),
    "internvl": ("start_image_token", "end_image_token", "context_image_token", "video_token"),
}

WITH_BOS = ("gemma3", "mllama")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


def tiny_processor(family: str) -> transformers.ProcessorMixin:
    """The family's processor over the tiny tokenizer, with a ChatML template."""
    tokens, image = FAMILIES[family]
    template = TEMPLATE.replace("IMAGE", image)
    if family in WITH_BOS:
        template = "{{ bos_token }}" + template
    tokenizer = _tokenizer(family, tokens)
    tokenizer.chat_template = template
    if family.startswith("qwen"):
        sizes = {"patch_size": 8, "merge_size": 2}
        video = {"qwen3_vl": "Qwen3VLVideoProcessor"}.get(family, "Qwen2VLVideoProcessor")
        processor_class = {
            "qwen2_vl": transformers.Qwen2VLProcessor,
            "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
            "qwen3_vl": transformers.Qwen3VLProcessor,
        }[family]
        return processor_class(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes, min_pixels=16 * 16, max_pixels=64 * 64),
            video_processor=getattr(transformers, video)(**sizes),
            tokenizer=tokenizer,
            chat_template=template,
        )
    if family == "gemma3":
        images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    if family == "mllama":
        images = transformers.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=2)
        return transformers.MllamaProcessor(images, tokenizer, chat_template=template)
    if family == "internvl":
        size = {"height": 32, "width": 32}
        images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
        videos = transformers.InternVLVideoProcessor(size=size)
        return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)
    if family == "smolvlm":
        sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
        images, videos = transformers.SmolVLMImageProcessor(**sizes), transformers.SmolVLMVideoProcessor(**sizes)
        return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=template)
    images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    merge = 2 if family == "mistral3" else 1
    return transformers.PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=merge, chat_template=template)


def tiny_vision_config(family: str) -> transformers.PreTrainedConfig:
    """Two decoder layers and two vision layers of width 64."""
    token = _tokenizer(family, FAMILIES[family][0]).convert_tokens_to_ids
    if family.startswith("qwen"):
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        ids = dict(zip(names, map(token, QWEN_TOKENS), strict=True))
        text = TEXT | {"rope_parameters": MROPE}
        if family == "qwen3_vl":
            more = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
            more |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
            text |= {"head_dim": 16}
        elif family == "qwen2_vl":
            more = {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
        else:
            more = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
            more |= {"window_size": 32, "fullatt_block_indexes": [1]}
        return AutoConfig.for_model(family, text_config=text, vision_config=QWEN_VISION | more, **ids)
    if family == "gemma3":
        vision = SIGLIP_VISION | {"vision_use_head": False, "model_type": "siglip_vision_model"}
        text = TEXT | {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16, "rope_parameters": None}
        ids = {
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        }
        ids = {name: token(text) for name, text in ids.items()}
        return AutoConfig.for_model(family, text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    if family == "mllama":
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
        }
        vision |= {"image_size": 32, "patch_size": 8, "max_num_tiles": 2, "vision_output_dim": 128}
        vision |= {"intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
        return AutoConfig.for_model(family, text_config=text, vision_config=vision, image_token_index=token("<|image|>"))
    if family == "internvl":
        text, vision = TEXT | {"model_type": "qwen2"}, SIGLIP_VISION | {"image_size": [32, 32], "patch_size": [8, 8]}
        more = {"image_token_id": token("<IMG_CONTEXT>"), "image_seq_length": 4, "tie_word_embeddings": False}
        return AutoConfig.for_model(family, text_config=text, vision_config=vision, **more)
    if family == "smolvlm":
        text, more = TEXT | {"model_type": "llama"}, {"image_token_id": token("<image>"), "scale_factor": 2, "pad_token_id": 0}
        return AutoConfig.for_model(family, text_config=text, vision_config=SIGLIP_VISION, **more)
    text = TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
    more = {"spatial_merge_size": 2} if family == "mistral3" else {"vision_feature_select_strategy": "full"}
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=PIXTRAL_VISION,
        image_token_index=token("[IMG]"),
        vision_feature_layer=-1,
        **more,
    )


def tiny_vision_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random model on the CPU, the same for the same seed. One-dimensional weights are random too, so that norms, biases
    and gates that start at nought or one show in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(tiny_vision_config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def save_tiny_vision(family: str, directory: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a tiny model and its processor to ``directory`` as a checkpoint of safetensors."""
    directory = Path(directory)
    tiny_vision_model(family, seed, dtype).save_pretrained(directory)
    tiny_processor(family).save_pretrained(directory)
    return directory


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random RGB picture of ``size`` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_row(seed: int = 0, answer: str = "a cat", size: tuple[int, int] = (32, 32)) -> dict:
    """A chat row of one picture, a question and an answer."""
    question = [{"type": "image", "image": picture(seed, size)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"messages": messages}


def _tokenizer(family: str, tokens: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=False, bos=family in WITH_BOS, extra_tokens=tokens)
    if family not in NAMED_TOKENS:
        return tokenizer
    named = dict(zip(NAMED_TOKENS[family], tokens, strict=True))
    arguments = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=named, **arguments)
