"""Chat templates: their rendering against the owners', and what trains."""

import json
import re
from pathlib import Path

import pytest
from chats import ANSWER, CONVERSATIONS, NAMES, RENDERINGS, USER, set_date, spoken, tokenizer_of, tokenizer_with, unmarked

from luthier.data import chat
from luthier.data.chat import CHAT_TEMPLATES, strip_generation_marks, template_parts
from luthier.data.render import encode, render, thoughts_are_renamed

DOCS = Path(__file__).parent.parent / "docs" / "chat-templates.md"


# ---- rendering


@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_the_owners(name, monkeypatch):
    set_date(monkeypatch)
    tokenizer = tokenizer_of(name)
    expected = json.loads((RENDERINGS / f"{CHAT_TEMPLATES[name].file or name}.json").read_text(encoding="utf-8"))
    if name == "gemma-4-e4b":
        expected = json.loads((RENDERINGS / "gemma-4-e4b.json").read_text(encoding="utf-8"))
    for conversation, text in expected.items():
        case = CONVERSATIONS[conversation]
        settings = case.get("kwargs", {})
        named = thoughts_as_read(tokenizer.chat_template, case["messages"])
        if named != case["messages"] and thoughts_are_renamed():  # transformers 5.24: no name is dropped any more
            assert outcome(tokenizer, case["messages"], case) == outcome(tokenizer, named, case), conversation
        elif text is None:
            with pytest.raises(ValueError, match="refuses this conversation"):
                render(tokenizer, case["messages"], case.get("tools"), **settings)
        else:
            assert render(tokenizer, case["messages"], case.get("tools"), **settings) == text, conversation


def outcome(tokenizer, messages: list[dict], case: dict) -> str | None:
    try:
        return render(tokenizer, messages, case.get("tools"), **case.get("kwargs", {}))
    except ValueError:
        return None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lfm-2",)])
def test_parts_read_as_one_text(name):
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    question = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "Three"}]}]
    words = "Onetwo" if name.startswith(("gemma-3", "gemma-4")) else "One two"  # these trim each part
    plain = [{"role": "user", "content": words}, {"role": "assistant", "content": "Three"}]
    assert render(tokenizer_of(name), question) == render(tokenizer_of(name), plain)


@pytest.mark.parametrize("name", ["chatml", "qwen-3", "llama-3.1", "gpt-oss"])
def test_an_image_for_a_text_template_is_refused(name):
    with pytest.raises(ValueError, match="takes text only, not a part of type image"):
        render(tokenizer_of(name), CONVERSATIONS["image"]["messages"])


def test_columns_that_arrow_fills_with_none_change_nothing():
    row = [{**USER, "tool_calls": None, "reasoning_content": None}, {**ANSWER, "tool_calls": None, "reasoning_content": None}]
    for name in ("llama-3.1", "gpt-oss", "qwen-3"):
        assert render(tokenizer_of(name), row) == render(tokenizer_of(name), [USER, ANSWER])


def test_rendering_cannot_reach_python():
    tokenizer = tokenizer_with()
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(ValueError, match="refuses"):
        render(tokenizer, [USER])
    tokenizer.chat_template = "{{ messages.append(1) }}"
    with pytest.raises(ValueError, match="refuses"):
        render(tokenizer, [USER])


# ---- what trains

PLAIN = ("one turn", "multi-turn", "empty answer inside", "unicode", "quoted markers in the question", "code")


@pytest.mark.parametrize("name", NAMES)
def test_words_and_stop_token_train(name):
    """Expected from the conversation alone: each answer's words and its stop token, and nothing else."""
    tokenizer = tokenizer_of(name)
    stop = tokenizer.eos_token
    for conversation in (*PLAIN, "quoted markers in the answer"):
        messages = CONVERSATIONS[conversation]["messages"]
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        found = spoken(tokenizer, CONVERSATIONS[conversation])
        if name == "gpt-oss":  # the channel is the model's to name; an earlier answer ends with <|end|>, which stops nothing
            expected = [f"<|channel|>final<|message|>{words}" for words in answers]
            expected[-1] += stop
            assert found == expected, conversation
        else:
            assert all(text.endswith(stop) for text in found), conversation
            assert [text.removesuffix(stop).strip() for text in found] == answers, conversation
            assert [text.lstrip(" ") for text in found] == [text.lstrip() for text in found], conversation


