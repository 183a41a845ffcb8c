"""Modelfiles: their Go templates against the Jinja ones, by a Go template engine in Python; stops; names."""

import datetime
import json
import os
import shutil
import subprocess
from pathlib import Path

import gotpl
import pytest
import tiny

from luthier.data.chat import CHAT_TEMPLATES, TABLE, get_chat_template
from luthier.data.render import render
from luthier.gguf import (
    MODEL_TO_OLLAMA_TEMPLATE_MAPPER,
    OLLAMA_TEMPLATES,
    GGUFFile,
    convert_to_gguf,
    create_ollama_model,
    create_ollama_modelfile,
)

CONVERSATIONS = json.loads((Path(__file__).parent / "renderings" / "conversations.json").read_text("utf8"))
STOPS = sorted({stop for template in TABLE for stop in template.stop_tokens if stop != "eos_token"} - {"<|im_end|>"})


@pytest.fixture
def tokenizer():
    tokenizer = tiny.tiny_tokenizer(extra_tokens=("<s>", "</s>", *STOPS))
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def turns_of(messages):
    """Messages as Ollama gives them to a template: consecutive ones of one role are one to it."""
    turns = []
    for message in messages:
        if turns and turns[-1]["Role"] == message["role"]:
            turns[-1]["Content"] += "\n\n" + message["content"]
        else:
            turns.append({"Role": message["role"], "Content": message["content"]})
    return turns


def rendering(template, turns):
    today = {"currentDate": lambda: datetime.date.today().isoformat()}
    return gotpl.render(template, {"Messages": turns, "Response": ""}, functions=today)


def ollama(template, messages):
    """What Ollama sends to the model, less the BOS that it adds."""
    return rendering(template, turns_of(messages))


