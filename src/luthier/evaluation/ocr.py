"""How well a vision model reads: word and character error rates of greedy answers, with every failure counted.

    WER = (substituted + deleted + inserted words) / words of the references        CER: the same for characters

Both are taken over the whole set (long texts weigh more than short ones) and can exceed 1. A row whose picture cannot be
read, or whose answer is empty, counts as an empty answer, so that failing never improves a score.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from luthier import terminal
from luthier.data.conversation import Message, row_messages
from luthier.data.formats import find_format
from luthier.data.images import Resize, check_resize, load_image, resize_image
from luthier.data.render import render
from luthier.data.rows import Row
from luthier.data.vision import column_images, default_side, place_images, with_bos

NO_IMAGE, UNREADABLE, EMPTY, CUT = "no image", "unreadable image", "empty answer", "cut at max_new_tokens"
REFUSED = "image refused by the model's processor"


@dataclass(frozen=True)
class Normalisation:
    """What is done to reference and answer before they are compared. Spaces are always collapsed, Unicode made NFKC."""

    lowercase: bool = False
    strip_punctuation: bool = False

    def __call__(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.lowercase:
            text = text.lower()
        if self.strip_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        return " ".join(text.split())


@dataclass(frozen=True)
class OCRSample:
    """One row, as it was compared. ``failure``: what went wrong, or None."""

    reference: str
    answer: str
    wer: float
    cer: float
    failure: str | None


@dataclass(frozen=True)
class OCRReport:
    """The error rates of a set, and each row's. ``exact``: share of the rows without any error."""

    wer: float
    cer: float
    exact: float
    failures: dict[str, int]
    normalisation: Normalisation
    samples: tuple[OCRSample, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self, title: str = "Reading") -> None:
        """Print the rates and the failures to the terminal."""
        rows = [
            ("rows", f"{len(self.samples):,}"),
            ("word error rate", f"{self.wer:.1%}"),
            ("character error rate", f"{self.cer:.1%}"),
        ]
        rows += [("read without an error", f"{self.exact:.1%}")]
        rows += [(f"failed: {reason}", f"{count:,}") for reason, count in self.failures.items()]
        rows += [("compared", ", ".join(name for name, on in asdict(self.normalisation).items() if on) or "as written")]
        terminal.table(title, ("", ""), rows)


Answer = tuple[str, str | None]  # and why it is none, or None


@dataclass(frozen=True)
class Question:
    """A row without its last answer, its pictures not opened yet."""

    messages: list[Message]
    sources: list[Any]
    reference: str


def ocr(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    resize: Resize = "min",
    lowercase: bool = False,
    strip_punctuation: bool = False,
    image_root: str | Path | None = None,
) -> OCRReport:
    """Ask ``model`` each row's question greedily and compare with the row's last answer.

    ``rows`` and ``image_root`` are as for ``VisionDataCollator``; ``resize`` should be what the model was trained with. The
    model's mode (train or eval) is left as it was. Raises ``ValueError`` for a row without a reference text, naming it.
    """
    check_resize(resize)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("the number of rows", len(rows))):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    normalise = Normalisation(lowercase, strip_punctuation)
    see = partial(_see, root=image_root and Path(image_root), resize=resize, side=default_side(model.config))
    references = [_question(row, number).reference for number, row in enumerate(rows, 1)]
    _require_words([normalise(reference) for reference in references])
    answers: list[Answer] = []
    with terminal.progress("Reading", total=len(rows)) as bar, _inference(model):
        for start in range(0, len(rows), batch_size):
            # a batch at a time: the pictures of a whole set may be more than memory holds
            batch = [_question(rows[index], index + 1) for index in range(start, min(start + batch_size, len(rows)))]
            answers += _read(model, processor, batch, see, max_new_tokens)
            bar.advance(len(batch))
    return compare(references, answers, normalise)


def compare(references: Sequence[str], answers: Sequence[Answer], normalise: Normalisation) -> OCRReport:
    """The report on ``answers``, each with its failure or None, to ``references``."""
    truths = [normalise(reference) for reference in references]
    _require_words(truths)
    texts = [normalise(answer) for answer, _ in answers]
    samples = tuple(
        OCRSample(truth, text, jiwer.wer(truth, text), jiwer.cer(truth, text), failure or (None if text else EMPTY))
        for truth, text, (_, failure) in zip(truths, texts, answers, strict=True)
    )
    return OCRReport(
        wer=jiwer.wer(truths, texts),
        cer=jiwer.cer(truths, texts),
        exact=sum(truth == text for truth, text in zip(truths, texts, strict=True)) / len(truths),
        failures=dict(Counter(sample.failure for sample in samples if sample.failure)),
        normalisation=normalise,
        samples=samples,
    )


def _require_words(truths: Sequence[str]) -> None:
    empty = [number for number, truth in enumerate(truths, 1) if not truth]
    if empty:
        raise ValueError(f"Rows {empty[:5]} have a reference without a single word: nothing can be compared with them")


def _see(source: Any, root: Path | None, resize: Resize, side: int | None) -> Image.Image:
    return resize_image(load_image(source, root), resize, side)


def _question(row: Row, number: int) -> Question:
    source = find_format(list(row))
    if source is None:
        raise ValueError(f"row {number}: it needs messages, or prompt and completion; it has {sorted(row)}")
    try:
        messages, sources = place_images(row_messages(row, source, exact=False), column_images(row))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"row {number}: its last message must be the assistant's, which is what the answer is compared with")
    content = messages[-1]["content"]
    reference = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return Question(messages[:-1], sources, reference)


def _read(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    see: Callable[[Any], Image.Image],
    max_new_tokens: int,
) -> list[Answer]:
    """The answers to a batch of questions, those that cannot be asked included."""
    answers: list[Answer] = [("", NO_IMAGE)] * len(questions)
    asked: dict[int, tuple[list[Message], list[Image.Image]]] = {}
    for index, question in enumerate(questions):
        try:
            if question.sources:
                asked[index] = question.messages, [see(source) for source in question.sources]
        except (OSError, TypeError, ValueError) as error:
            answers[index] = "", f"{UNREADABLE} ({type(error).__name__})"
    if asked:
        for index, answer in zip(asked, _answer(model, processor, list(asked.values()), max_new_tokens), strict=True):
            answers[index] = answer
    return answers


def _answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[tuple[list[Message], list[Image.Image]]],
    max_new_tokens: int,
) -> list[Answer]:
    try:
        inputs = _inputs(processor, asked).to(model.device, model.dtype)
    except ValueError:  # one of the pictures is none for this model, such as a line of 300 by 1 pixels for Qwen's
        if len(asked) > 1:
            return [answer for one in asked for answer in _answer(model, processor, [one], max_new_tokens)]
        return [("", REFUSED)]
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    stops = {*stops} if isinstance(stops, list) else {stops}
    return [
        (processor.tokenizer.decode(ids, skip_special_tokens=True), None if stops & {*ids} else CUT if ids else EMPTY)
        for ids in new
    ]


def _inputs(processor: ProcessorMixin, asked: Sequence[tuple[list[Message], list[Image.Image]]]) -> BatchFeature:
    """Messages and their pictures as a batch, padded on the left."""
    texts = [with_bos(render(processor, messages, add_generation_prompt=True), processor) for messages, _ in asked]
    bos = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[images for _, images in asked],
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
