"""Datasets: every format becomes messages, every bad input is named, and every row is accounted for."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Json
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import BOS, CHATML, END, EOS, START, tiny_tokenizer

from luthier.data.chat import get_chat_template
from luthier.data.formats import apply_chat_template, standardize_data_formats, standardize_sharegpt, to_sharegpt
from luthier.data.ledger import Ledger
from luthier.data.prepare import prepare_chat
from luthier.data.preview import preview, preview_rows
from luthier.data.read import read_dataset
from luthier.data.rows import processes_for

ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [ASK, SAY]


def chats(*conversations: list[dict]) -> Dataset:
    return Dataset.from_dict({"messages": list(conversations)}, features=Features({"messages": Json()}))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Reading


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", '{"q": "x", "n": 1}\n\n{"q": "5", "n": 2.5}\n{"n": null}\n', [("x", 1.0), ("5", 2.5), (None, None)]),
        ("a.json", '[{"q": "x", "n": 1}, {"q": "y"}]', [("x", 1), ("y", None)]),
        ("lines.json", '{"q": "x", "n": 1}\n{"q": "y", "n": 2}\n', [("x", 1), ("y", 2)]),
        ("a.json", '{"data": [{"q": "x", "n": 1}]}', [("x", 1)]),
        ("a.json", '{"q": "x", "n": 1}', [("x", 1)]),
        ("bom.json", b'\xef\xbb\xbf[{"q": "\xc3\xa9", "n": 1}]', [("é", 1)]),
        ("a.csv", 'q,n\n"x\ny",007\n,1\n', [("x\ny", "007"), ("", "1")]),
        ("a.tsv", "q\tn\nx\t1\n", [("x", "1")]),
    ],
)
def test_reads_files(tmp_path, name, content, rows):
    dataset = read_dataset(write(tmp_path / name, content))
    assert list(zip(dataset["q"], dataset["n"], strict=True)) == rows


def test_reads_nested_rows_exactly_as_written(tmp_path):
    """No keys of other rows, no type of other rows."""
    rows = [
        {"messages": [{"role": "user", "content": "5"}, {"role": "assistant", "tool_calls": [{"arguments": {"a": 1}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"a": "s", "b": None}}]}], "other": True},
        {"messages": []},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(read_dataset(path)) == [{"other": None, **row} for row in rows]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers(-64, 64).map(lambda sixteenths: sixteenths / 16)  # datasets keeps ten decimals, see read_dataset
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.fixed_dictionaries({"a": json_values}), min_size=1, max_size=3))
def test_reads_any_json_as_written_or_calls_it_mixed(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("any") / "a.jsonl", "\n".join(map(json.dumps, rows)))
    try:
        dataset = read_dataset(path)
    except ValueError as error:
        assert "mixed formats" in str(error)
        assert len({type(row["a"]) for row in rows if row["a"] is not None}) > 1 or isinstance(rows[0]["a"], list)
    else:
        assert list(dataset) == rows


def test_reads_parquet_and_what_save_to_disk_wrote(tmp_path):
    dataset = Dataset.from_list([{"messages": CHAT}])
    dataset.to_parquet(tmp_path / "a.parquet")
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "saved")
    assert list(read_dataset(tmp_path / "a.parquet")) == list(read_dataset(tmp_path / "saved", "test")) == list(dataset)
    with pytest.raises(FileNotFoundError, match="no split 'dev'. Allowed: train, test"):
        read_dataset(tmp_path / "saved", "dev")


def test_reads_the_files_of_a_split_in_a_directory(tmp_path):
    for name in ("train-0", "train-1", "test"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    assert read_dataset(tmp_path)["text"][:] == ["train-0", "train-1"]
    assert read_dataset(tmp_path, "test")["text"][:] == ["test"]
    with pytest.raises(FileNotFoundError, match="no file for the split 'validation', only for: train, test"):
        read_dataset(tmp_path, "validation")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", None, FileNotFoundError, "no file or directory"),
        ("empty.jsonl", "", ValueError, "is empty"),
        ("blank.json", " \n", ValueError, "is empty"),
        ("none.json", "[]", ValueError, "is empty"),
        ("header.csv", "a,b\n", ValueError, "no rows"),
        ("a.jsonl", '{"a": 1}\n{"a" 2}\n', ValueError, r"not JSON at line 2: .* column 6. The line starts: '{\"a\" 2}'"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ValueError, "not JSON at line 2"),
        ("a.json", '{"a": 1}\n{"a": 2\n', ValueError, "not JSON at line 2"),
        ("a.jsonl", '{"a": NaN}', ValueError, "not JSON at line 1: NaN is no JSON value"),
        ("a.json", "hello", ValueError, "not JSON at line 1.*'hello'"),
        ("a.json", "[1, 2]", ValueError, "not a table: row 1 must be a JSON object, but is 1"),
        ("a.json", "5", ValueError, "not a table"),
        ("a.jsonl", '{"a": 1}\n[1]', ValueError, "not a table: line 2"),
        ("a.jsonl", '{"a": "x"}\n{"a": 5}\n', ValueError, "mixed formats: the column 'a' is text at first and .* line 2"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', ValueError, "line 2 is not UTF-8"),
        ("a.jsonl", '{"a": 99999999999999999999}', ValueError, "more than 64 bits"),
        ("a.csv", "a,b\n1,2,3\n", ValueError, "Expected 2 columns, got 3"),
        ("a.parquet", "PAR1", ValueError, "not a Parquet file"),
        ("a.txt", "hello", ValueError, "unknown kind '.txt'. Allowed: .jsonl"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d\\ude00 \\ud83d"}', ValueError, "line 2: half of a character"),
        ("a.json", "[" * 100_000, ValueError, "nested too deeply"),
        ("a.jsonl", '{"a":' + "[" * 900 + "]" * 900 + "}", ValueError, "nested too deeply"),
        ("a.csv", "a,b,a\n1,2,3\n", ValueError, "two columns named 'a'"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(error, match=message) as raised:
        read_dataset(path)
    assert name in str(raised.value) or "64 bits" in message


@pytest.mark.parametrize("name", ["data/missing.jsonl", "./missing", "missing", "/no/such/dir", "a/b/c"])
def test_a_path_that_does_not_exist_is_never_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("luthier.data.read.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        read_dataset(name)


@pytest.mark.parametrize("failure", [FileNotFoundError("gated"), ConnectionError("offline")])
def test_a_hub_dataset_that_cannot_be_read_is_named(failure, monkeypatch):
    def load_dataset(name, configuration, split):
        assert (name, configuration, split) == ("owner/name", "main", "train")
        raise failure

    monkeypatch.setattr("luthier.data.read.load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=f"'owner/name:main'.*{failure}"):
        read_dataset("owner/name:main")


# Formats


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, CHAT),
        ({"conversations": [{"from": "Customer", "value": "2+2?"}, {"from": "chatgpt", "value": "4"}]}, CHAT),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "model", "value": "4"}], "system": "Be brief."},
            [SYSTEM, *CHAT],
        ),
        ({"conversations": CHAT}, CHAT),
        ({"messages": [SYSTEM, *CHAT], "system": "Be long."}, [SYSTEM, *CHAT]),
        ({"messages": [{**ASK, "name": "Ann"}, SAY]}, [{**ASK, "name": "Ann"}, SAY]),
        ({"instruction": "2+2?", "input": "", "output": "4"}, CHAT),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, [{"role": "user", "content": "Add.\n\n2, 2"}, SAY]),
        ({"instruction": "2+2?", "output": "4", "system": "Be brief."}, [SYSTEM, *CHAT]),
        ({"instruction": "2+2?", "response": "4"}, CHAT),
        ({"prompt": "2+2?", "completion": "4"}, CHAT),
        ({"prompt": [SYSTEM, ASK], "completion": [SAY]}, [SYSTEM, *CHAT]),
        ({"question": "2+2?", "answer": "4"}, CHAT),
        ({"question": "2+2?", "answer": 4}, CHAT),
    ],
)
def test_every_format_becomes_messages_and_other_columns_stay(row, messages):
    dataset = standardize_sharegpt(Dataset.from_list([{**row, "source": "here"}]))
    assert list(dataset) == [{"source": "here", "messages": messages}]
    stream = standardize_sharegpt(Dataset.from_list([row]).to_iterable_dataset())
    assert list(stream) == [{"messages": messages}]


def test_one_function_under_two_names_also_for_dictionaries_and_another_column():
    splits = standardize_data_formats(DatasetDict(train=chats(CHAT)), column="conversations")
    assert list(splits["train"]) == [{"conversations": CHAT}]
    assert standardize_data_formats is standardize_sharegpt


def test_text_and_ids_stay_as_they_are():
    for row in ({"text": "hello"}, {"input_ids": [1, 2]}):
        assert list(standardize_sharegpt(Dataset.from_list([row]))) == [row]


def test_tool_calls_keep_just_the_arguments_that_were_written():
    """A table gives all rows' calls the same keys; the ones that are None were never there."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    other = {"type": "function", "function": {"name": "neg", "arguments": {"b": 2}}}
    rows = [
        [ASK, {"role": "assistant", "content": None, "tool_calls": [c]}, {"role": "tool", "content": "4"}]
        for c in (call, other)
    ]
    dataset = Dataset.from_list([{"messages": messages} for messages in rows])
    assert dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": None}
    calls = [messages[1]["tool_calls"] for messages in standardize_sharegpt(dataset)["messages"]]
    assert calls == [[call], [other]]


