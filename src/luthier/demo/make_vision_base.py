"""Pretrain the demo's vision base: a Qwen2.5-VL of about 3 M parameters that reads printed words.

    python -m luthier.demo.make_vision_base OUT_DIR            # a GPU: 3 to 4 minutes
    python -m luthier.demo.make_vision_base OUT_DIR --steps 3000 --batch 64     # a CPU: an hour or two

It draws its pictures as it goes (``text_images.PRINT``), so there is no data set: the seed is the data. The picture is
followed by its text and the end token, nothing else; no chat and no other style is ever shown. OUT_DIR gets the model
(bf16 safetensors), tokenizer, processor and ``training.json`` (settings, loss curve, held-out error).
The pictures are cut into patches here, as the processor does it (a test compares the two), so that the machine that
trains needs no torchvision.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.vision_utils import get_vision_position_ids

from luthier.demo.text_images import MAX_CHARACTERS, PRINT, draw, random_text
from luthier.files import atomic_file
from luthier.model.torchvision_repair import repair_torchvision

if TYPE_CHECKING:  # importing a model class imports torchvision, which may need its repair first
    from transformers import PreTrainedModel

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 8, 2
"""Pixels along a patch; patches along the square that becomes one token of the language model."""

PIXELS = {"min_pixels": 32 * 64, "max_pixels": 48 * 160}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IGNORE = -100

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\n' }}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{%- for part in parts -%}{{ part.text }}{%- endfor -%}<|im_end|>{%- endgeneration -%}
{%- else -%}
{%- for part in parts -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{%- endif -%}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and the special tokens of Qwen2.5-VL: to read is to spell, so no word is beyond it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": 288,  # 263 tokens, rounded up to what 4-bit matrix kernels divide by
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 64,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast):
    """The Qwen2.5-VL processor for pictures of 8 to 30 tokens. Needs torchvision, as every Qwen processor does."""
    repair_torchvision()
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    settings = {"patch_size": PATCH, "merge_size": MERGE, "image_mean": list(MEAN), "image_std": list(STD)}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings, **PIXELS),
        video_processor=Qwen2VLVideoProcessor(**settings),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def patches(pictures: Tensor) -> Tensor:
    """The processor's ``pixel_values`` of equally large pictures.

    ``pictures``: uint8 (B, H, W, 3), H and W multiples of 16. Gives float32 (B * H/8 * W/8, 3 * 2 * 8 * 8): patches in
    the order of the 2 x 2 squares that are merged, each repeated over the two frames of the temporal patch.
    """
    count, height, width, channels = pictures.shape
    mean, std = (torch.tensor(values, device=pictures.device) for values in (MEAN, STD))
    x = (pictures.float() / 255.0 - mean) / std
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    x = x.view(count, rows, MERGE, PATCH, columns, MERGE, PATCH, channels)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # picture, row, column, row in square, column in square, channel, y, x
    x = x.unsqueeze(-3).expand(*x.shape[:-2], 2, PATCH, PATCH)
    return x.reshape(-1, channels * 2 * PATCH * PATCH)


class Pictures(IterableDataset):
    """Endless batches of one canvas size each: ``(pictures uint8 (B, H, W, 3), tokens int64 (B, MAX_CHARACTERS + 1))``.

    The tokens are the text, the end token and ``IGNORE``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int, seed: int) -> None:
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            canvas = PRINT.canvases[rng.integers(len(PRINT.canvases))]
            texts = [random_text(rng) for _ in range(self.batch)]
            pictures = np.stack([np.asarray(draw(text, PRINT, rng, canvas)) for text in texts])
            tokens = torch.full((self.batch, MAX_CHARACTERS + 1), IGNORE)
            for row, text in zip(tokens, texts, strict=True):
                ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
                row[: len(ids)] = torch.tensor(ids)
            yield torch.from_numpy(pictures), tokens


