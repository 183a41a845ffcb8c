"""``luthier chat``: talk to a model or an adapter in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
from transformers import TextStreamer
from tyro.conf import Positional, arg

from luthier.fast import FastLanguageModel
from luthier.model.rope import native_length
from luthier.rl.engine import stop_token_ids
from luthier.terminal import say
from luthier.workflows.inspect import config_of
from luthier.workflows.templates import with_template

LONGEST = 8192


def chat(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    prompt: str | None = None,
    system: str | None = None,
    chat_template: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    load_in_16bit: bool = False,
    max_seq_length: int | None = None,
    seed: int = 3407,
) -> None:
    """Talk to a model or an adapter; an empty line or Ctrl-D ends it.

    Args:
        model: Hub id, directory of a model, or directory of an adapter.
        prompt: Answer this one message and end.
        system: System message.
        chat_template: Chat template by name or .jinja file. Default: the tokenizer's own, else chatml.
        max_new_tokens: Longest answer in tokens, where so many fit.
        temperature: 0 is greedy.
        top_p: Nucleus.
        load_in_16bit: 16-bit weights instead of NF4.
        max_seq_length: Longest conversation in tokens. Default: the model's native length, at most 8192.
        seed: Seed of the sampling.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or above")
    max_seq_length = max_seq_length or min(native_length(config_of(model)) or LONGEST, LONGEST)
    loaded, tokenizer = FastLanguageModel.from_pretrained(model, max_seq_length, load_in_16bit=load_in_16bit)
    tokenizer = with_template(tokenizer, chat_template)
    FastLanguageModel.for_inference(loaded)
    torch.manual_seed(seed)
    stops = stop_token_ids(loaded, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    conversation = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        say("An empty line or Ctrl-D ends the conversation.")

    for message in [prompt] if prompt is not None else iter(_ask, ""):
        conversation.append({"role": "user", "content": message})
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(loaded.device)
        length = inputs["input_ids"].shape[1]
        if length >= max_seq_length:
            raise ValueError(
                f"The conversation is {length} tokens long and leaves no room for an answer in max_seq_length="
                f"{max_seq_length}: start anew or raise --max-seq-length"
            )
        output = loaded.generate(
            **inputs,
            max_new_tokens=min(max_new_tokens, max_seq_length - length),
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        answer = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": answer.strip()})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