def test_a_function_call_turn_of_sharegpt_becomes_a_tool_call():
    turns = [("human", "2+2?"), ("function_call", '{"name": "add", "arguments": {"a": 2}}'), ("observation", "4"), ("gpt", "4")]
    dataset = Dataset.from_list([{"conversations": [{"from": who, "value": what} for who, what in turns]}])
    _, call, result, answer = standardize_sharegpt(dataset)[0]["messages"]
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert (result["role"], answer) == ("tool", SAY)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "conversation is empty"),
        ({"messages": None}, "'messages' is missing"),
        ({"messages": {"role": "user"}}, "must be a list of messages"),
        ({"messages": [ASK]}, "no answer: none of its messages is the assistant's, only user"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, r"message 2 \(assistant\) has no content"),
        (
            {"messages": [ASK, {"role": "robot", "content": "4"}]},
            "message 2: Unknown role 'robot'.* Did you mean 'bot'.*assistant",
        ),
        ({"messages": [ASK, {"content": "4"}]}, "message 2 has no role"),
        ({"messages": [ASK, {"role": "assistant", "content": 4}]}, "content must be text"),
        ({"messages": [SYSTEM, SYSTEM, *CHAT]}, r"2 system messages \(messages 1, 2\)"),
        ({"messages": [*CHAT, SYSTEM]}, "system message is message 3: it must be the first"),
        ({"messages": [ASK, {"from": "gpt", "value": "4"}]}, "mixed formats"),
    ],
)
def test_a_bad_conversation_is_named_by_its_number(row, reason):
    with pytest.raises(ValueError, match=f"1 of 3 rows cannot be used:\nrow 3: .*{reason}"):
        standardize_sharegpt(chats(CHAT, CHAT, row["messages"]))


