"""Chat templates: rendering against the owners', what trains, and how a tokenizer is given one.

``renderings/`` holds conversations, and for each template what its owner's template makes of them (docs/chat-templates.md
names the sources): a text, or null where the owner refuses. A conversation on which the owner's template breaks, or prints
a Python list, is left out there.
"""

import functools
import json
import urllib.request
import warnings
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_tokenizer

from luthier.data import chat
from luthier.data.chat import CHAT_TEMPLATES, TABLE, get_chat_template, strip_generation_marks, template_parts
from luthier.data.render import encode, render, render_spans

RENDERINGS = Path(__file__).parent / "renderings"
DOCS = Path(__file__).parent.parent / "docs" / "chat-templates.md"
CONVERSATIONS = json.loads((RENDERINGS / "conversations.json").read_text(encoding="utf-8"))
NAMES = [template.name for template in TABLE]
TOKENS = (
    "<s> </s> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> [INST] "
    "[/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|user|> <|assistant|> "
    "<|system|> <|end|> <|im_sep|> <think> </think> <tool_call> </tool_call> <|start|> <|message|> <|channel|> "
    "<|return|> <|call|> <|end_of_turn|> <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> "
    "<|tool_response> <tool_response|> <|tool_call_start|> <|tool_call_end|>"
).split()
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def tokenizer_with(name: str | None = None, bos: bool = False):
    tokenizer = tiny_tokenizer(chat=False, extra_tokens=tuple(TOKENS), bos=bos)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return get_chat_template(tokenizer, name) if name else tokenizer


@functools.cache
def tokenizer_of(name: str):
    return tokenizer_with(name)


def unmarked(name: str):
    tokenizer = tokenizer_with(name)
    tokenizer.chat_template = strip_generation_marks(tokenizer.chat_template)
    return tokenizer


def dated(pattern: str) -> str:
    return {"%d %b %Y": "01 Jan 2025", "%Y-%m-%d": "2025-01-01"}[pattern]


def spoken(tokenizer, case: dict) -> list[str]:
    """The texts that train."""
    settings = {key: value for key, value in case.get("kwargs", {}).items() if key != "add_generation_prompt"}
    text, spans = render_spans(tokenizer, case["messages"], case.get("tools"), **settings)
    assert text == render(tokenizer, case["messages"], case.get("tools"), **settings)
    return [text[start:end] for start, end in spans]


# ---- rendering


@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_the_owners(name):
    tokenizer = tokenizer_of(name)
    expected = json.loads((RENDERINGS / f"{CHAT_TEMPLATES[name].file or name}.json").read_text(encoding="utf-8"))
    if name == "gemma-4-e4b":
        expected = json.loads((RENDERINGS / "gemma-4-e4b.json").read_text(encoding="utf-8"))
    for conversation, text in expected.items():
        case = CONVERSATIONS[conversation]
        settings = {**case.get("kwargs", {}), "strftime_now": dated}
        if text is None:
            with pytest.raises(ValueError, match="refuses this conversation"):
                render(tokenizer, case["messages"], case.get("tools"), **settings)
        else:
            assert render(tokenizer, case["messages"], case.get("tools"), **settings) == text, conversation


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
    with pytest.raises(ValueError, match="never prints 'reasoning_content'.*reads tool_calls, thinking, tools"):
        encode(tokenizer_of("gpt-oss"), CONVERSATIONS["thoughts"]["messages"])
    with pytest.raises(ValueError, match="never prints 'thinking'"):
        encode(tokenizer_of("qwen-3"), CONVERSATIONS["analysis"]["messages"])


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


# ---- giving a template


def test_every_promised_name_is_there():
    promised = (
        "chatml alpaca vicuna vicuna_old zephyr mistral llama llama-3 llama-3.1 llama-3.2 llama-3.3 gemma gemma-2 gemma-3 "
        "gemma-3n gemma-4 phi-3 phi-3.5 phi-4 qwen-2.5 qwen-3 qwen3-instruct qwen3-thinking gpt-oss starling yi-chat lfm-2 "
        "llama3 llama31 llama-31 llama3.1 llama3.2 llama33 gemma2 gemma3 gemma3n gemma4 phi3 phi35 phi3.5 phi4 qwen2.5 qwen25 "
        "qwen3 gptoss lfm2"
    ).split()
    assert set(promised) <= set(CHAT_TEMPLATES)
    assert CHAT_TEMPLATES["llama-31"] is CHAT_TEMPLATES["llama-3.1"]


def test_the_files_are_the_templates():
    files = {path.stem for path in chat.TEMPLATES.glob("*.jinja")}
    assert files == {template.file or template.name for template in TABLE}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown chat template 'lama-3'.*Did you mean 'llama-3'.*chatml.*zephyr"):
        get_chat_template(tokenizer_with(), "lama-3")
    with pytest.raises(TypeError, match="name, a path, or a tuple"):
        get_chat_template(tokenizer_with(), 3)


