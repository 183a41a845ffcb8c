"""The same tiny model twice: what stock transformers and peft compute on it, to hold Luthier's against."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCAB, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TARGETS = r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def batch(rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded rows with masked labels: the prompt, the padding, and every fifth token do not train."""
    ids = torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1:2, length - 5 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    labels[:, ::5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_lora(model: torch.nn.Module, **settings) -> PeftModel:
    """A LoRA adapter on every projection, with B away from zero so that A has a gradient."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def loss_and_gradients(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The relative error of all gradients together."""
    assert left.keys() == right.keys()
    squares = [(left[name].double() - right[name].double()).square().sum() for name in right]
    return float((sum(squares) / sum(right[name].double().square().sum() for name in right)).sqrt())


def assert_alike(fast: tuple, stock: tuple, within: float = 1e-5) -> None:
    """Both as ``loss_and_gradients`` gives them: the loss within 1e-5 of stock's, the gradients together ``within``."""
    torch.testing.assert_close(fast[0], stock[0], rtol=1e-5, atol=0)
    assert difference(fast[1], stock[1]) < within


def nf4_model(tmp_path, family: str = "llama3", **changes):
    """A tiny model of ``family`` loaded in NF4, free of bitsandbytes' in-place repacking on some CPUs."""
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / family)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    settings = {"quantization_config": quantisation, "dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family, **settings)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model