def test_bad_rows_are_reported_together():
    with pytest.raises(ValueError, match="7 of 8 rows") as raised:
        standardize_sharegpt(chats(CHAT, *[[ASK]] * 7))
    assert str(raised.value).count("no answer") == 5
    with pytest.raises(ValueError, match="row 2: it has no answer"):
        list(standardize_sharegpt(chats(CHAT, [ASK]).to_iterable_dataset()))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}],
            "row 2: it has no answer: 'output' is missing",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "row 2: 'prompt' is missing"),
        (
            [{"messages": CHAT}, {"instruction": "a", "output": "b"}],
            "row 2: mixed formats: it has no 'messages'.* 'instruction'",
        ),
        ([{"instruction": "a"}], "no answer: a column 'output' or 'response' is missing"),
        ([{"foo": "a", "bar": "b"}], r"no known format: its columns are \['foo', 'bar'\].* Known: messages"),
        ([{"prompt": "a", "completion": "b", "response": "c"}], "mixed formats.*prompt/completion and prompt/response"),
    ],
)
def test_a_table_that_does_not_fit_is_named(rows, reason, tmp_path):
    dataset = read_dataset(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    with pytest.raises(ValueError, match=reason):
        standardize_sharegpt(dataset)


def test_what_is_no_dataset_or_empty_is_named():
    with pytest.raises(TypeError, match="list, but must be a datasets.Dataset"):
        standardize_sharegpt([{"messages": CHAT}])
    with pytest.raises(ValueError, match="empty"):
        standardize_sharegpt(Dataset.from_list([]))
    with pytest.raises(TypeError, match="DatasetDict of the splits train, test: give one of them"):
        prepare_chat(DatasetDict(train=chats(CHAT), test=chats(CHAT)), tiny_tokenizer())
    with pytest.raises(TypeError, match="not a stream"):
        to_sharegpt(chats(CHAT).to_iterable_dataset())


# to_sharegpt


PASSENGERS = [{"name": "Ann", "age": "38", "port": "C", "output": 1}, {"name": "Bo", "age": None, "port": "", "output": 0}]


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_columns_merge_and_optional_parts_go_where_they_are_empty():
    merged = to_sharegpt(Dataset.from_list(PASSENGERS), "{{{name}}}.[[ Age {age}.]][[ Port {port}, age {age}.]]")
    assert list(merged) == [
        {"conversations": turns("{Ann}. Age 38. Port C, age 38.", "1")},
        {"conversations": turns("{Bo}.", "0")},
    ]


def test_instruction_and_input_merge_by_default():
    rows = [{"instruction": "Add.", "input": "2, 2", "answer": "4"}, {"instruction": "Hi.", "input": "", "answer": "Hi!"}]
    merged = to_sharegpt(Dataset.from_list(rows), output_column_name="answer")
    assert merged["conversations"][:] == [turns("Add.\n\n2, 2", "4"), turns("Hi.", "Hi!")]


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), extension=st.integers(1, 9), seed=st.integers(0, 3))
def test_extended_conversations_hold_different_rows_their_own_first(rows, extension, seed):
    dataset = Dataset.from_list([{"instruction": f"q{row}", "output": f"a{row}"} for row in range(rows)])
    if extension > rows:
        with pytest.raises(ValueError, match=f"from 1 to the {rows} rows"):
            to_sharegpt(dataset, conversation_extension=extension, random_state=seed)
        return
    conversations = to_sharegpt(dataset, conversation_extension=extension, random_state=seed)["conversations"][:]
    for row, conversation in enumerate(conversations):
        asked = [turn["value"] for turn in conversation[::2]]
        assert len(conversation) == 2 * extension and asked[0] == f"q{row}" and len(set(asked)) == extension
        assert [turn["value"] for turn in conversation[1::2]] == [question.replace("q", "a") for question in asked]
    assert conversations == to_sharegpt(dataset, conversation_extension=extension, random_state=seed)["conversations"][:]


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("{nam}", {}, "Unknown column 'nam'. Did you mean 'name'.* Allowed: age, name, output, port"),
        ("{name}", {"output_column_name": "result"}, "Unknown column 'result'"),
        ("{name}[[ {age}", {}, "unmatched or nested brackets"),
        ("{name} {age}]]", {}, "unmatched or nested brackets"),
        ("[[{name} [[{age}]]]]", {}, "unmatched or nested brackets"),
        ("{name", {}, "unmatched braces"),
        ("name}", {}, "unmatched braces"),
        ("name", {}, "names no column"),
        ("{name}[[age]]", {}, "names no column in"),
        ("{name} {age}", {}, "row 2: 'age' is missing: put its part"),
        ("", {}, "merged_prompt is needed.*'name', 'age', 'port'"),
        ("{name}", {"conversation_extension": 0}, "from 1 to the 2 rows, but is 0"),
    ],
)
def test_a_merged_prompt_that_cannot_work_is_refused(prompt, options, reason):
    with pytest.raises(ValueError, match=reason):
        to_sharegpt(Dataset.from_list(PASSENGERS), prompt, **options)


