"""The main demo: QLoRA fine-tuning from chat rows to GGUF, the real pipeline on a model small enough for any machine.

The base (``base``, a Llama of 7 M parameters, see make_base.py) has read Python's standard library and nothing else. It
cannot chat. A few hundred rows later it says which arguments a function takes, of functions it has never seen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.config import SFTRecipe
from luthier.data.chat import get_chat_template
from luthier.data.read import read_dataset
from luthier.demo import llama_cpp
from luthier.fast import FastLanguageModel
from luthier.rl.sampling import SamplingParams
from luthier.terminal import say, table
from luthier.workflows import sft

HERE = Path(__file__).parent
BASE, TRAIN, HELD_OUT = HERE / "base", HERE / "data" / "train.jsonl", HERE / "data" / "held_out.jsonl"
ANSWER_TOKENS = 48
SMALL = {"learning_rate": 2e-3, "num_train_epochs": 6, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
LARGE = {"learning_rate": 2e-4, "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def run(output: str | Path = "outputs/demo", model: str | None = None) -> dict[str, float]:
    """Fine-tune the embedded base, or ``model``; gives the share of held-out rows answered exactly, by stage."""
    base = model or str(BASE)
    rows = read_dataset(HELD_OUT)
    scores: dict[str, float] = {}

    # 1. What the base can do, in NF4
    say(f"1. {base} answers {len(rows)} held-out rows")
    scores["base"] = score(rows, *loaded(base))

    # 2. The same run as `luthier sft` makes of a recipe
    say(f"2. It is fine-tuned on {len(read_dataset(TRAIN))} rows")
    recipe = SFTRecipe(
        model=base,
        data=str(TRAIN),
        output=str(output),
        max_seq_length=512,
        chat_template=None if model else "chatml",
        logging_steps=10,
        save_method="merged_16bit",
        base="nf4",
        gguf=["q8_0"],
        **(LARGE if model else SMALL),
    )
    written = sft.run(recipe)

    # 3. What was written, each read back: the adapter, the merged model in plain transformers, the GGUF in llama.cpp
    say("3. What was written is read back")
    scores["adapter"] = score(rows, *loaded(str(written["adapter"])))
    scores["merged, in plain transformers"] = exact(rows, plain_answers(written["merged_16bit"], rows))
    if llama_cpp.available():
        scores["GGUF q8_0, in llama.cpp"] = exact(rows, llama_cpp.answers(written["q8_0"], questions(rows), ANSWER_TOKENS))
    else:
        say("No llama.cpp is installed (pip install xllamacpp), so the GGUF file is not run here.")

    table("Held-out rows answered exactly", ("model", "share"), [(name, f"{share:.0%}") for name, share in scores.items()])
    for kind, path in written.items():
        say(f"{kind}: {path}")
    return scores


def loaded(name: str):
    """Model and tokenizer in NF4, with a chat template."""
    model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=512)
    return model, tokenizer if tokenizer.chat_template else get_chat_template(tokenizer, "chatml")


def questions(rows: Dataset) -> list[list[dict]]:
    return [row["messages"][:-1] for row in rows]


def exact(rows: Dataset, answers: list[str]) -> float:
    """Share of answers that are the reference to the letter."""
    return sum(answer.strip() == row["messages"][-1]["content"] for row, answer in zip(rows, answers, strict=True)) / len(rows)


def score(rows: Dataset, model, tokenizer) -> float:
    model.fast_generate.keywords["tokenizer"] = tokenizer
    outputs = model.fast_generate(questions(rows), SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS), batch_size=50)
    return exact(rows, [output.outputs[0].text for output in outputs])


def plain_answers(directory: Path, rows: Dataset) -> list[str]:
    """Greedy answers by plain transformers, as anyone would get them from the merged directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map="auto")
    answers = []
    for batch in torch.arange(len(rows)).split(50):
        prompts = [questions(rows)[index] for index in batch.tolist()]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
