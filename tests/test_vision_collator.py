"""Batches of rows with pictures: what trains, what is never cut, and what bad rows get."""

from __future__ import annotations

import base64
import functools
import io
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Json, List
from datasets import Image as ImageFeature
from PIL import Image
from tiny_vision import FAMILIES, picture, picture_row, tiny_processor, tiny_vision_config, tiny_vision_model
from torch.utils.data import DataLoader

from luthier.data.images import load_image, resize_image
from luthier.data.vision import ROOT_COLUMN, VisionDataCollator, place_images
from luthier.errors import UnsupportedError

IGNORE = -100


class Configured:
    """As much of a model as a collator looks at."""

    def __init__(self, family: str) -> None:
        self.config = tiny_vision_config(family)


@functools.cache
def processor_of(family: str):
    return tiny_processor(family)


def collator(family: str = "qwen2_5_vl", **arguments) -> VisionDataCollator:
    return VisionDataCollator(Configured(family), processor_of(family), **arguments)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def trained_text(batch: dict, row: int, family: str = "qwen2_5_vl") -> str:
    labels = batch["labels"][row]
    return processor_of(family).tokenizer.decode(labels[labels != IGNORE])


def text_row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_is_the_processors_own_and_only_text_trains(family):
    rows = [picture_row(0, "a cat"), picture_row(1, "something much longer than that", size=(48, 32))]
    processor = processor_of(family)
    batch = collator(family, resize=None)(rows)
    texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    images = [[row["messages"][0]["content"][0]["image"]] for row in rows]
    stock = processor(
        text=texts, images=images, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    assert set(batch) == {*stock, "labels"}
    for name in stock:
        assert torch.equal(batch[name], stock[name]), name
    labels = batch["labels"]
    assert torch.equal(labels[labels != IGNORE], batch["input_ids"][labels != IGNORE])
    assert not (labels[batch["attention_mask"] == 0] != IGNORE).any()
    vision = [token for token in FAMILIES[family][0] if token != "<|python_tag|>"]
    special = set(processor.tokenizer.convert_tokens_to_ids(vision))
    assert not special & set(labels.unique().tolist())
    # everything but padding and the picture's own text trains
    for row, answer in enumerate(("a cat", "something much longer than that")):
        assert trained_text(batch, row, family).endswith(f"What is it?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_trains_alone_with_its_stop_token(family):
    row = picture_row(3, "two dogs")
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    batch = collator(family)([pair, {"prompt": "What is it?", "completion": "a bird", "image": picture(4)}])
    assert [trained_text(batch, index, family) for index in (0, 1)] == ["two dogs<|im_end|>", "a bird<|im_end|>"]
    everything = collator(family, completion_only_loss=False)([pair])
    assert trained_text(everything, 0, family).startswith(("<|im_start|>user", "<|bos|><|im_start|>user"))


def test_only_the_last_answer_of_a_prompt_with_history_is_completion():
    history = [*picture_row(0, "a cat")["messages"], {"role": "user", "content": "Sure?"}]
    batch = collator()([{"prompt": history, "completion": [{"role": "assistant", "content": "yes"}]}])
    assert trained_text(batch, 0) == "yes<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_found_exactly_even_where_a_user_quotes_the_markers(family):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "assistant\nsays what?"}],
        },
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": picture(1)}]},
        {"role": "assistant", "content": "user\na dog"},
    ]
    batch = collator(family, train_on_responses_only=True)([{"messages": messages}])
    assert trained_text(batch, 0, family) == "a cat<|im_end|>user\na dog<|im_end|>"