# apply_chat_template


def test_renders_with_the_tokenizers_template_or_a_named_one():
    tokenizer = tiny_tokenizer()
    rendered = apply_chat_template(chats(CHAT), tokenizer)
    assert list(rendered) == [{"text": f"{START}user\n2+2?{END}\n{START}assistant\n4{END}\n"}]
    named = apply_chat_template(DatasetDict(train=chats(CHAT)), tiny_tokenizer(), chat_template="zephyr")["train"]["text"][0]
    assert named.startswith("<|user|>\n2+2?")
    with pytest.raises(ValueError, match="Unknown chat template 'zephir'.*zephyr"):
        apply_chat_template(chats(CHAT), tiny_tokenizer(), chat_template="zephir")
    with pytest.raises(ValueError, match="no conversations to render"):
        apply_chat_template(Dataset.from_list([{"text": "x"}]), tiny_tokenizer())


ALPACA = "Do it.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
LLAMA_3 = "<h>system\n\n{SYSTEM}<e><h>user\n\n{INPUT}<e><h>assistant\n\n{OUTPUT}<e>"


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        (ALPACA, [], f"Do it.\n\n### Instruction:\na\n\n### Response:\nb{EOS}\n\n### Instruction:\nc\n\n### Response:\nd{EOS}"),
        (LLAMA_3, [SYSTEM], "<h>system\n\nBe brief.<e><h>user\n\na<e><h>assistant\n\nb<e><h>user\n\nc<e><h>assistant\n\nd<e>"),
        (
            LLAMA_3.partition("{OUTPUT}")[0] + "{OUTPUT}<e><h>user\n\n{INPUT}<e><h>assistant\n\n{OUTPUT}<e>",
            [SYSTEM],
            "<h>system\n\nBe brief.<e><h>user\n\na<e><h>assistant\n\nb<e><h>user\n\nc<e><h>assistant\n\nd<e>",
        ),
        (
            f"{BOS}[I] {{INPUT}} [/I]{{OUTPUT}}{EOS}[I] {{INPUT}} [/I]{{OUTPUT}}{EOS}",
            [],
            f"{BOS}[I] a [/I]b{EOS}[I] c [/I]d{EOS}",
        ),
    ],
    ids=["alpaca", "llama-3", "llama-3 twice", "llama-2 twice"],
)
def test_a_template_written_as_an_example(template, system, text):
    tokenizer = tiny_tokenizer()
    talk = [*system, *({"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "abcd", strict=True))]
    assert apply_chat_template(chats(talk), tokenizer, chat_template=template)["text"][:] == [text]
    # the tokenizer prompts as it was trained, and the answers and their stops are what trains
    assert text.startswith(tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True))
    trained, _ = prepare_chat(chats(talk), tokenizer)
    stop = "<e>" if "<e>" in template else EOS
    assert trained_text(trained[0], tokenizer) == f"b{stop}d{stop}"


def test_the_default_system_message_of_an_example_template():
    dataset = apply_chat_template(chats(CHAT), tiny_tokenizer(), LLAMA_3, default_system_message="Be kind.")
    assert dataset["text"][0].startswith("<h>system\n\nBe kind.<e>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{INPUT} only", "must hold {INPUT} and then {OUTPUT}"),
        ("{OUTPUT}{INPUT}", "must hold {INPUT} and then {OUTPUT}"),
        ("{INPUT}{OUTPUT}{SYSTEM}", "{SYSTEM} at most once, before"),
        ("{INPUT} a {OUTPUT} {INPUT} b {OUTPUT}", "two examples that differ"),
        (ALPACA, "no place for a system message"),
    ],
)
def test_an_example_template_that_cannot_work_is_refused(template, reason):
    with pytest.raises(ValueError, match=reason):
        apply_chat_template(chats([SYSTEM, *CHAT]), tiny_tokenizer(), template)