def build_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model, whose pictures must be of one size in each batch until ``any_size`` is called."""
    repair_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision

    class EqualPictures(Qwen2_5_VLVisionAttention):
        """The same attention in one call for all pictures instead of one call for each."""

        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
            length, count = hidden_states.shape[0], cu_seqlens.numel() - 1
            q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).unbind(1)
            q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
            q, k, v = (x.reshape(count, -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
            return self.proj(out.transpose(1, 2).reshape(length, -1))

    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    for block in model.model.visual.blocks:
        block.attn.__class__ = EqualPictures
    return model


def any_size(model: PreTrainedModel) -> None:
    """Give the vision blocks their stock attention back."""
    for block in model.model.visual.blocks:
        block.attn.__class__ = type(block.attn).__base__


class Speller(nn.Module):
    """Predicts the text from the columns of patches alone (CTC), only to teach the vision tower where letters are.

    Without it the language model has nothing to copy from and learns letter frequencies for thousands of steps.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.head = nn.Linear(model.config.vision_config.hidden_size, model.config.text_config.vocab_size)
        self.blank, self.end = model.config.text_config.pad_token_id, model.config.text_config.eos_token_id
        self.states: Tensor | None = None
        model.model.visual.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: tuple, output) -> None:
        self.states = output.last_hidden_state

    def loss(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """The mean CTC loss a token of the batch that the model has just seen."""
        count, height, width, _ = pictures.shape
        rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
        states = self.states.float().view(count, rows, columns, MERGE, MERGE, -1).mean(dim=(1, 3)).flatten(1, 2)
        scores = self.head(states).log_softmax(-1).transpose(0, 1)
        text = tokens.masked_fill(tokens == self.end, IGNORE)
        lengths = (text != IGNORE).sum(1)
        steps = torch.full_like(lengths, len(scores))
        return F.ctc_loss(scores, text.clamp(min=0), steps, lengths, blank=self.blank, zero_infinity=True)


@dataclass(frozen=True)
class Layout:
    """What pictures of one size share: the tokens before their text, and the positions in tower and decoder."""

    head: Tensor  # int64 (1, S + 2): <|vision_start|>, S times <|image_pad|>, <|vision_end|>
    grid: Tensor  # int64 (1, 3)
    patch_positions: Tensor  # int64 (4 S, 2)
    positions: Tensor  # int64 (3, 1, S + 2 + MAX_CHARACTERS + 1)


class Reader:
    """The model on pictures of one size, without the stock model's loops over them: ``<|vision_start|>``, the picture's
    tokens, ``<|vision_end|>`` and the text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layouts = model, {}

    def layout(self, height: int, width: int, device: torch.device) -> Layout:
        """The layout for pictures of ``height`` and ``width`` pixels; worked out once."""
        if (height, width) not in self.layouts:
            config = self.model.config
            grid = torch.tensor([[1, height // PATCH, width // PATCH]], device=device)
            squares = int(grid.prod()) // MERGE**2
            head = [config.vision_start_token_id, *[config.image_token_id] * squares, config.vision_end_token_id]
            ids = torch.tensor([head + [0] * (MAX_CHARACTERS + 1)], device=device)
            types = (ids == config.image_token_id).int()
            positions, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=grid)
            self.layouts[height, width] = Layout(ids[:, : len(head)], grid, get_vision_position_ids(grid, MERGE), positions)
        return self.layouts[height, width]

    def logits(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """float (B, T, vocabulary): the prediction of each of the (B, T) ``tokens`` from the picture and those before it.

        ``pictures``: uint8 (B, H, W, 3); T is at most ``MAX_CHARACTERS + 1``.
        """
        count, height, width, _ = pictures.shape
        layout = self.layout(height, width, pictures.device)
        squares = layout.head.shape[1] - 2
        seen = self.model.model.visual(
            patches(pictures),
            grid_thw=layout.grid.expand(count, -1),
            position_ids=layout.patch_positions.repeat(count, 1),
            # Every block attends to its whole picture, so the order of windows is free: leave the patches where they are.
            window_index=torch.arange(count * squares, device=pictures.device),
            cu_window_seqlens=torch.arange(count + 1, device=pictures.device, dtype=torch.int32),
        ).pooler_output
        ids = torch.cat([layout.head.expand(count, -1), tokens.clamp(min=0)], dim=1)
        states = self.model.get_input_embeddings()(ids)
        states[:, 1 : squares + 1] = seen.view(count, squares, -1).to(states.dtype)
        positions = layout.positions[:, :, : ids.shape[1]].expand(-1, count, -1)
        states = self.model.model.language_model(
            inputs_embeds=states, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.model.lm_head(states[:, -tokens.shape[1] - 1 : -1])

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """Greedy tokens, int64 (B, MAX_CHARACTERS + 1)."""
        tokens = torch.zeros((len(pictures), 0), dtype=torch.long, device=pictures.device)
        for _ in range(MAX_CHARACTERS + 1):
            room = F.pad(tokens, (0, 1))
            tokens = torch.cat([tokens, self.logits(pictures, room)[:, -1:].argmax(-1)], dim=1)
        return tokens


def train(model, tokenizer, steps: int, batch: int, learning_rate: float, workers: int, seed: int) -> list[list[float]]:
    """Train ``model`` in place; gives [step, mean loss since the last entry] every hundredth of the run."""
    device = next(model.parameters()).device
    reader, speller = Reader(model.train()), Speller(model).to(device)
    parameters = [*model.parameters(), *speller.parameters()]
    decay = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    pictures = Pictures(tokenizer, batch, seed)
    loader = DataLoader(pictures, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    curve, losses = [], []
    for step, (pictures, tokens) in zip(range(1, steps + 1), loader, strict=False):
        pictures, tokens = pictures.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = reader.logits(pictures, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        (loss + speller.loss(pictures, tokens)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, steps // 100) == 0 or step == steps:
            curve.append([step, round(torch.stack(losses).mean().item(), 4)])
            losses = []
            print(f"step {step}: loss {curve[-1][1]}", flush=True)
    return curve


def held_out_error(model, tokenizer, batches: int, batch: int, seed: int) -> dict[str, float]:
    """Share of texts that greedy reading gets wrong, on fresh pictures."""
    device, reader = next(model.parameters()).device, Reader(model.eval())
    references, hypotheses = [], []
    for (pictures, tokens), _ in zip(Pictures(tokenizer, batch, seed), range(batches), strict=False):
        for truth, read in zip(tokens, reader.read(pictures.to(device)).cpu(), strict=True):
            end = [*read.tolist(), tokenizer.eos_token_id].index(tokenizer.eos_token_id)
            references.append(tokenizer.decode([token for token in truth.tolist() if token >= 0], skip_special_tokens=True))
            hypotheses.append(tokenizer.decode(read[:end]))
    wrong = sum(a != b for a, b in zip(references, hypotheses, strict=True)) / len(references)
    return {"pictures": len(references), "wrong": round(wrong, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pictures; 0: the training process")
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--processor-only", action="store_true", help="write tokenizer and processor, train nothing")
    settings = parser.parse_args()

    tokenizer = build_tokenizer()
    if settings.processor_only:
        build_processor(tokenizer).save_pretrained(settings.out)
        return
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {device}")
    start = time.monotonic()
    curve = train(model, tokenizer, settings.steps, settings.batch, settings.learning_rate, settings.workers, settings.seed)
    seconds = time.monotonic() - start
    model = model.to(torch.bfloat16)
    error = held_out_error(model, tokenizer, batches=8, batch=128, seed=settings.seed + 1)
    print(f"{seconds:.0f} s, loss {curve[0][1]} -> {curve[-1][1]}, held out {error}")

    any_size(model)
    model.save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    record = {name: value for name, value in vars(settings).items() if name not in ("out", "processor_only")}
    record |= {"python": platform.python_version(), "torch": torch.__version__, "seconds": round(seconds)}
    record |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    with atomic_file(settings.out / "training.json") as path:
        path.write_text(json.dumps(record | {"held_out": error, "loss": curve}))


if __name__ == "__main__":
    main()
