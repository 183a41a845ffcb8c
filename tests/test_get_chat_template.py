"""How a tokenizer is given a chat template, and how one leaves: without its marks, into llama.cpp."""

import warnings

import pytest
from chats import ANSWER, CONVERSATIONS, NAMES, SHAREGPT, USER, set_date, spoken, tokenizer_of, tokenizer_with, unmarked
from llama_server import rendered
from tiny import save_tiny, tiny_tokenizer

from luthier.data import chat
from luthier.data.chat import CHAT_TEMPLATES, TABLE, get_chat_template, strip_generation_marks, template_parts
from luthier.data.render import encode, render


def test_giving_a_template_is_quiet_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            tokenizer_with(name)


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
    with pytest.raises(TypeError, match="a model's tokenizer or processor, not None"):
        get_chat_template(None)
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
    with pytest.raises(ValueError, match="no valid jinja.*{% for %}"):
        get_chat_template(tokenizer_with(), ("{% for %}", "eos_token"))
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
def test_stripped_templates_render_the_same_bytes(name, monkeypatch):
    set_date(monkeypatch)
    marked, plain = tokenizer_of(name), unmarked(name)
    for case in CONVERSATIONS.values():
        settings = case.get("kwargs", {})
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


FILES = sorted({template.file or template.name for template in TABLE})
FIXED = {"enable_thinking": False, "date_string": "1 Jan 2025"}


@pytest.fixture(scope="module")
def prompts(gguf):
    """What llama.cpp makes of the same conversation with each template."""
    messages = CONVERSATIONS["prompt after turns"]["messages"][1:]
    cases = [{"jinja": unmarked(name).chat_template, "messages": messages, "settings": FIXED} for name in FILES]
    return dict(zip(FILES, rendered(gguf, cases), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_llama_cpp_renders_the_same(name, prompts):
    tokens = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}  # those of the file
    messages = CONVERSATIONS["prompt after turns"]["messages"][1:]
    expected = render(unmarked(name), messages, add_generation_prompt=True, **tokens, **FIXED)
    assert prompts[name].removeprefix("<|bos|>") == expected.removeprefix("<|bos|>")  # which it adds itself


def test_llama_cpp_knows_what_goes_before_a_template(gguf):
    tokenizer = get_chat_template(tokenizer_with(), "qwen-2.5", mapping=SHAREGPT, system_message='It\'s "so"\n\\n 🎻')
    expected = render(tokenizer, [USER], add_generation_prompt=True)
    case = {"jinja": strip_generation_marks(tokenizer.chat_template), "messages": [USER], "settings": {}}
    assert rendered(gguf, [case]) == [expected]