# prepare_chat and the ledger


def trained_text(row: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"messages": [SYSTEM, *CHAT, ASK, {"role": "assistant", "content": "four"}]}, f"4{END}four{END}"),
        ({"instruction": "2+2?", "output": "4"}, f"4{END}"),
        ({"prompt": "2+2=", "completion": "4"}, f"4{EOS}"),
        ({"prompt": [*CHAT, ASK], "completion": [{"role": "assistant", "content": "four"}]}, f"four{END}"),
        ({"text": f"{START}user\n2+2?{END}\n{START}assistant\n4{END}\n"}, f"4{END}"),
        ({"text": f"{START}user\n2+2?{END}\n{START}assistant\n4"}, f"4{EOS}"),
        ({"input_ids": [3, 9, 10], "labels": [-100, -100, 10]}, None),
        ({"input_ids": [3, 9, 10], "completion_mask": [0, 0, 1]}, None),
    ],
)
def test_every_format_trains_on_its_answers(row, trained):
    tokenizer = tiny_tokenizer()
    dataset, ledger = prepare_chat(Dataset.from_list([row]), tokenizer)
    assert dataset.column_names == ["input_ids", "labels"] and ledger.trained == 1
    assert all(label in (-100, token) for label, token in zip(dataset[0]["labels"], dataset[0]["input_ids"], strict=True))
    assert trained_text(dataset[0], tokenizer) == trained if trained else dataset[0]["labels"] == [-100, -100, 10]
    everything, ledger = prepare_chat(Dataset.from_list([row]), tokenizer, train_on="all")
    if "labels" not in row and "completion_mask" not in row:
        assert everything[0]["labels"] == everything[0]["input_ids"] and ledger.trained_share > 0.5