def plain_conversations():
    """Those that Ollama can show: text alone, turns that alternate, no white space at the ends and no thoughts
    in the words, up to the last question."""
    for name, case in CONVERSATIONS.items():
        messages = case["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        roles = [message["role"] for message in messages]
        texts = [message.get("content") for message in messages]
        if not case.get("tools") and {*roles} <= {"system", "user", "assistant"} and all(isinstance(t, str) for t in texts):
            alternating = all(a != b for a, b in zip(roles, roles[1:], strict=False))
            if alternating and roles[-1:] == ["user"] and all(t == t.strip() and "<think>" not in t for t in texts):
                yield name, messages


@pytest.mark.parametrize("template", TABLE, ids=lambda template: template.name)
def test_go_templates_say_what_the_jinja_templates_say(template, tokenizer):
    tokenizer.chat_template = template.jinja
    compared = 0
    for name, messages in plain_conversations():
        try:
            expected = render(tokenizer, messages, add_generation_prompt=True, date_string="26 Jul 2024")
        except ValueError:  # the format has no such conversation
            continue
        assert ollama(OLLAMA_TEMPLATES[template.name], messages) == expected.removeprefix("<s>"), name
        compared += 1
    assert compared >= 6


GO_PROGRAM = """package main
import ("encoding/json"; "os"; "strings"; "text/template"; "time")
type Case struct { Template string; Data map[string]any }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    functions := template.FuncMap{"currentDate": func() string { return time.Now().Format("2006-01-02") }}
    results := []string{}
    for _, one := range cases {
        var out strings.Builder
        parsed := template.Must(template.New("").Funcs(functions).Parse(one.Template))
        if err := parsed.Execute(&out, one.Data); err != nil { panic(err) }
        results = append(results, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(results)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_the_engine_of_these_tests_renders_as_go_does(tmp_path):
    """Every template with every conversation that Ollama can show, and one that is to be continued, in real Go."""
    conversations = [messages for _, messages in plain_conversations()]
    conversations.append([{"role": "user", "content": '<Hi> & "you"'}, {"role": "assistant", "content": "He\u00e9"}])
    cases = [
        (template, turns_of(messages)) for template in sorted(set(OLLAMA_TEMPLATES.values())) for messages in conversations
    ]
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    given = json.dumps([{"Template": template, "Data": {"Messages": turns, "Response": ""}} for template, turns in cases])
    cache = {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    command = ["go", "run", str(tmp_path / "main.go")]
    found = subprocess.run(command, input=given, capture_output=True, text=True, env={**os.environ, **cache}, check=True).stdout
    assert len(cases) > 200
    different = [case for case, rendered in zip(cases, json.loads(found), strict=True) if rendered != rendering(*case)]
    assert different == []


def test_an_answer_that_has_begun_is_continued():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    assert ollama(OLLAMA_TEMPLATES["chatml"], messages).endswith("<|im_start|>assistant\nHe")


def test_every_name_and_every_model_has_a_template():
    assert OLLAMA_TEMPLATES.keys() == CHAT_TEMPLATES.keys()
    assert {*MODEL_TO_OLLAMA_TEMPLATE_MAPPER.values()} <= OLLAMA_TEMPLATES.keys()
    assert MODEL_TO_OLLAMA_TEMPLATE_MAPPER["Qwen/Qwen2.5-7B-Instruct"] == "qwen-2.5"


def modelfile(tokenizer, tmp_path, **options):
    (tmp_path / "model-Q8_0.gguf").touch()
    return create_ollama_modelfile(tokenizer, tmp_path / "model-Q8_0.gguf", **options)


@pytest.mark.parametrize("name", [template.name for template in TABLE])
def test_modelfiles_name_file_template_and_stops(name, tokenizer, tmp_path):
    get_chat_template(tokenizer, name)
    text = modelfile(tokenizer, tmp_path, parameters={"temperature": 0.5})
    lines = text.splitlines()
    assert lines[0] == "FROM ./model-Q8_0.gguf" and "PARAMETER temperature 0.5" in lines
    template = text.split('"""')[1]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hm"}]
    expected = render(tokenizer, messages, add_generation_prompt=True, date_string="26 Jul 2024").removeprefix("<s>")
    assert ollama(template, messages) == expected
    for stop in CHAT_TEMPLATES[name].stop_tokens:
        assert f'PARAMETER stop "{tokenizer.eos_token if stop == "eos_token" else stop}"' in lines


def test_a_template_of_a_tokenizers_own_is_recognised_by_what_it_renders(tmp_path):
    text = modelfile(tiny.tiny_tokenizer(), tmp_path)
    assert OLLAMA_TEMPLATES["chatml"] in text
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text


def test_a_system_message_of_the_template_becomes_one_of_the_modelfile(tokenizer, tmp_path):
    for name in ("chatml", "qwen-2.5", "llama-3.1", "mistral"):
        get_chat_template(tokenizer, name, system_message="You build lutes.")
        assert 'SYSTEM """You build lutes."""' in modelfile(tokenizer, tmp_path)
    assert 'SYSTEM """Another."""' in modelfile(tokenizer, tmp_path, system="Another.")


def test_a_stop_token_that_the_vocabulary_lacks_is_replaced(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    with pytest.warns(UserWarning, match="no token of this vocabulary"):
        get_chat_template(tokenizer, "gemma-3")
    text = modelfile(tokenizer, tmp_path)
    assert "<end_of_turn>" not in text and "<start_of_turn>model" in text and 'stop "<|endoftext|>"' in text


def test_an_unknown_template_is_left_to_the_jinja_in_the_file(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[assistant]"
    text = modelfile(tokenizer, tmp_path)
    assert "TEMPLATE " not in text.replace("No TEMPLATE", "") and 'PARAMETER stop "</s>"' in text


def test_the_gguf_file_names_every_stop_token(tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0")
    metadata = GGUFFile(file).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 2 and metadata["tokenizer.ggml.eot_token_id"] == 4


@pytest.mark.parametrize("content", ['{"eos_token_id": 4', "[]", '{"eos_token_id": [4, 99999]}', '{"eos_token_id": "<s>"}'])
def test_a_broken_generation_config_is_named(content, tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json is damaged"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0")


def test_missing_files_are_named(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing.gguf does not exist"):
        create_ollama_modelfile(tokenizer, tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match="Modelfile does not exist"):
        create_ollama_model("lute", tmp_path / "Modelfile")
    (tmp_path / "Modelfile").write_text(modelfile(tokenizer, tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'ollama' is not installed"):
        create_ollama_model("lute", tmp_path / "Modelfile")
    program = tmp_path / "ollama"
    program.write_text(f'#!/bin/sh\necho "$PWD $@" > {tmp_path}/called\n')
    program.chmod(0o755)
    create_ollama_model("lute", tmp_path / "Modelfile")
    assert (tmp_path / "called").read_text() == f"{tmp_path} create lute -f Modelfile\n"