def test_given_parts_find_the_same_answers():
    row = picture_row(0, "a cat")
    derived = collator(train_on_responses_only=True)([row])
    given = collator(instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")([row])
    assert torch.equal(derived["labels"], given["labels"])
    with pytest.raises(ValueError, match="both instruction_part and response_part"):
        collator(response_part="<|im_start|>assistant\n")


def test_the_loss_is_that_of_the_stock_batch_with_pictures_masked():
    model, rows = tiny_vision_model("qwen2_5_vl"), [picture_row(0), picture_row(1, "a much longer answer")]
    batch = VisionDataCollator(model, processor_of("qwen2_5_vl"))(rows)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(model(**batch).loss, expected)


# Pictures


@pytest.mark.parametrize(
    "kind", ["pil", "path", "string", "bytes", "base64", "data-uri", "arrow", "image_url", "column", "array"]
)
def test_every_form_of_a_picture_gives_the_same_batch(kind, tmp_path):
    image = picture(7)
    (tmp_path / "a.png").write_bytes(png(image))
    text = base64.b64encode(png(image)).decode()
    forms = {
        "pil": image,
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "bytes": png(image),
        "base64": text,
        "data-uri": f"data:image/png;base64,{text}",
        "arrow": {"bytes": png(image), "path": None},
        "image_url": f"data:image/png;base64,{text}",
        "column": image,
        "array": np.asarray(image),
    }
    part = {"type": "image", "image": forms[kind]}
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a cat"}]}
    if kind == "image_url":
        row["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": forms[kind]}}]
    if kind == "column":
        row["messages"][0]["content"] = [{"type": "image"}]
        row["images"] = [image]
    reference = {"messages": [{"role": "user", "content": [{"type": "image", "image": image}]}, row["messages"][1]]}
    expected, got = collator()([reference]), collator()([row])
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_pictures_of_a_column_take_their_places():
    user = {"role": "user", "content": "left <image> and right <image>?"}
    answer = {"role": "assistant", "content": "same"}
    messages, images = place_images([user, answer], ["L", "R"])
    assert [part.get("text", part["type"]) for part in messages[0]["content"]] == [
        "left ",
        "image",
        " and right ",
        "image",
        "?",
    ]
    assert images == ["L", "R"]
    messages, images = place_images([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, answer], ["L", "R"])
    assert messages[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}] and images == [
        "L",
        "R",
    ]
    own = [{"role": "user", "content": [{"type": "image", "image": "M"}]}, answer]
    assert place_images(own, ["L"])[1] == ["M"]  # mapped from the column, which was left in the row
    with pytest.raises(ValueError, match="2 images in its column but only 1 places"):
        place_images([{"role": "user", "content": "one <image>"}, answer], ["L", "R"])
    with pytest.raises(ValueError, match="neither the part nor the row's column"):
        place_images([{"role": "user", "content": [{"type": "image"}]}, answer], [])
    with pytest.raises(UnsupportedError, match="allowed are the types text, image"):
        place_images([{"role": "user", "content": [{"type": "video", "video": "x"}]}, answer], [])


def test_a_dataset_with_images_trains_as_it_is(tmp_path):
    rows = [
        {"images": [picture(i), picture(i + 5)], "messages": text_row("Compare.", f"answer {i}")["messages"]} for i in range(3)
    ]
    dataset = Dataset.from_list(rows, features=Features({"images": List(ImageFeature()), "messages": Json()}))
    batch = collator()(list(dataset))
    assert batch["image_grid_thw"].shape == (6, 3)


def test_rows_without_pictures_may_stand_beside_rows_with_them():
    batch = collator()([picture_row(0), text_row("hi", "hello")])
    assert batch["image_grid_thw"].shape[0] == 1
    assert trained_text(batch, 1).endswith("hello<|im_end|>\n")
    assert "pixel_values" not in collator()([text_row("hi", "hello")])
    with pytest.raises(UnsupportedError, match="cannot mix rows with and without images"):
        collator("mllama")([picture_row(0), text_row("hi", "hello")])


@pytest.mark.parametrize(
    "image, error, words",
    [
        ("https://example.com/cat.png", ValueError, "nothing is downloaded"),
        ("no/such/file.png", FileNotFoundError, "no/such/file.png"),
        (b"not a picture", ValueError, "not a picture"),
        ("data:image/png;base64,!!!!", ValueError, "base64"),
        (3.5, TypeError, "give a PIL image"),
    ],
)
def test_a_picture_that_cannot_be_read_says_why(image, error, words):
    row = {
        "messages": [{"role": "user", "content": [{"type": "image", "image": image}]}, {"role": "assistant", "content": "a"}]
    }
    with pytest.raises(error, match=words):
        collator()([row])


def test_base64_of_the_smallest_picture_is_no_path():
    data = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(data, "GIF")
    assert load_image(base64.b64encode(data.getvalue()).decode()).getpixel((0, 0)) == (255, 0, 0)


def test_a_truncated_picture_is_an_error_not_a_grey_one(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(picture(0, (64, 64)))[:2000])
    with pytest.raises(ValueError, match="cut.png"):
        load_image(tmp_path / "cut.png")


def test_relative_paths_start_from_the_root_that_was_given(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture(0)))
    row = {"messages": text_row("q", "a")["messages"], "image": "a.png"}
    assert "pixel_values" in collator(image_root=tmp_path)([row])
    with pytest.raises(FileNotFoundError, match="a.png"):
        collator()([row])