@pytest.mark.parametrize("marked", [True, False])
def test_an_answer_of_weight_0_is_context_only(marked):
    tokenizer = get_chat_template(tiny_tokenizer(), "chatml") if marked else tiny_tokenizer()
    answers = [{"role": "assistant", "content": words, "weight": weight} for words, weight in (("bad", 0), ("good", 1))]
    dataset, _ = prepare_chat(chats([ASK, answers[0], ASK, answers[1]]), tokenizer)
    assert trained_text(dataset[0], tokenizer) == f"good{END}"
    with pytest.raises(ValueError, match="weights of the answers are .0.5.*give 0"):
        prepare_chat(chats([ASK, answers[0] | {"weight": 0.5}]), tokenizer)


def test_text_gets_one_bos_and_one_eos():
    tokenizer = tiny_tokenizer(bos=True)
    rows = [{"text": text} for text in ("hello", f"{BOS}hello{EOS}", f"hello{END}\n", " \n")]
    dataset, ledger = prepare_chat(Dataset.from_list(rows), tokenizer, train_on="all")
    assert [tokenizer.decode(ids) for ids in dataset["input_ids"]] == [f"{BOS}hello{EOS}"] * 2 + [f"{BOS}hello{END}\n"]
    assert ledger.dropped == {"empty row": 1}


def test_the_ledger_accounts_for_every_row():
    tokenizer = tiny_tokenizer()
    blank = {"role": "assistant", "content": " "}
    rows = chats(CHAT, [{"role": "user", "content": "long " * 60}, SAY], [ASK, blank], [ASK, SAY, ASK, blank], CHAT)
    dataset, ledger = prepare_chat(rows, tokenizer, max_length=60)
    assert ledger.to_dict() | {"trained_share": None} == {
        "rows_in": 5,
        "trained": 3,
        "dropped": {"too long": 1, "empty answer": 1},
        "tokens": sum(map(len, dataset["input_ids"])),
        "trained_tokens": sum(label != -100 for labels in dataset["labels"] for label in labels),
        "trained_share": None,
        "longest": max(map(len, dataset["input_ids"])),
        "longest_in": max(map(len, prepare_chat(rows, tokenizer)[0]["input_ids"])),
        "truncated": 0,
        "empty": 1,
    }