TRAINED = {
    ("qwen-2.5", "tools, words before the call"): [
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\"ris", "days": 2, '
        '"list": [1, "a", null, true], "map": {"k": {"z": 1.5}}}}\n</tool_call><|im_end|>',
        "It is clear.<|im_end|>",
    ],
    ("qwen-3", "thoughts"): ["4<|im_end|>", "<think>\nThree\nand three.\n</think>\n\n6<|im_end|>"],
    ("qwen-3", "thoughts in the words"): ["4<|im_end|>", "<think>\nThree.\n</think>\n\n6<|im_end|>"],
    ("qwen-3", "empty thoughts"): ["4<|im_end|>", "6<|im_end|>"],
    ("qwen-3", "one turn"): ["Hello. How can I help?<|im_end|>"],
    ("qwen3-thinking", "thoughts"): ["4<|im_end|>", "Three\nand three.\n</think>\n\n6<|im_end|>"],
    ("qwen3-thinking", "empty thoughts"): ["4<|im_end|>", "6<|im_end|>"],
    ("llama-3.1", "tools"): [
        '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>',
        "It is clear.<|eot_id|>",
    ],
    ("llama-3.1", "builtin tools"): ['<|python_tag|>brave_search.call(query="lute")<|eom_id|>', "Yes.<|eot_id|>"],
    ("mistral", "tools"): [
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdef123"}]</s>',
        " It is clear.</s>",
    ],
    ("gemma-4", "tools, two calls"): [
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_call>call:clock{}<tool_call|><|tool_response>',
        "Clear, noon.<turn|>",
    ],
    ("gemma-4", "thoughts"): ["4<turn|>", "<|channel>thought\nThree\nand three.\n\n<channel|>6<turn|>"],
    ("lfm-2", "tools"): [
        "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|><|im_end|>",
        "It is clear.<|im_end|>",
    ],
    ("gpt-oss", "analysis"): [
        "<|channel|>final<|message|>4",
        "<|channel|>analysis<|message|>Three and three.<|end|><|start|>assistant<|channel|>final<|message|>6<|return|>",
    ],
    ("gpt-oss", "empty analysis"): ["<|channel|>final<|message|>4<|return|>"],
    ("gpt-oss", "analysis with tools"): [
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant to=functions.get_weather"
        '<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
    ],
}


@pytest.mark.parametrize(("name", "conversation"), TRAINED)
@pytest.mark.parametrize("marks", [True, False], ids=["marked", "derived"])
def test_tool_calls_and_thoughts_train(name, conversation, marks):
    tokenizer = tokenizer_of(name) if marks else unmarked(name)
    assert spoken(tokenizer, CONVERSATIONS[conversation]) == TRAINED[name, conversation]


@pytest.mark.parametrize("name", NAMES)
def test_without_marks_the_same_trains(name):
    """What a template's renderings show is what its marks say, on every conversation that trains at all."""
    marked, plain = tokenizer_of(name), unmarked(name)
    assert "generation" not in plain.chat_template.replace("add_generation_prompt", "")
    compared = 0
    for conversation, case in CONVERSATIONS.items():
        try:
            expected = spoken(marked, case)
        except ValueError:
            continue  # refused by the owner, or it would lose a part
        if name.startswith("gemma-4") and conversation in GEMMA_4_IN_PIECES:
            with pytest.raises(ValueError, match="stands in pieces.*get_chat_template"):
                spoken(plain, case)
            continue
        assert spoken(plain, case) == expected, conversation
        compared += 1
    assert compared > 15


# Gemma 4 prints the words of a call's message behind the tool's answer.
GEMMA_4_IN_PIECES = ("tools, words before the call", "thoughts with tools, earlier turn")


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_transformers(name):
    tokenizer = tokenizer_of(name)
    for conversation in (*PLAIN, "tools with system", "thoughts"):
        case = CONVERSATIONS[conversation]
        try:
            ids, trained = encode(tokenizer, case["messages"], case.get("tools"))
        except ValueError:
            continue
        theirs = tokenizer.apply_chat_template(
            case["messages"], tools=case.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == theirs["input_ids"], conversation
        assert trained == list(map(bool, theirs["assistant_masks"])), conversation
        assert len(ids) == len(trained)


def test_the_mask_covers_every_byte_of_a_character():
    tokenizer = tokenizer_of("llama")  # a space and the stop token behind the words
    ids, trained = encode(tokenizer, [USER, {"role": "assistant", "content": "🎻"}])
    assert tokenizer.decode([token for token, kept in zip(ids, trained, strict=True) if kept]) == " 🎻 </s>"


def test_what_the_template_never_reads_is_refused():
    case = CONVERSATIONS["tools"]
    with pytest.raises(ValueError, match="never prints 'tools', 'tool_calls'"):
        encode(tokenizer_of("phi-4"), case["messages"], case["tools"])
    with pytest.raises(ValueError, match="never prints 'thinking'"):
        encode(tokenizer_of("phi-4"), CONVERSATIONS["analysis"]["messages"])


@pytest.mark.parametrize(
    "name, conversation, why",
    [
        ("gpt-oss", "thoughts", "never prints 'reasoning_content'.*reads tool_calls, thinking, tools"),
        ("qwen-3", "analysis", "never prints 'thinking'"),
    ],
)
def test_thoughts_under_another_name_train_or_are_refused(name, conversation, why):
    """Dropped silently they never are: transformers hands them over under the template's name (5.24), or we refuse."""
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[conversation]["messages"]
    if thoughts_are_renamed():
        assert encode(tokenizer, messages) == encode(tokenizer, thoughts_as_read(tokenizer.chat_template, messages))
    else:
        with pytest.raises(ValueError, match=why):
            encode(tokenizer, messages)
    both = [{**message, "thinking": "One.", "reasoning_content": "Two."} for message in messages]
    with pytest.raises(ValueError, match="never prints"):  # one of the two
        encode(tokenizer, both)


def thoughts_as_read(template: str, messages: list[dict]) -> list[dict]:
    """The messages with their thoughts under the name that the template reads, if it reads another one than theirs."""
    read = re.findall(r"[.'](reasoning_content|thinking)\b", template)
    if len(set(read)) != 1:
        return messages
    names = {"thinking": read[0], "reasoning_content": read[0]}
    return [{names.get(key, key): value for key, value in message.items()} for message in messages]


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "derived"])
def test_one_beginning_of_text(marks):
    """The template prints it and the tokenizer adds it; the ids have it once."""
    tokenizer = tokenizer_with("llama-3", bos=True)
    assert tokenizer("x")["input_ids"][0] != tokenizer("x", add_special_tokens=False)["input_ids"][0]
    if not marks:
        tokenizer.chat_template = strip_generation_marks(tokenizer.chat_template)
    ids, _ = encode(tokenizer, [USER, ANSWER])
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


