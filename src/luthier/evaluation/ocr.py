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
from transformers import PreTrainedModel, ProcessorMixin

from luthier import terminal
from luthier.data.conversation import Message, row_messages
from luthier.data.formats import find_format
from luthier.data.images import Resize, check_resize, load_image, resize_image
from luthier.data.render import render
from luthier.data.rows import Row
from luthier.data.vision import column_images, default_side, place_images

NO_IMAGE, UNREADABLE, EMPTY, CUT = "no image", "unreadable image", "empty answer", "cut at max_new_tokens"


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


@dataclass(frozen=True)
class Question:
    """A row without its last answer. ``failure``: why it cannot be asked."""

    messages: list[Message]
    images: list[Image.Image]
    reference: str
    failure: str | None


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
    questions = [_question(row, number, see) for number, row in enumerate(rows, 1)]
    answers: list[tuple[str, str | None]] = [("", question.failure) for question in questions]
    asked = [index for index, question in enumerate(questions) if question.failure is None]
    with terminal.progress("Reading", total=len(asked)) as bar, _inference(model):
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for index, answer in zip(
                batch, _answer(model, processor, [questions[i] for i in batch], max_new_tokens), strict=True
            ):
                answers[index] = answer
            bar.advance(len(batch))
    return compare([question.reference for question in questions], answers, normalise)


def compare(references: Sequence[str], answers: Sequence[tuple[str, str | None]], normalise: Normalisation) -> OCRReport:
    """The report on ``answers``, each with its failure or None, to ``references``."""
    truths = [normalise(reference) for reference in references]
    empty = [number for number, truth in enumerate(truths, 1) if not truth]
    if empty:
        raise ValueError(f"Rows {empty[:5]} have a reference without a single word: nothing can be compared with them")
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


def _see(source: Any, root: Path | None, resize: Resize, side: int | None) -> Image.Image:
    return resize_image(load_image(source, root), resize, side)


def _question(row: Row, number: int, see: Callable[[Any], Image.Image]) -> Question:
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
    if not sources:
        return Question(messages[:-1], [], reference, NO_IMAGE)
    try:
        images = [see(source) for source in sources]
    except (OSError, ValueError) as error:
        return Question(messages[:-1], [], reference, f"{UNREADABLE} ({type(error).__name__})")
    return Question(messages[:-1], images, reference, None)


def _answer(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], max_new_tokens: int
) -> list[tuple[str, str | None]]:
    texts = [render(processor, question.messages, add_generation_prompt=True) for question in questions]
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=texts,
        images=[question.images for question in questions],
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    ).to(model.device, model.dtype)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    stops = {*stops} if isinstance(stops, list) else {stops}
    return [
        (processor.tokenizer.decode(ids, skip_special_tokens=True), None if stops & {*ids} else CUT if ids else EMPTY)
        for ids in new
    ]


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