def test_the_stop_token_becomes_eos():
    tokenizer = tokenizer_with("llama-3")
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer("<|eot_id|>")["input_ids"] == [tokenizer.eos_token_id]
    kept = get_chat_template(tokenizer_with(), "llama-3", map_eos_token=False)
    assert kept.eos_token == "</s>"
    assert tokenizer_with("zephyr").eos_token == "</s>"


def test_a_stop_token_outside_the_vocabulary_is_never_silent():
    before = tiny_tokenizer()
    with pytest.warns(UserWarning, match=r"'<end_of_turn>'.*no token of this vocabulary.*'<\|endoftext\|>'.*add_new_tokens"):
        tokenizer = get_chat_template(tiny_tokenizer(), "gemma-2")
    assert tokenizer.eos_token == before.eos_token and len(tokenizer) == len(before)
    ids, trained = encode(tokenizer, [USER, ANSWER])
    assert [token for token, kept in zip(ids, trained, strict=True) if kept][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"would be split into \d+.*add_new_tokens.*map_eos_token=True"):
        get_chat_template(tiny_tokenizer(), "gemma-2", map_eos_token=False)
    bare = tiny_tokenizer()
    bare.eos_token = None
    for name in ("gemma-2", "zephyr"):
        with pytest.raises(ValueError, match="this tokenizer has none"):
            get_chat_template(bare, name)


def test_phi_closes_a_text_with_the_owners_token():
    tokenizer = tokenizer_with("phi-3")
    once = render(tokenizer, [USER, ANSWER])
    assert once.endswith("<|end|>\n</s>") and tokenizer.eos_token == "<|end|>"
    own = tiny_tokenizer(extra_tokens=("<|end|>", "<|user|>", "<|assistant|>"))  # its EOS is <|endoftext|>, as Phi's
    for _ in range(2):
        get_chat_template(own, "phi-3.5")
        assert render(own, [USER, ANSWER]).endswith("<|end|>\n<|endoftext|>")


def test_gemma_4_follows_the_size_of_the_model():
    """The small models' own template prints no empty block of thoughts, and neither does then ours."""
    for name, ending in (("gemma-4-e4b", "<|turn>model\n"), ("gemma-4-31b", "<|channel>thought\n<channel|>")):
        tokenizer = get_chat_template(tokenizer_with(name), "gemma-4")
        assert render(tokenizer, [USER], add_generation_prompt=True).endswith(ending)


def test_a_tool_call_that_nothing_would_stop_warns():
    tokenizer = tiny_tokenizer(extra_tokens=("<|return|>",))
    with pytest.warns(UserWarning, match=r"'<\|call\|>'.*ends some tool calls.*add_new_tokens"):
        get_chat_template(tokenizer, "gpt-oss")


def test_a_tokenizer_with_several_templates():
    tokenizer = tokenizer_with()
    simple = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template = {"default": simple, "tool_use": simple + "{{ tools | length }}"}
    assert render(tokenizer, [USER]) == "user: Hi</s>"
    assert render(tokenizer, [USER], CONVERSATIONS["tools"]["tools"]) == "user: Hi</s>1"
    tokenizer.chat_template = {"other": simple}
    with pytest.raises(ValueError, match="chat templates other and none named 'default'"):
        render(tokenizer, [USER])


def test_padding_with_the_stop_token_warns():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    with pytest.warns(UserWarning, match="both the stop token and the padding token"):
        get_chat_template(tokenizer, "chatml")


def test_a_template_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = get_chat_template(tokenizer_with(), "qwen-3", mapping=SHAREGPT, system_message='A "luthier" 🎻\n{{ x }}')
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template and loaded.eos_token == "<|im_end|>"
    assert encode(loaded, [USER, ANSWER]) == encode(tokenizer, [USER, ANSWER])