# ---- a tokenizer's own template

ODD = {
    # prints no generation prompt, though its answers have a header
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}": (
        ("<|user|>\n", "<|assistant|>\n", ("</s>",)),
        ["Hello</s>", "Two</s>"],
    ),
    # a text, and a token, before the token that stops
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>!</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}": (("<|user|>", "<|assistant|>", ("</s>",)), ["Hello<|end|>!</s>", "Two<|end|>!</s>"]),
    # the prompt opens thoughts that the history does not have
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|><think>\n{% endif %}": (("<|user|>", "<|assistant|>", ("</s>",)), ["Hello</s>", "Two</s>"]),
    # takes words as a list of parts only
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}": (("<|user|>", "<|assistant|>", ("</s>",)), None),
    # everything of a turn in capitals but the words
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }} </s>\n\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}": (
        ("[USER]", "[ASSISTANT]", ("</s>",)),
        [" Hello </s>", " Two </s>"],
    ),
}


@pytest.mark.parametrize("jinja", ODD)
def test_odd_templates_show_their_parts(jinja):
    tokenizer = tokenizer_with()
    tokenizer.chat_template = jinja
    (instruction, response, stops), expected = ODD[jinja]
    parts = template_parts(tokenizer)
    assert (parts.instruction_part, parts.response_part, parts.stop_tokens) == (instruction, response, stops)
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "One"}]
    messages.append({"role": "assistant", "content": "Two"})
    if expected is None:
        with pytest.raises(ValueError, match="does not print the words"):
            encode(tokenizer, messages)
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        expected = ["Hello</s>", "Two</s>"]
    assert spoken(tokenizer, {"messages": messages}) == expected


def test_marks_that_include_the_newline_train_without_it():
    tokenizer = tokenizer_with()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '</s>\n' }}{% endgeneration %}{% else %}{{ m.content + '</s>\n' }}{% endif %}{% endfor %}"
    )
    assert spoken(tokenizer, {"messages": [USER, ANSWER]}) == ["Hello</s>"]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "no token of the vocabulary.*add_new_tokens"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>{% endfor %}", "no token of the vocabulary"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", "nothing stands between its turns"),
        ("Hello</s>", "does not show"),
        ("{{ raise_exception('never') }}", "refuses this conversation.*never"),
    ],
)
def test_a_template_that_shows_nothing_is_refused(jinja, message):
    tokenizer = tokenizer_with()
    tokenizer.chat_template = jinja
    with pytest.raises(ValueError, match=message):
        template_parts(tokenizer)


def test_no_template_and_no_messages():
    with pytest.raises(ValueError, match="no chat template.*get_chat_template"):
        render(tokenizer_with(), [USER])
    with pytest.raises(ValueError, match="at least one message"):
        render(tokenizer_of("chatml"), [])


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_those_of_the_table(name):
    parts, template = template_parts(tokenizer_of(name)), CHAT_TEMPLATES[name]
    assert parts.response_part == template.assistant_header
    assert parts.instruction_part.removeprefix("<s>") == template.user_header
    stops = [tokenizer_of(name).eos_token if stop == chat.EOS else stop for stop in template.stop_tokens]
    assert list(parts.stop_tokens) == [stop for stop in stops if stop != "<|eom_id|>"]  # only with built-in tools
    assert template_parts(unmarked(name)) == parts


# ---- documentation


def test_the_documented_table_is_current():
    assert chat.markdown_table() in DOCS.read_text(encoding="utf-8"), "print(luthier.data.chat.markdown_table()) into it"
