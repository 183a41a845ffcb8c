"""The chat templates of ``luthier.data.chat`` in Go's template language, as Ollama's Modelfile takes them.

Ollama gives a template ``.Messages`` (each with ``.Role`` and ``.Content``), and adds the tokenizer's BOS itself. Its
functions cannot trim text, so messages must come without white space around them. Tools are left out on purpose: for a
request with tools Ollama then takes the Jinja template in the GGUF file, which is exact.

A template here is a row of strings around the turns; `go` writes the Go text. Literal text stands in quotes inside of
actions, because white space outside of them would depend on trimming marks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from luthier.data.chat import CHAT_TEMPLATES

# the owners' tokens, where a template ends a turn with the tokenizer's own
DEFAULT_EOS, DEFAULT_BOS = "</s>", "<s>"


@dataclass(frozen=True)
class Turns:
    """What stands around each message: (before, after). ``{eos}`` and ``{bos}`` stand for the tokenizer's tokens.

    ``system`` None: never a turn of its own. ``head`` (Go, before the turns) and ``first_user``/``last_user`` (Go, behind the
    header of the first or last user message) may show a system message that comes first. ``opens``: what an answer begins
    with and the prompt does not, such as a space. ``prompt``: what asks for an answer, the assistant's header unless given
    (Go).
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    opens: str = ""
    prompt: str | None = None
    head: str = ""
    first_user: str = ""
    last_user: str = ""
    system_in_head: bool = False  # `head` shows the first message if that is the system's
    empty_system: bool = True  # a system message without text is shown, too
    later_bos: bool = False  # every question but the first begins with BOS; Ollama writes the first one


def text(literal: str) -> str:
    """Literal text as a Go action; nothing for the empty text."""
    return "{{ " + json.dumps(literal, ensure_ascii=False) + " }}" if literal else ""


SYSTEM = "{{ (index $.Messages 0).Content }}"  # of a conversation that begins with a system message


def show_system(before: str = "", after: str = "", default: str | None = None, empty: bool = True) -> str:
    """Go for a conversation's first message if that is the system's (and not ``empty``), or for a default text."""
    otherwise = "" if default is None else "{{ else }}" + text(before + default + after)
    found = 'eq (index $.Messages 0).Role "system"'
    found = found if empty else f"and ({found}) (index $.Messages 0).Content"
    return "{{ if " + found + " }}" + text(before) + SYSTEM + text(after) + otherwise + "{{ end }}"


def _roles(header: str, end: str, assistant: str = "assistant") -> dict:
    """All three roles with one form of header, ``{}`` standing for the role."""
    named = {"system": "system", "user": "user", "assistant": assistant}
    return {role: (header.replace("{}", name), end) for role, name in named.items()}


IM = _roles("<|im_start|>{}\n", "<|im_end|>\n")
HEADERS = _roles("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = Turns(
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
    first_user=show_system(after="\n\n"),
)
PHI_3 = Turns(**_roles("<|{}|>\n", "<|end|>\n"))
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_3_1 = Turns(
    **HEADERS,
    system_in_head=True,
    head=text(HEADERS["system"][0] + DATES) + show_system() + text("<|eot_id|>"),
)
QUIET = "{{ if and $.IsThinkSet (not $.Think) }}" + text("<think>\n\n</think>\n\n") + "{{ end }}"
GEMMA_4 = _roles("<|turn>{}\n", "<turn|>\n", "model")
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: ",
    "\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>",
)
VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)