def test_truncation_counts_and_drops_rows_whose_answers_were_cut():
    tokenizer = tiny_tokenizer()
    long_answer = [ASK, {"role": "assistant", "content": "four " * 60}]
    dataset, ledger = prepare_chat(
        chats(CHAT, long_answer, [{"role": "user", "content": "x " * 90}, SAY]), tokenizer, 50, too_long="truncate"
    )
    assert (ledger.truncated, ledger.dropped, ledger.longest) == (1, {"no trained token": 1}, 50)
    assert dataset["input_ids"][1] == prepare_chat(chats(long_answer), tokenizer)[0]["input_ids"][0][:50]


def test_a_row_that_is_too_long_can_be_an_error():
    with pytest.raises(ValueError, match=r"1 of 2 rows are longer than max_length 50: the first is row 2, the longest has \d+"):
        prepare_chat(chats(CHAT, [{"role": "user", "content": "x " * 90}, SAY]), tiny_tokenizer(), 50, too_long="raise")


def test_max_length_shorter_than_every_row_names_the_shortest():
    length = len(prepare_chat(chats(CHAT), tiny_tokenizer())[0]["input_ids"][0])
    with pytest.raises(ValueError, match=f"max_length 5 is shorter than every row: the shortest has {length} tokens"):
        prepare_chat(chats(CHAT, [SYSTEM, *CHAT]), tiny_tokenizer(), max_length=5)


def test_max_length_that_cuts_off_every_answer_is_named():
    asked = {"role": "user", "content": "x " * 90}
    with pytest.raises(ValueError, match=r"max_length 50 cuts off every answer: the rows have (\d+) to \1 tokens"):
        prepare_chat(chats([asked, SAY], [asked, SAY]), tiny_tokenizer(), 50, too_long="truncate")


@pytest.mark.parametrize("ids", [False, True])
def test_all_rows_masked_shows_a_row_and_what_was_looked_for(ids):
    tokenizer = tiny_tokenizer()
    row = {"input_ids": tokenizer("Q: 2+2? A: 4")["input_ids"]} if ids else {"text": "Q: 2+2? A: 4"}
    with pytest.raises(ValueError) as raised:
        prepare_chat(Dataset.from_list([row]), tokenizer)
    for part in ("No token of the dataset would train", "Q: 2+2? A: 4", repr(f"{START}assistant\n"), "train_on='all'"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (chats(CHAT), {"train_on": "answers"}, "Unknown train_on 'answers'"),
        (chats(CHAT), {"too_long": "cut"}, "Unknown too_long 'cut'. .*drop, raise, truncate"),
        (chats(CHAT), {"max_length": 1}, "at least 2 tokens"),
        (chats(CHAT).select([]), {}, "empty"),
        (chats([ASK, {"role": "assistant", "content": ""}]), {}, "No row is left to train on: 1 x empty answer"),
        (chats(CHAT, [ASK]), {}, "row 2: it has no answer"),
        (Dataset.from_list([{"text": "a"}, {"text": None}]), {"train_on": "all"}, "row 2: 'text' is missing"),
        (Dataset.from_list([{"input_ids": [1, 2], "labels": [1]}]), {}, "row 1: it has 2 input_ids but 1 values in labels"),
        (Dataset.from_dict({"messages": [CHAT], "tools": ["{"]}), {}, "row 1: its 'tools' are not JSON"),
        (Dataset.from_list([{"input_ids": "abc"}]), {}, "row 1: its input_ids must be a list of whole numbers"),
        (Dataset.from_list([{"input_ids": [1.5]}]), {}, "row 1: its input_ids must be a list of whole numbers"),
        (Dataset.from_list([{"input_ids": [5, -1]}]), {}, "row 1: its input_ids go from -1 to 5"),
        (Dataset.from_list([{"input_ids": [1, 2], "labels": [-1, 2]}]), {}, "row 1: its labels hold -1"),
    ],
)
def test_prepare_names_bad_rows_and_arguments(rows, options, reason):
    with pytest.raises(ValueError, match=reason):
        prepare_chat(rows, tiny_tokenizer(), **options)