def test_a_row_may_say_where_its_paths_start(tmp_path):
    for seed, place in enumerate(("train", "held_out")):
        (tmp_path / place).mkdir()
        picture(seed).save(tmp_path / place / "1.png")
    row = {
        "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "?"}],
        "image": "1.png",
    }
    collate = collator(image_root=tmp_path / "train")
    own = collate([{**row, ROOT_COLUMN: None}, {**row, ROOT_COLUMN: str(tmp_path / "held_out")}])
    direct = collator()([{**row, "image": picture(0)}, {**row, "image": picture(1)}])
    assert torch.equal(own["pixel_values"], direct["pixel_values"])


def test_transparent_and_turned_pictures_are_seen_as_a_person_sees_them():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = picture(0, (16, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "JPEG", exif=exif)
    assert load_image(stream.getvalue()).size == (8, 16)


@pytest.mark.parametrize("form", ["image", "file", "array", "array of one channel"])
def test_sixteen_bits_of_grey_are_not_all_white(form):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    deep = grey.astype(np.uint16) * 257
    forms = {"image": Image.fromarray(deep), "file": png(Image.fromarray(deep)), "array": deep}
    found = load_image(forms.get(form, grey[..., None]))
    assert np.array_equal(np.asarray(found), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "image, words",
    [
        (Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "mode 'F'"),
        (np.full((4, 4, 3), 0.5, dtype=np.float32), "float32"),
        (np.zeros((3, 20, 30), dtype=np.uint8), r"\(3, 20, 30\)"),
        (np.zeros((4, 4, 3), dtype=np.uint16), "uint16"),
    ],
)
def test_numbers_that_are_no_picture_are_refused(image, words):
    with pytest.raises(ValueError, match=words):
        load_image(image)


def test_a_picture_of_too_many_pixels_and_one_with_broken_exif_are_errors_of_the_row(monkeypatch):
    wide = png(picture(0, (100, 100)))
    exif = picture(0).getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    picture(0).save(stream, "WEBP", exif=exif)
    broken = stream.getvalue().replace(b"MM\0*", b"MM\0#").replace(b"II*\0", b"II#\0")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for image in (wide, broken, 3.5):
        with pytest.raises(ValueError, match="row 1: "):
            collator().select([{"messages": text_row("q", "a")["messages"], "image": image}])


def test_resize():
    image = picture(0, (80, 40))
    assert resize_image(image, "min", 40).size == (40, 20)
    assert resize_image(image, "min", 200).size == (80, 40)  # never enlarged
    assert resize_image(image, "min", None).size == (80, 40)
    assert resize_image(image, "max", 40).size == (80, 40)
    assert resize_image(image, 20, None).size == (20, 10)
    assert resize_image(image, (30, 50), None).size == (30, 50)
    assert resize_image(image, None, 40).size == (80, 40)
    for wrong, error in [("mid", ValueError), (0, ValueError), ((1, 2, 3), ValueError), (True, TypeError), (2.5, TypeError)]:
        with pytest.raises(error, match="resize"):
            collator(resize=wrong)
    assert collator(resize=16)([picture_row(0, size=(64, 64))])["image_grid_thw"].tolist() == [[1, 2, 2]]


# Lengths


def many(family: str, count: int) -> dict:
    parts = [{"type": "image", "image": picture(i, (64, 64))} for i in range(count)]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "a b c"},
        ]
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_does_not_fit_is_left_out_and_counted(family):
    short, long = picture_row(0), many(family, 3)
    limit = collator(family)([short])["input_ids"].shape[1]
    long["messages"][1]["content"] = "word " * limit
    collate = collator(family, max_seq_length=limit)
    with pytest.warns(UserWarning, match="too long"):
        batch = collate([long, short, long])
    alone = collator(family)([short])
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert collate.dropped == {"too long": 2}
    with pytest.raises(ValueError, match="max_seq_length"):
        collator(family, max_seq_length=limit, too_long="raise")([long, short])
    with pytest.raises(ValueError, match="No row of this batch of 1 can train"):
        collate([long])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_rows_that_workers_leave_out_are_counted(start):
    rows = [picture_row(seed, "a cat" if seed % 2 else "a very " + "long " * 200 + "word") for seed in range(8)]
    collate = collator(max_seq_length=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context=start))
    assert [len(batch["input_ids"]) for batch in batches] == [1] * 4 and collate.dropped == {"too long": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_never_goes_through_a_picture(family):
    row = picture_row(0, "word " * 60)
    whole = collator(family, resize=None)([row])
    length = whole["input_ids"].shape[1]
    ids = processor_of(family).tokenizer.convert_tokens_to_ids(list(FAMILIES[family][0]))
    images_end = 1 + max(i for i, token in enumerate(whole["input_ids"][0].tolist()) if token in ids)
    cut = collator(family, resize=None, max_seq_length=length - 20, too_long="truncate")([row])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, : length - 20])
    tiny_vision_model(family)(**cut).loss.backward()
    collate = collator(family, resize=None, max_seq_length=images_end - 1, too_long="truncate")
    with pytest.raises(ValueError, match="too long"), pytest.warns(UserWarning, match="too long"):
        collate([row])