TURNS: dict[str, Turns] = {
    "chatml": Turns(**IM),
    "yi-chat": Turns(**IM),
    "alpaca": Turns(
        user=("\n\n### Instruction:\n", ""),
        assistant=("\n\n### Response:\n", "{eos}"),
        head=show_system(
            default="Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
    ),
    "vicuna": Turns(
        user=("USER: ", " "),
        assistant=("ASSISTANT:", "{eos}"),
        opens=" ",
        head=show_system(after=" ", default=VICUNA.replace("{}", "user")),
    ),
    "vicuna_old": Turns(
        user=("### Human: ", "\n"),
        assistant=("### Assistant:", "{eos}\n"),
        opens=" ",
        head=show_system(after="\n", default=VICUNA.replace("{}", "human")),
    ),
    "zephyr": Turns(**_roles("<|{}|>\n", "{eos}\n")),
    "mistral": Turns(("[INST] ", "[/INST]"), ("", "{eos}"), opens=" ", last_user=show_system(after="\n\n")),
    "mistral-nemo": Turns(("[INST]", "[/INST]"), ("", "{eos}"), last_user=show_system(after="\n\n")),
    "llama": Turns(
        user=("[INST] ", " [/INST]"),
        assistant=("", " {eos}"),
        opens=" ",
        first_user=show_system("<<SYS>>\n", "\n<</SYS>>\n\n"),
        later_bos=True,
    ),
    "llama-3": Turns(**HEADERS),
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_1,
    "llama-3.3": LLAMA_3_1,
    "gemma": GEMMA,
    "gemma-2": GEMMA,
    "gemma-3": GEMMA,
    "gemma-3n": GEMMA,
    "gemma-4": Turns(**GEMMA_4, prompt=text("<|turn>model\n<|channel>thought\n<channel|>")),
    "gemma-4-e4b": Turns(**GEMMA_4),
    "phi-3": PHI_3,
    "phi-3.5": replace(PHI_3, empty_system=False),
    "phi-4": Turns(**_roles("<|im_start|>{}<|im_sep|>", "<|im_end|>")),
    "qwen-2.5": Turns(
        **IM,
        system_in_head=True,
        head=show_system(*IM["system"], default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ),
    "qwen-3": Turns(**IM, prompt=text("<|im_start|>assistant\n") + QUIET),
    "qwen3-instruct": Turns(**IM),
    "qwen3-thinking": Turns(**IM, prompt=text("<|im_start|>assistant\n<think>\n")),
    "gpt-oss": Turns(
        user=("<|start|>user<|message|>", "<|end|>"),
        assistant=("<|start|>assistant<|channel|>final<|message|>", "<|end|>"),
        prompt=text("<|start|>assistant"),
        head=text(HARMONY[0])
        + "{{ currentDate }}"
        + text(HARMONY[1])
        + show_system("<|start|>developer<|message|># Instructions\n\n", "\n\n<|end|>", empty=False),
    ),
    "starling": Turns(
        system=("GPT4 Correct System: ", "<|end_of_turn|>"),
        user=("GPT4 Correct User: ", "<|end_of_turn|>"),
        assistant=("GPT4 Correct Assistant:", "<|end_of_turn|>"),
        opens=" ",
    ),
    "lfm-2": Turns(**IM, empty_system=False),
}


def go(turns: Turns, eos_token: str = DEFAULT_EOS, bos_token: str = DEFAULT_BOS) -> str:
    """The Go template of ``turns``. A conversation that ends with an assistant's message is continued, not closed."""
    before, after = turns.user
    question = text(before) + (turns.first_user and "{{ if $first }}" + turns.first_user + "{{ end }}")
    question += (turns.last_user and "{{ if $last }}" + turns.last_user + "{{ end }}") + "{{ .Content }}" + text(after)
    if turns.later_bos:
        question = "{{ if not $first }}" + text("{bos}") + "{{ end }}" + question
    before, after = turns.assistant
    answer = text(before + turns.opens) + "{{ .Content }}{{ if not $last }}" + text(after) + "{{ end }}"
    lines = [
        turns.head,
        "{{ $first := true }}",
        "{{ range $i, $_ := .Messages }}",
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{ if eq .Role "user" }}' + question + "{{ $first = false }}",
        '{{ else if eq .Role "assistant" }}' + answer,
    ]
    if turns.system:
        shown = '(eq .Role "system")' + " $i" * turns.system_in_head + " .Content" * (not turns.empty_system)
        lines.append("{{ else if and " + shown + " }}" + text(turns.system[0]) + "{{ .Content }}" + text(turns.system[1]))
    prompt = text(turns.assistant[0]) if turns.prompt is None else turns.prompt
    lines += ["{{ end }}", prompt and '{{ if and $last (ne .Role "assistant") }}' + prompt + "{{ end }}", "{{ end }}"]
    body = "\n".join(line.replace("{{ ", "{{- ").replace(" }}", " -}}") for line in lines if line)
    return body.replace("{eos}", eos_token).replace("{bos}", bos_token)


OLLAMA_TEMPLATES: Mapping[str, str] = {
    spelling: go(TURNS[template.name]) for spelling, template in CHAT_TEMPLATES.items() if template.name in TURNS
}
"""Go template by the name of a chat template (any spelling); turns that end with the tokenizer's EOS end with ``</s>``."""


# chat template -> models whose own format it is
_MODELS = {
    "llama-3.1": "meta-llama/Llama-3.1-{8B,70B,405B}-Instruct meta-llama/Meta-Llama-3.1-{8B,70B,405B}-Instruct",
    "llama-3.2": "meta-llama/Llama-3.2-{1B,3B}-Instruct meta-llama/Llama-3.2-{11B,90B}-Vision-Instruct",
    "llama-3.3": "meta-llama/Llama-3.3-{70B}-Instruct",
    "llama-3": "meta-llama/Meta-Llama-3-{8B,70B}-Instruct",
    "llama": "meta-llama/Llama-2-{7b,13b,70b}-chat-hf",
    "mistral": "mistralai/Mistral-7B-Instruct-{v0.3} mistralai/Mixtral-{8x7B,8x22B}-Instruct-v0.1",
    "mistral-nemo": "mistralai/Mistral-{Nemo}-Instruct-2407",
    "qwen-2.5": "Qwen/Qwen2.5-{0.5B,1.5B,3B,7B,14B,32B,72B}-Instruct Qwen/Qwen2.5-Coder-{0.5B,1.5B,3B,7B,14B,32B}-Instruct",
    "qwen-3": "Qwen/Qwen3-{0.6B,1.7B,4B,8B,14B,32B,30B-A3B,235B-A22B}",
    "qwen3-instruct": "Qwen/Qwen3-{4B,30B-A3B,235B-A22B}-Instruct-2507",
    "qwen3-thinking": "Qwen/Qwen3-{4B,30B-A3B,235B-A22B}-Thinking-2507",
    "gemma": "google/gemma-{2b,7b}-it google/gemma-1.1-{2b,7b}-it",
    "gemma-2": "google/gemma-2-{2b,9b,27b}-it",
    "gemma-3": "google/gemma-3-{270m,1b,4b,12b,27b}-it",
    "gemma-3n": "google/gemma-3n-{E2B,E4B}-it",
    "gemma-4": "google/gemma-4-{26B-A4B,31B}-it",
    "gemma-4-e4b": "google/gemma-4-{E2B,E4B}-it",
    "phi-3": "microsoft/Phi-3-{mini-4k,mini-128k,medium-4k,medium-128k}-instruct",
    "phi-3.5": "microsoft/Phi-3.5-{mini}-instruct",
    "phi-4": "microsoft/{phi-4}",
    "gpt-oss": "openai/gpt-oss-{20b,120b}",
    "zephyr": "HuggingFaceH4/zephyr-7b-{alpha,beta}",
    "starling": "Nexusflow/Starling-LM-7B-{beta} openchat/openchat-{3.5-0106}",
    "yi-chat": "01-ai/Yi-{6B,34B}-Chat",
    "lfm-2": "LiquidAI/LFM2-{350M,700M,1.2B,2.6B}",
    "vicuna": "lmsys/vicuna-{7b,13b}-v1.5",
}


def _expanded(pattern: str) -> list[str]:
    before, rest = pattern.split("{")
    choices, after = rest.split("}")
    return [before + choice + after for choice in choices.split(",")]


MODEL_TO_OLLAMA_TEMPLATE_MAPPER: Mapping[str, str] = {
    model: name for name, patterns in _MODELS.items() for pattern in patterns.split() for model in _expanded(pattern)
}
"""Chat template by the name of a model on the Hub."""
