"""Rows with pictures become batches: rendered, tokenised, masked, and never with a picture cut in two.

The processor expands each picture's place in the text into the picture's tokens and says where it did so; labels are
decided on the characters of the text as it was rendered, and carried over to the tokens through those places.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, MllamaProcessor, PreTrainedModel, ProcessorMixin

from luthier.data.conversation import Message, row_messages, row_tools
from luthier.data.formats import find_format
from luthier.data.images import Resize, check_resize, load_image, resize_image
from luthier.data.ledger import NO_TRAINED_TOKEN, TOO_LONG, Ledger
from luthier.data.masks import IGNORED, ResponseMask
from luthier.data.render import covered, render, render_spans
from luthier.data.rows import BadRow, Row, column_names
from luthier.errors import UnsupportedError, unknown
from luthier.terminal import progress

IMAGE_COLUMNS = ("images", "image")
ROOT_COLUMN = "luthier_image_root"  # where the relative paths of a row start, if not where the collator's do
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
PLACEHOLDER = "<image>"  # where a picture of the column stands in a message that is plain text
REASONS = (TOO_LONG, NO_TRAINED_TOKEN)  # why a row is left out of its batch
COUNTERS = 1021  # every process counts in a place of its own: adding to one place is not atomic
TOO_LONG_POLICIES = ("drop", "truncate", "raise")
PADDED = {"attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
VISION_TOKENS = (  # names under which configs and tokenizers keep the ids of tokens that stand for or around a picture
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
)

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Example:
    """A row, rendered. ``spans``: the [start, end) characters of ``text`` that train; None: all of them."""

    text: str
    images: list[Image.Image]
    spans: Spans | None


@dataclass(frozen=True)
class Tokens:
    """The token ids of an example, which of them may train, and the position behind its last picture."""

    ids: list[int]
    trained: list[bool]
    images_end: int

    def labels(self, ignored: int) -> list[int]:
        return [token if trains else ignored for token, trains in zip(self.ids, self.trained, strict=True)]

    def cut(self, length: int) -> Tokens:
        return replace(self, ids=self.ids[:length], trained=self.trained[:length])


class VisionDataCollator:
    """Rows of a vision data set -> ``input_ids``, ``attention_mask``, ``labels`` (all int64 (B, T)) and pixel tensors.

    A row holds ``messages``, ``conversations`` or ``prompt`` and ``completion``. Its pictures are parts of a message,
    ``{"type": "image", "image": X}`` or ``{"type": "image_url", ...}``, or in a column ``images`` or ``image``, whose places
    are the parts ``{"type": "image"}``, or ``<image>`` in the text, or else before the first question. X is a PIL image, a
    path (from ``image_root``, else from the working directory; a row's column ``luthier_image_root`` goes before both), bytes,
    or base64; nothing is downloaded.

    What trains: of prompt and completion the completion (``completion_only_loss``); of messages every token, or with
    ``train_on_responses_only`` the assistant's answers, found by the processor's own template or by ``instruction_part``
    and ``response_part``. Padding, pictures and the tokens around them never train.

    A row longer than ``max_seq_length`` (None: the model's) is left out of its batch and counted in ``dropped``
    (``too_long="drop"``), cut behind its last picture (``"truncate"``; a row whose pictures do not fit is dropped), or an
    error (``"raise"``). ``select(dataset)`` does this for a whole data set before training, with a ledger.

    Raises ``ValueError``, ``TypeError`` or ``FileNotFoundError`` for arguments and rows that cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Row], Row | list[Message]] | None = None,
        resize: Resize = "min",
        ignore_index: int = IGNORED,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        too_long: str = "drop",
        image_root: str | Path | None = None,
    ) -> None:
        if getattr(processor, "image_processor", None) is None:
            raise TypeError(f"processor must be what FastVisionModel.from_pretrained gave, not {type(processor).__name__}")
        if too_long not in TOO_LONG_POLICIES:
            raise unknown("too_long", too_long, TOO_LONG_POLICIES)
        if max_seq_length is not None and max_seq_length < 2:
            raise ValueError(f"max_seq_length is {max_seq_length}: it must be at least 2 tokens, or None for the model's")
        check_resize(resize)
        loaded = getattr(model, "luthier", None)
        self.max_seq_length = max_seq_length or (loaded.max_seq_length if loaded else None)
        self.processor, self.formatting_func, self.resize = processor, formatting_func, resize
        self.ignore_index, self.pad_to_multiple_of, self.too_long = ignore_index, pad_to_multiple_of, too_long
        self.responses_only = train_on_responses_only or response_part is not None or instruction_part is not None
        self.completion_only_loss = completion_only_loss
        self.mask = ResponseMask(processor, instruction_part, response_part) if instruction_part or response_part else None
        self.side = default_side(model.config)
        self.one_kind = model.config.model_type == "mllama"  # cross-attention: all rows of a batch have pictures, or none
        self.vision_tokens = _vision_tokens(model.config, processor)
        self.image_root = Path(image_root) if image_root is not None else None
        self._counts = torch.zeros(COUNTERS, len(REASONS), dtype=torch.long).share_memory_()

    @property
    def dropped(self) -> Counter[str]:
        """Rows that were left out of the batches made so far, by reason; those of a data loader's workers too."""
        counts = dict(zip(REASONS, self._counts.sum(0).tolist(), strict=True))
        return Counter({reason: count for reason, count in counts.items() if count})

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of ``rows``, less those that are too long or train no token.

        Raises ``ValueError`` if none is left: a trainer cannot skip a batch, so call ``select(dataset)`` first.
        """
        examples = [self.example(row) for row in rows]
        features, tokens = self._process(examples)
        reasons = [self._reason(row) for row in tokens]
        if any(reasons):
            self._count(reasons)
            examples = [example for example, reason in zip(examples, reasons, strict=True) if reason is None]
            if not examples:
                raise ValueError(
                    f"No row of this batch of {len(rows)} can train ({', '.join(map(str, reasons))}; max_seq_length is "
                    f"{self.max_seq_length}). Train on collator.select(dataset)[0], which leaves such rows out, raise "
                    "max_seq_length, or make the images smaller with resize."
                )
            features, tokens = self._process(examples)
        return self._tensors(features, [self._cut(row) for row in tokens])

    def select(self, dataset: Sequence[Row]) -> tuple[Any, Ledger]:
        """The rows that train, and the ledger of all rows. Every picture is opened once.

        ``dataset`` is a ``datasets.Dataset`` or a list; the same comes back. Raises ``ValueError`` naming the row that
        cannot be used, or if no row trains.
        """
        kept, lengths, trained, longest_in, truncated, dropped = [], [], [], 0, 0, Counter()
        with progress("Measuring rows", total=len(dataset)) as bar:
            for index, row in enumerate(dataset):
                try:
                    whole = self._process([self.example(row)])[1][0]
                except (ValueError, TypeError, OSError) as error:
                    raise BadRow(index + 1, str(error)) from error
                longest_in = max(longest_in, len(whole.ids))
                if reason := self._reason(whole):
                    dropped[reason] += 1
                else:
                    tokens = self._cut(whole)
                    kept.append(index)
                    lengths.append(len(tokens.ids))
                    trained.append(sum(tokens.trained))
                    truncated += len(tokens.ids) < len(whole.ids)
                bar.advance()
        if not kept:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there are none"
            raise ValueError(
                f"None of the {len(dataset)} rows can train: {why}. The longest has {longest_in} tokens, max_seq_length is "
                f"{self.max_seq_length}: raise it, or make the images smaller with resize."
            )
        ledger = Ledger.count(lengths, trained, dropped, longest_in, truncated)
        return ([dataset[index] for index in kept] if isinstance(dataset, list) else dataset.select(kept)), ledger

    def example(self, row: Row) -> Example:
        """A row as text with the places of its pictures, the pictures, and what trains."""
        root = self.image_root if row.get(ROOT_COLUMN) is None else Path(row[ROOT_COLUMN])
        if self.formatting_func is not None:
            row = _formatted(self.formatting_func(row))
        source = find_format(list(row))
        if source is None:
            raise ValueError(f"A vision row needs messages, conversations, or prompt and completion; it has {sorted(row)}")
        messages, images = place_images(row_messages(row, source, exact=False), column_images(row))
        images = [resize_image(load_image(image, root), self.resize, self.side) for image in images]
        tools = row_tools(row)
        completion = _completion_length(row, source) if self.completion_only_loss else 0
        if not (self.responses_only or completion) or self.mask is not None:
            return Example(with_bos(render(self.processor, messages, tools=tools), self.processor), images, None)
        text, spans = render_spans(self.processor, messages, tools)
        if completion and not self.responses_only:
            prompt = render(self.processor, messages[:-completion], tools=tools, add_generation_prompt=True)
            spans = [(start, end) for start, end in spans if end > len(prompt)]
        whole = with_bos(text, self.processor)
        behind = len(whole) - len(text)
        return Example(whole, images, [(start + behind, end + behind) for start, end in spans])

    def _process(self, examples: list[Example]) -> tuple[BatchFeature, list[Tokens]]:
        """What the processor makes of the examples, unpadded, and their tokens."""
        images = [example.images for example in examples]
        if self.one_kind and any(images) and not all(images):
            raise UnsupportedError(
                "Llama 3.2 Vision cannot mix rows with and without images in a batch: train on one kind, or with batch size 1"
            )
        texts = [example.text for example in examples]
        bos = self.processor.tokenizer.bos_token
        features = self.processor(
            text=list(texts),
            images=images if any(images) else None,
            padding=False,
            add_special_tokens=not (bos and all(text.startswith(bos) for text in texts)),
            return_tensors=None,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        all_offsets = features.pop("offset_mapping")
        all_places = features.pop("text_replacement_offsets", None) or [[] for _ in examples]
        tokens = [
            self._tokens(list(ids), example, offsets, places)
            for ids, example, offsets, places in zip(features["input_ids"], examples, all_offsets, all_places, strict=True)
        ]
        return features, tokens

    def _tokens(self, ids: list[int], example: Example, offsets: Spans, places: list[dict]) -> Tokens:
        inside = covered(offsets, [place["new_span"] for place in places])
        vision = [covers or token in self.vision_tokens for covers, token in zip(inside, ids, strict=True)]
        if self.mask is not None:
            trained = [label != IGNORED for label in self.mask(ids)]
        elif example.spans is None:
            trained = [True] * len(ids)
        else:
            self._require_places(example, offsets, places)
            trained = covered(offsets, [_moved(span, places) for span in example.spans])
        images_end = max((index + 1 for index, is_vision in enumerate(vision) if is_vision), default=0)
        return Tokens(ids, [a and not b for a, b in zip(trained, vision, strict=True)], images_end)

    def _require_places(self, example: Example, offsets: Spans, places: list[dict]) -> None:
        """Raise if the processor made the text longer and does not say where: the spans that train would be others."""
        end = _moved((len(example.text), len(example.text)), places)[1]
        if any(stop > end for _, stop in offsets):
            raise UnsupportedError(
                f"{type(self.processor).__name__} does not say where it puts the tokens of images, so the answers cannot be "
                "found in its text: give instruction_part and response_part, which are looked for in the tokens"
            )

    def _reason(self, tokens: Tokens) -> str | None:
        """Why a row does not train, or None. Raises if it is too long and that is to be an error."""
        limit = self.max_seq_length
        if limit and len(tokens.ids) > limit:
            if self.too_long == "raise":
                raise ValueError(
                    f"A row has {len(tokens.ids)} tokens ({tokens.images_end} up to the end of its last image) and "
                    f"max_seq_length is {limit}: raise it, make the images smaller with resize, or use too_long='drop'"
                )
            if self.too_long == "drop" or tokens.images_end > limit:
                return TOO_LONG
        # The first token is never predicted, so a row in which only it may train trains nothing.
        return None if any(self._cut(tokens).trained[1:]) else NO_TRAINED_TOKEN

    def _cut(self, tokens: Tokens) -> Tokens:
        return tokens.cut(self.max_seq_length) if self.max_seq_length else tokens

    def _count(self, reasons: list[str | None]) -> None:
        new = Counter(reason for reason in reasons if reason)
        if not self.dropped:
            warnings.warn(
                f"Rows are left out of their batches: {', '.join(new)} (max_seq_length {self.max_seq_length}). "
                "collator.dropped counts them; collator.select(dataset) leaves them out beforehand, with a ledger.",
                stacklevel=3,
            )
        for reason, count in new.items():
            self._counts[os.getpid() % COUNTERS, REASONS.index(reason)] += count

    def _tensors(self, features: BatchFeature, tokens: list[Tokens]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        length, multiple = max(len(row.ids) for row in tokens), self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        labels = [
            [token if trains else self.ignore_index for token, trains in zip(row.ids, row.trained, strict=True)]
            for row in tokens
        ]
        batch = {"input_ids": _padded([row.ids for row in tokens], length, pad)}
        batch["labels"] = _padded(labels, length, self.ignore_index)
        batch |= {name: _padded(features[name], length, value) for name, value in PADDED.items() if name in features}
        rest = {name: value for name, value in features.items() if name not in batch}
        if "cross_attention_mask" in rest:  # Mllama: (B, T, images, tiles)
            mask = torch.as_tensor(rest.pop("cross_attention_mask"))[:, :length]
            batch["cross_attention_mask"] = torch.cat(
                [mask, mask.new_zeros(len(mask), length - mask.shape[1], *mask.shape[2:])], 1
            )
        return batch | dict(BatchFeature(rest, tensor_type="pt"))


def without_images(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """``dataset``, to be read as text; ``ValueError`` if it has a column of images, which would be left out without a word."""
    found = set(IMAGE_COLUMNS).intersection(column_names(dataset))
    if found:
        raise ValueError(
            f"{name} has a column {min(found)!r}, and as text its rows would be read without their images: use `luthier "
            "vision`, or a VisionDataCollator with a model of FastVisionModel; or remove the column."
        )
    return dataset


def place_images(messages: Sequence[Message], column: Sequence[Any]) -> tuple[list[Message], list[Any]]:
    """Messages whose picture parts are ``{"type": "image"}``, and the pictures in the order of these parts.

    ``column``: the pictures of the row's own column, which fill the places that name no picture; of messages without a
    place and without a picture, the first question.
    """
    waiting, images, placed = list(column), [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, str) and waiting and PLACEHOLDER in content:
            content = _at_placeholders(content)
        if isinstance(content, list):
            content = [_part(part, waiting, images) for part in content]
        placed.append({**message, "content": content})
    if waiting and not (images and len(waiting) == len(column)):  # pictures of its own: the column is where they came from
        if len(waiting) < len(column):
            raise ValueError(
                f"The row has {len(column)} images in its column but only {len(column) - len(waiting)} places for them"
            )
        first = next((index for index, message in enumerate(placed) if message["role"] == "user"), None)
        if first is None:
            raise ValueError("The row has images but no message of the user to show them in")
        content = placed[first]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        placed[first]["content"] = [{"type": "image"} for _ in waiting] + parts
        images += waiting
    return placed, images


def _part(part: Any, waiting: list[Any], images: list[Any]) -> dict[str, Any]:
    """A part of a message without its picture, which is appended to ``images``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": part.get("text") or ""}
    if kind not in ("image", "image_url"):
        raise UnsupportedError(f"A message part is {str(part)[:80]!r}: allowed are the types text, image and image_url")
    given = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    image = given[0] if given else None
    if isinstance(image, Mapping) and "url" in image:
        image = image["url"]
    if image is None:
        if not waiting:
            raise ValueError("A message has a place for an image, but neither the part nor the row's column holds one")
        image = waiting.pop(0)
    images.append(image)
    return {"type": "image"}