def test_select_measures_a_whole_dataset():
    rows = [picture_row(0), many("qwen2_5_vl", 4), picture_row(1, ""), picture_row(2, "a dog")]
    collate = collator(max_seq_length=60, train_on_responses_only=True)
    kept, ledger = collate.select(rows)
    assert [row["messages"][1]["content"][0]["text"] for row in kept] == ["a cat", "", "a dog"]  # a stop token trains
    assert (ledger.rows_in, ledger.trained, dict(ledger.dropped)) == (4, 3, {"too long": 1})
    assert ledger.longest_in > 60 >= ledger.longest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = collate(kept)
    assert ledger.trained_tokens == (batch["labels"] != IGNORE).sum()
    assert ledger.tokens == batch["attention_mask"].sum()
    with pytest.raises(ValueError, match="row 2: .*nothing is downloaded"):
        collate.select([rows[0], {**text_row("q", "a"), "image": "http://x/y.png"}])
    with pytest.raises(ValueError, match="None of the 1 rows can train"):
        collate.select([rows[1]])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_padding_to_a_multiple(family):
    batch = collator(family, pad_to_multiple_of=16)([picture_row(0), picture_row(1, "longer than that")])
    length = batch["input_ids"].shape[1]
    assert length % 16 == 0
    if family == "mllama":
        assert batch["cross_attention_mask"].shape[1] == length
    tiny_vision_model(family)(**batch).loss.backward()


# Arguments and rows


def test_formatting_func_and_ignore_index():
    collate = collator(formatting_func=lambda row: picture_row(0, row["word"])["messages"], ignore_index=-1)
    batch = collate([{"word": "fox"}])
    assert (batch["labels"] == -1).any() and not (batch["labels"] == IGNORE).any()
    with pytest.raises(TypeError, match="formatting_func returned str"):
        collator(formatting_func=lambda row: "text")([{"word": "fox"}])


@pytest.mark.parametrize(
    "row, words",
    [
        ({"picture": 1}, "known format"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no answer"),
        ({"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]}, "wizard"),
        ({"text": "already rendered"}, "messages, conversations, or prompt"),
    ],
)
def test_rows_that_cannot_be_used(row, words):
    with pytest.raises(ValueError, match=words):
        collator()([row])


@pytest.fixture
def no_bos(monkeypatch):
    """Llama 3.2 Vision with a template that writes no BOS, such as ChatML."""
    processor = processor_of("mllama")
    template = processor.chat_template.replace("{{ bos_token }}", "")
    for holder in (processor, processor.tokenizer):
        monkeypatch.setattr(holder, "chat_template", template)


def test_a_template_without_bos_gets_one_and_its_answers_are_found(no_bos):
    row = picture_row(0, "a cat, not a dog")
    for settings in ({"train_on_responses_only": True}, {}):
        batch = collator("mllama", **settings)([row])
        assert batch["input_ids"][0].tolist().count(1) == 1 and batch["input_ids"][0, 0] == 1
        text = trained_text(batch, 0, "mllama")
        assert text == "a cat, not a dog<|im_end|>" if settings else text.startswith("<|bos|><|im_start|>user")


def test_a_processor_that_hides_where_its_tokens_stand_is_refused_but_for_given_parts(monkeypatch):
    kind = type(processor_of("gemma3"))
    call = kind.__call__
    hiding = lambda self, *args, return_text_replacement_offsets, **more: call(self, *args, **more)  # noqa: E731
    monkeypatch.setattr(kind, "__call__", hiding)  # as Gemma 3n's does
    with pytest.raises(UnsupportedError, match="Gemma3Processor does not say where.*response_part"):
        collator("gemma3", train_on_responses_only=True)([picture_row(0)])
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert trained_text(collator("gemma3", **parts)([picture_row(0)]), 0, "gemma3") == "a cat<|im_end|>"


def test_sharegpt_rows_are_read_too():
    row = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}], "image": picture(0)}
    assert trained_text(collator(train_on_responses_only=True)([row]), 0) == "a<|im_end|>"


def test_a_tokenizer_is_not_a_processor():
    with pytest.raises(TypeError, match="FastVisionModel"):
        VisionDataCollator(Configured("gemma3"), processor_of("gemma3").tokenizer)
    for wrong in ({"too_long": "cut"}, {"max_seq_length": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            collator(**wrong)