def test_sharegpt_rows_render_as_messages():
    tokenizer = get_chat_template(tokenizer_with(), "llama-3", mapping=SHAREGPT)
    rows = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    expected = tokenizer_of("llama-3").apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(rows, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert encode(tokenizer, rows) == encode(tokenizer_of("llama-3"), messages)
    with pytest.raises(ValueError, match="Unknown key in mapping 'contents'.*'content'"):
        get_chat_template(tokenizer_with(), "chatml", mapping={"contents": "value"})


@pytest.mark.parametrize("name", NAMES)
def test_system_message_stands_where_none_is_brought(name):
    message = 'It\'s "so"\n{% raw %}\\n 🎻'
    if CHAT_TEMPLATES[name].system == "none":
        with pytest.raises(ValueError, match="no place for a system message"):
            get_chat_template(tokenizer_with(), name, system_message=message)
        return
    tokenizer = get_chat_template(tokenizer_with(), name, system_message=message)
    brought = [{"role": "system", "content": message}, USER, ANSWER]
    assert render(tokenizer, [USER, ANSWER]) == render(tokenizer_of(name), brought)
    own = [{"role": "system", "content": "Mine."}, USER, ANSWER]
    assert render(tokenizer, own) == render(tokenizer_of(name), own)


def test_a_template_of_ones_own(tmp_path):
    jinja = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = get_chat_template(tokenizer_with(), (jinja, "<|end|>"))
    assert given.chat_template == jinja and given.eos_token == "<|end|>"
    assert get_chat_template(tokenizer_with(), (jinja.replace("<|end|>", "{{ eos_token }}"), "eos_token")).eos_token == "</s>"
    path = tmp_path / "mine.jinja"
    path.write_text(jinja)
    for place in (path, str(path)):
        read = get_chat_template(tokenizer_with(), place)
        assert read.chat_template == jinja and read.eos_token == "<|end|>"
    with pytest.raises(FileNotFoundError, match=r"no\.jinja"):
        get_chat_template(tokenizer_with(), tmp_path / "no.jinja")
    with pytest.raises(TypeError, match=r"\(jinja, stop token\)"):
        get_chat_template(tokenizer_with(), (jinja,))


def test_a_processor_gets_the_template_too():
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer, self.chat_template = tokenizer, None

    processor = get_chat_template(Processor(tokenizer_with()), "gemma-3")
    assert processor.chat_template == processor.tokenizer.chat_template
    assert template_parts(processor).response_part == "<start_of_turn>model\n"
    case = CONVERSATIONS["image"]
    assert "<start_of_image>What is it?" in render(processor, case["messages"])
    assert spoken(processor, case) == ["A lute.<end_of_turn>"]


# ---- marks


@pytest.mark.parametrize(
    "opening", ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%-generation-%}", "{%+ generation %}"]
)
@pytest.mark.parametrize("closing", ["{% endgeneration %}", "{%- endgeneration -%}"])
@pytest.mark.parametrize(
    "frame", ["{0}{{{{ m.content }}}}{1}", "  {0}\n  {{{{ m.content }}}}  \n  {1}\n  x", "a {0} b {1}\n\n c"]
)
def test_stripped_marks_render_the_same_bytes(opening, closing, frame):
    jinja = "{% for m in messages %}\n" + frame.format(opening, closing) + "\n{% endfor %}"
    tokenizer = tokenizer_with()
    tokenizer.chat_template = jinja
    marked = render(tokenizer, [USER, ANSWER])
    tokenizer.chat_template = strip_generation_marks(jinja)
    assert "generation" not in tokenizer.chat_template and render(tokenizer, [USER, ANSWER]) == marked


@pytest.mark.parametrize("name", NAMES)
def test_stripped_templates_render_the_same_bytes(name):
    marked, plain = tokenizer_of(name), unmarked(name)
    for case in CONVERSATIONS.values():
        settings = {**case.get("kwargs", {}), "strftime_now": dated}
        try:
            expected = render(marked, case["messages"], case.get("tools"), **settings)
        except ValueError:
            continue
        assert render(plain, case["messages"], case.get("tools"), **settings) == expected


# ---- llama.cpp, which renders the exported template with a jinja of its own


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    from luthier.gguf import convert_to_gguf

    place = tmp_path_factory.mktemp("gguf")
    return convert_to_gguf(save_tiny("llama3", place / "model"), place / "model.gguf", "f16")[0]


def in_llama_cpp(gguf: Path, jinja: str, messages: list[dict], **settings) -> str:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.chat_template, params.use_jinja = str(gguf), jinja, True
    params.n_ctx, params.cpuparams.n_threads, params.warmup, params.port = 64, 1, False, 0
    server = xllamacpp.Server(params)
    body = json.dumps({"messages": messages, "chat_template_kwargs": settings}).encode()
    request = urllib.request.Request(server.listening_address + "/apply-template", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["prompt"]


@pytest.mark.parametrize("name", sorted({template.file or template.name for template in TABLE}))
def test_llama_cpp_renders_the_same(name, gguf):
    plain = unmarked(name)
    settings = {"enable_thinking": False, "date_string": "1 Jan 2025"}
    tokens = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}  # those of the file
    messages = CONVERSATIONS["prompt after turns"]["messages"][1:]
    expected = render(plain, messages, add_generation_prompt=True, **tokens, **settings)
    prompt = in_llama_cpp(gguf, plain.chat_template, messages, **settings)
    assert prompt.removeprefix("<|bos|>") == expected.removeprefix("<|bos|>")  # which it adds itself


def test_llama_cpp_knows_what_goes_before_a_template(gguf):
    tokenizer = get_chat_template(tokenizer_with(), "qwen-2.5", mapping=SHAREGPT, system_message='It\'s "so"\n\\n 🎻')
    expected = render(tokenizer, [USER], add_generation_prompt=True)
    assert in_llama_cpp(gguf, strip_generation_marks(tokenizer.chat_template), [USER]) == expected


# ---- documentation


def test_the_documented_table_is_current():
    assert chat.markdown_table() in DOCS.read_text(encoding="utf-8"), "print(luthier.data.chat.markdown_table()) into it"


def test_giving_a_template_is_quiet_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            tokenizer_with(name)