def test_processes_change_neither_rows_nor_errors():
    rows = [[{**ASK, "content": "2+2? " * number}, {**SAY, "content": str(number)}] for number in range(9)]
    rows[4] = [rows[4][0], {"role": "assistant", "content": " "}]
    one, ledger = prepare_chat(chats(*rows), tiny_tokenizer(), 50, num_proc=1)
    several, same = prepare_chat(chats(*rows), tiny_tokenizer(), 50, num_proc=3)
    assert several[:] == one[:] and same == ledger and ledger.dropped.total() > 1
    rows[3], rows[8] = [ASK], [SAY, SYSTEM]
    told = []
    for processes in (1, 3):
        with pytest.raises(ValueError) as error:
            prepare_chat(chats(*rows), tiny_tokenizer(), num_proc=processes)
        told.append(str(error.value))
    assert told[0] == told[1] and "2 of 9 rows cannot be used:\nrow 4: it has no answer" in told[0] and "\nrow 9: " in told[0]


def test_processes_only_where_they_pay(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    assert [processes_for(rows, str) for rows in (3999, 4000, 6500, 10**6)] == [1, 2, 3, 16]
    running = (row for row in ())
    assert processes_for(10**6, lambda row: {"running": running}) == 1, "what cannot reach another process"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes_for(10**6, str) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1), raising=False)
    assert processes_for(10**6, str) == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes_for(10**6, str) == 1


def test_plain_text_without_a_template_asks_for_train_on_all():
    with pytest.raises(ValueError, match="no chat template.*train_on='all'"):
        prepare_chat(Dataset.from_list([{"text": "hello"}]), tiny_tokenizer(chat=False))


def test_a_row_that_the_template_refuses_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="row 2: .*no system"):
        prepare_chat(chats(CHAT, [SYSTEM, *CHAT]), tokenizer)


def test_ledgers_of_two_passes_add_up_and_wrong_ones_cannot_exist():
    first = Ledger.count([5, 7], [2, 3], {"too long": 1}, longest_in=90)
    both = first.followed_by(Ledger.count([5], [1], {"no trained token": 1}, longest_in=7))
    assert (both.rows_in, both.trained, both.dropped.total(), both.longest_in) == (3, 1, 2, 90)
    for wrong in (
        {"rows_in": 3, "trained": 1},
        {"rows_in": 1, "trained": 1, "tokens": 4},
        {"rows_in": 0, "trained": 0, "longest": 4},
    ):
        with pytest.raises(AssertionError):
            Ledger(**wrong)


def test_the_ledger_prints_a_table(capsys):
    Ledger.count([5, 7], [2, 3], {"too long": 1, "empty answer": 0}, longest_in=90).table()
    printed = capsys.readouterr().err
    assert "dropped: too long" in printed and "5 (41.7%)" in printed and "empty answer" not in printed


# The preview


def test_preview_marks_what_trains():
    tokenizer = tiny_tokenizer()
    dataset, _ = prepare_chat(chats(CHAT, CHAT), tokenizer)
    plain, colour = io.StringIO(), io.StringIO()
    preview(dataset, tokenizer, rows=1, console=Console(file=plain, width=200))
    assert f"{START}assistant↵\n⟦4{END}⟧↵\n" in plain.getvalue() and "Row 2" not in plain.getvalue()
    preview(dataset, tokenizer, console=Console(file=colour, force_terminal=True, color_system="standard", width=200))
    assert "⟦" not in colour.getvalue() and "\x1b[4;" in colour.getvalue() and "Row 2 of 2" in colour.getvalue()


def test_preview_for_machines_spells_the_row():
    tokenizer = tiny_tokenizer()
    dataset, ledger = prepare_chat(chats(CHAT), tokenizer)
    (row,) = json.loads(json.dumps(preview_rows(dataset, tokenizer)))
    assert "".join(token["text"] for token in row["tokens"]) == tokenizer.decode(dataset[0]["input_ids"])
    assert sum(token["trained"] for token in row["tokens"]) == row["trained_tokens"] == ledger.trained_tokens