def _at_placeholders(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def with_bos(text: str, processor: ProcessorMixin) -> str:
    """``text`` with the BOS that Llama 3.2 Vision's processor would put before it, where no one knows of it."""
    bos = processor.tokenizer.bos_token
    return bos + text if isinstance(processor, MllamaProcessor) and bos not in text else text


def column_images(row: Row) -> list[Any]:
    found = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), [])
    return list(found) if isinstance(found, list | tuple) else [found]


def _completion_length(row: Row, source: tuple[str, ...]) -> int:
    """Messages that are the completion of a row of prompt and completion; 0 for a row of messages."""
    if len(source) == 1:
        return 0
    answer = row[source[1]]
    return len(answer) if isinstance(answer, list) else 1


def _formatted(result: Any) -> Row:
    if isinstance(result, list):
        return {"messages": result}
    if isinstance(result, Mapping):
        return result
    raise TypeError(f"formatting_func returned {type(result).__name__}: it must give a row (dict) or a list of messages")


def _moved(span: tuple[int, int], places: list[dict]) -> tuple[int, int]:
    """A span of the rendered text, in the text whose picture places have been expanded."""
    shift = sum(
        (place["new_span"][1] - place["new_span"][0]) - (place["span"][1] - place["span"][0])
        for place in places
        if place["span"][1] <= span[0]
    )
    return span[0] + shift, span[1] + shift


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row[:length], *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def default_side(config: Any) -> int | None:
    """Pixels along the model's default picture; None for a model that takes pictures of any size."""
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    return max(side) if isinstance(side, list | tuple) else side


def _vision_tokens(config: Any, processor: ProcessorMixin) -> frozenset[int]:
    found = {getattr(holder, name, None) for holder in (config, processor, processor.tokenizer) for name in VISION_TOKENS}
    found |= {*processor.image_token_ids, *processor.video_token_ids}
    return frozenset(token for token in found if isinstance(token, int))
