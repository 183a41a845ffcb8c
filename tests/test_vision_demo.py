"""The demo's pictures, the patches its base was pretrained on, and the demo itself in small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.demo import make_vision_base, vision
from luthier.demo.text_images import MAX_CHARACTERS, PRINT, SIGN, draw, random_text, sign_text


@pytest.fixture(scope="module")
def base():
    """The untrained base, its tokenizer and its processor."""
    tokenizer = make_vision_base.build_tokenizer()
    torch.manual_seed(0)
    return make_vision_base.build_model(tokenizer).eval(), tokenizer, make_vision_base.build_processor(tokenizer)


def pictures_of(text: str, canvas: tuple[int, int], count: int = 2):
    rng = np.random.default_rng(0)
    return [draw(text, PRINT, rng, canvas) for _ in range(count)]


@pytest.mark.parametrize("canvas", PRINT.canvases)
def test_pretraining_sees_what_the_processor_makes(base, canvas):
    """Patches, token layout, positions and attention of the pretraining script against the stock processor and model."""
    model, tokenizer, processor = base
    images = pictures_of("Hello 42", canvas)
    pictures = torch.stack([torch.from_numpy(np.asarray(image)) for image in images])
    text = "<|vision_start|><|image_pad|><|vision_end|>Hello 42<|im_end|>"
    stock = processor(text=[text] * 2, images=images, return_tensors="pt")
    tokens = torch.tensor([tokenizer("Hello 42<|im_end|>")["input_ids"]] * 2)
    reader = make_vision_base.Reader(model)
    torch.testing.assert_close(make_vision_base.patches(pictures), stock["pixel_values"])
    with torch.no_grad():
        own = reader.logits(pictures, tokens)
        attention = [block.attn.__class__ for block in model.model.visual.blocks]
        make_vision_base.any_size(model)
        expected = model(**stock).logits[:, -tokens.shape[1] - 1 : -1]
    for block, kind in zip(model.model.visual.blocks, attention, strict=True):
        block.attn.__class__ = kind
    torch.testing.assert_close(own, expected)


def test_pictures_repeat_and_fit():
    for style, new_text in ((PRINT, random_text), (SIGN, sign_text)):
        one, two = (np.random.default_rng(7) for _ in range(2))
        for _ in range(50):
            text = new_text(one)
            assert text == new_text(two) and 1 <= len(text) <= MAX_CHARACTERS
            image, same = draw(text, style, one), draw(text, style, two)
            assert np.array_equal(image, same) and image.size[::-1] in style.canvases
            assert np.asarray(image).std() > 3  # something is written on it


def test_pretraining_lowers_the_loss():
    tokenizer = make_vision_base.build_tokenizer()
    torch.manual_seed(0)
    model = make_vision_base.build_model(tokenizer)
    curve = make_vision_base.train(model, tokenizer, steps=8, batch=4, learning_rate=2e-3, workers=0, seed=0)
    assert [step for step, _ in curve] == list(range(1, 9))
    assert curve[-1][1] < curve[0][1]


def test_the_demo_goes_from_pictures_to_a_merged_model(base, tmp_path, monkeypatch):
    model, _, processor = base
    make_vision_base.any_size(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(vision, "BASE", tmp_path / "base")
    monkeypatch.setattr(vision, "ROWS", 8)
    monkeypatch.setattr(vision, "HELD_OUT", 4)
    monkeypatch.setitem(vision.SMALL, "max_steps", 2)
    rates = vision.run(tmp_path / "out")
    assert set(rates) == {"base", "adapter", "merged, in plain transformers"}
    assert (tmp_path / "out/merged_16bit/model.safetensors").exists()
