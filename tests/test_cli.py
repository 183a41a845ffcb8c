"""The command line: every command, flags over files; bad input gets exit code 2, one message, and nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tiny
import torch
import yaml
from huggingface_hub import errors as hub_errors
from transformers import AutoModelForCausalLM

import luthier
from luthier import cli, files
from luthier.config import SFTRecipe
from luthier.terminal import say, table
from luthier.workflows.common import save_outputs

RUN = ("--max-steps", "2", "--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Run a command line in this process."""

    def run(*arguments) -> Result:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return run


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and what ``luthier sft`` made of them."""
    place = tmp_path_factory.mktemp("cli")
    tiny.save_tiny("llama3", place / "model")
    rows = write_rows(place / "rows.jsonl", [chat(f"What is {n} plus 1?", f"It is {n + 1}.") for n in range(8)])
    recipe = {"model": str(place / "model"), "data": str(rows), "output": str(place / "out"), "r": 4, "max_steps": 100}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = (*RUN, "--save-steps", "1", "--save-method", "merged_16bit", "--gguf", "q8_0", "--r", "8")
    assert cli.main(["sft", str(place / "recipe.yaml"), *flags]) == 0
    return place


# --- every command ---------------------------------------------------------------------------------------------------


def test_flags_go_over_the_recipe(place):
    config = json.loads((place / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8  # the recipe says 4
    state = json.loads((place / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["max_steps"] == 2  # the recipe says 100


def test_what_sft_wrote(place):
    written = json.loads((place / "out" / "written.json").read_text())
    assert set(written) == {"adapter", "merged_16bit", "q8_0"}
    assert all(Path(path).exists() for path in written.values())
    merged = AutoModelForCausalLM.from_pretrained(written["merged_16bit"])
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])


def test_an_interrupted_run_says_how_it_goes_on(place, run, monkeypatch):
    shutil.copytree(place / "out" / "checkpoint-1", place / "again" / "checkpoint-1")
    flags = ("--model", place / "model", "--data", place / "rows.jsonl", "--output", place / "again", "--r", 8)
    command = ("sft", *flags, *RUN, "--save-steps", 1, "--resume")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trl.SFTTrainer.training_step", interrupted)
        stopped = run(*command, "latest")
    assert stopped.code == 130 and f"Stopped. --resume goes on from {place / 'again' / 'checkpoint-1'}" in stopped.err
    result = run(*command, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {"adapter": str(place / "again" / "adapter")}
    state = json.loads((place / "again" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]][:2] == [1, 2]


def test_dry_run(place, run):
    result = run("sft", place / "recipe.yaml", "--output", place / "dry", "--dry-run", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["rows"] == told["ledger"]["rows_in"] == 8 and told["memory"]["total"] > 0 and told["compute"] == "bf16"
    assert "Memory on the device" in result.err and "rows that train" in result.err
    assert not (place / "dry").exists()


def test_a_system_message_is_counted_and_no_template_is_exchanged_for_it(place, run):
    """The run and the dry run take the same template."""
    dry = ("sft", place / "recipe.yaml", "--output", place / "dry", "--dry-run", "--json")
    message = ("--system-message", "You are a careful luthier who answers in one line.")
    longest = [json.loads(run(*dry, "--chat-template", "chatml", *more).out)["ledger"]["longest"] for more in ((), message)]
    assert longest[1] > longest[0]
    for command in (dry, (*dry[:4], *RUN)):
        refused = run(*command, *message)
        assert refused.code == 2 and "--chat-template" in refused.err


def test_a_template_that_nobody_chose_is_named(place, run, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    result = run("sft", place / "recipe.yaml", "--model", tmp_path / "model", "--output", tmp_path / "dry", "--dry-run")
    assert result.code == 0 and "chatml is used" in result.err


def test_dry_run_of_grpo(place, run, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def short(completions, **columns):\n    return [-len(c[0]['content']) for c in completions]\n")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "Say it."}]}] * 8)
    common = ("--model", place / "model", "--output", tmp_path / "out", "--dry-run", "--json")
    told = run("grpo", *common, "--data", prompts, "--rewards", f"{rewards}:short")
    assert told.code == 0, told.err
    assert json.loads(told.out)["rewards"] == ["short"]


def test_dry_run_knows_which_workflow_a_model_is_for(place, run):
    result = run("vision", "--model", place / "model", "--data", place / "rows.jsonl", "--dry-run")
    assert result.code == 2 and "text model" in result.err


def test_a_warning_is_one_line(place):
    """The model has 512 positions."""
    command = [sys.executable, "-m", "luthier", "chat", place / "model", "--prompt", "Hi?", "--max-new-tokens", "1"]
    done = subprocess.run([*command, "--max-seq-length", "1024"], capture_output=True, text=True)
    warned = [line for line in done.stderr.splitlines() if "512" in line]
    assert done.returncode == 0 and len(warned) == 1 and warned[0].startswith("Warning: "), done.stderr


FORMATS = {
    "messages.jsonl": [chat("Hi?", "Yes.")],
    "sharegpt.jsonl": [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}],
    "alpaca.json": [{"instruction": "Hi?", "input": "", "output": "Yes."}],
    "pairs.csv": "prompt,completion\nHi?,Yes.\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_inspect(place, run, tmp_path, name):
    """The answer and its stop token train, whatever the format, on the terminal and for machines."""
    path, rows = tmp_path / name, FORMATS[name]
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    shown = run("inspect", path, "--model", place / "model")
    assert shown.code == 0, shown.err
    stop = "<|endoftext|>" if name == "pairs.csv" else "<|im_end|>"  # text that goes on has no turns
    assert f"⟦Yes.{stop}⟧" in shown.out and "rows that train" in shown.err
    told = json.loads(run("inspect", path, "--model", place / "model", "--json").out)
    assert told["ledger"]["rows_in"] == 1 and len(told["rows"]) == 1


def test_inspect_without_a_model_uses_the_embedded_one(place, run):
    result = run("inspect", place / "rows.jsonl", "--rows", 0)
    assert result.code == 0 and "embedded demo model" in result.err and "rows that train" in result.err


def test_pictures_are_never_left_out_in_silence(place, run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{**chat("What is it?", "A cat."), "image": "cat.png"}])
    shown = run("inspect", rows, "--model", place / "model")
    assert shown.code == 0 and "'image' is not shown" in shown.err and "luthier vision" in shown.err
    model, text = ("--model", place / "model"), ("--data", place / "rows.jsonl")
    for command in (
        ("eval", place / "model", "--data", rows),
        ("sft", *model, "--data", rows, "--output", tmp_path / "out"),
        ("sft", *model, "--data", rows, "--output", tmp_path / "out", "--dry-run"),
        ("sft", *model, *text, "--eval-data", rows, "--output", tmp_path / "out", "--dry-run"),
    ):
        result = run(*command)
        assert result.code == 2 and f"{rows} has a column 'image'" in result.err, command
    assert not (tmp_path / "out").exists()


def test_estimate(place, run):
    result = run("estimate", place / "model", "--json")
    assert result.code == 0, result.err
    small, large = json.loads(result.out), json.loads(run("estimate", place / "model", "--full-finetuning", "--json").out)
    assert small["total"] == sum(size for name, size in small.items() if name != "total")
    assert large["optimizer"] > small["optimizer"]
    assert "total" in run("estimate", place / "out" / "adapter").err  # of an adapter: its base


def test_doctor(run):
    result = run("doctor")
    assert result.code in (0, 1) and "transformers" in result.err
    findings = {finding["what"]: finding for finding in json.loads(run("doctor", "--json").out)}
    assert findings["torch"]["found"] == importlib.metadata.version("torch")
    assert findings["vllm (optional)"]["remedy"] in ("", 'pip install "luthier[vllm]"')


def test_every_command_takes_a_yaml_file_with_flags_over_it(place, run, tmp_path):
    """A training recipe too: what another command has no use for is left alone."""
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: {place / 'model'}\nr: 4\nlearning_rate: 2e-4\nuse_gradient_checkpointing: true\n")
    four = json.loads(run("estimate", recipe, "--json").out)
    eight = json.loads(run("estimate", recipe, "--r", "8", "--json").out)
    assert four["adapter"] * 2 == eight["adapter"]
    flags = ("--r", "4", "--use-gradient-checkpointing", "true", "--json")
    assert four == json.loads(run("estimate", place / "model", *flags).out)
    recipe.write_text(f"file: {place / 'rows.jsonl'}\nrows: 1\njson: true\n")
    shown = run("inspect", recipe)
    assert shown.code == 0, shown.err
    assert len(json.loads(shown.out)["rows"]) == 1


@pytest.mark.parametrize(
    ("text", "words"), [("rose: 4", ["'rose'", "'rows'"]), ("rows: many", ["rows = 'many'"]), ("[1]", ["list"])]
)
def test_a_yaml_file_that_a_command_cannot_use(run, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text + "\n")
    result = run("inspect", tmp_path / "run.yaml")
    assert result.code == 2 and all(word in result.err for word in words), result.err


def test_doctor_names_the_command_that_mends(run, monkeypatch):
    from luthier.workflows import doctor

    real, found = doctor.installed, {"peft": "0.1", "numba": None}
    monkeypatch.setattr(doctor, "installed", lambda package: found[package] if package in found else real(package))
    result = run("doctor", "--json")
    assert result.code == 1
    remedies = {f["what"]: f["remedy"] for f in json.loads(result.out)}
    assert remedies["peft"] == 'pip install "peft>=0.21"'
    assert remedies["numba (optional)"] == 'pip install "luthier[gguf]"'


def test_merge(place, run, tmp_path):
    result = run("merge", place / "out" / "adapter", "--output", tmp_path / "merged", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {"merged_16bit": str(tmp_path / "merged")}
    names = ("merged_16bit", "model.safetensors")
    assert (tmp_path / "merged" / names[1]).read_bytes() == (place / "out" / Path(*names)).read_bytes()


def test_merge_that_merges_nothing_is_refused(place, run, tmp_path):
    result = run("merge", place / "out" / "adapter", "--output", tmp_path / "merged", "--save-method", "lora")
    assert result.code == 2 and not (tmp_path / "merged").exists()


def test_gguf_of_a_model_and_of_an_adapter(place, run, tmp_path):
    result = run("gguf", place / "model", "--quant", "q8_0, f16", "--output", tmp_path / "model", "--json")
    assert result.code == 0, result.err
    paths = [Path(path) for path in json.loads(result.out).values()]
    assert sorted(path.stem.rsplit("-")[-1] for path in paths) == ["F16", "Q8_0"]
    assert all(path.read_bytes()[:4] == b"GGUF" for path in paths)
    assert run("verify", paths[0], "--against", place / "model").code == 0
    other = tiny.save_tiny("llama3", tmp_path / "other", seed=1)
    refused, told = (run("verify", paths[0], "--against", other, *more) for more in ((), ("--json",)))
    failures = json.loads(told.out)["failures"]
    assert refused.code == told.code == 1 and len(failures) > 10
    assert refused.err.count("FAILED") == 11 and f"and {len(failures) - 10} more" in refused.err
    adapter = run("verify", paths[0], "--against", place / "out" / "adapter")
    assert adapter.code == 2 and "is an adapter: merge it first (luthier merge" in adapter.err

    result = run("gguf", place / "out" / "adapter", "--quant", "f16", "--output", tmp_path / "adapter", "--json")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)) == 1


def test_chat(place, run, monkeypatch):
    result = run("chat", place / "out" / "adapter", "--prompt", "Hello?", "--max-new-tokens", 4, "--temperature", 0)
    assert result.code == 0, result.err
    again = run("chat", place / "out" / "adapter", "--prompt", "Hello?", "--max-new-tokens", 4, "--temperature", 0)
    assert result.out == again.out and result.out.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\nAnd now?\n\n"))
    talk = run("chat", place / "model", "--max-new-tokens", 4, "--load-in-16bit")
    assert talk.code == 0 and "ends the conversation" in talk.err


def test_eval_compares_base_and_tuned(place, run):
    result = run("eval", place / "out" / "adapter", "--data", place / "rows.jsonl", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert "base" in result.out and "tuned" in result.out, report
    shown = run("eval", place / "model", "--data", place / "rows.jsonl", "--load-in-16bit")
    assert shown.code == 0 and "perplexity" in shown.err


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.RECIPES)
def test_help_of_a_workflow_describes_every_field(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(command, "--help")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    from luthier.config import schema

    properties = json.loads(schema(cli.RECIPES[command]))["properties"]
    for name in (entry.name for entry in dataclasses.fields(cli.RECIPES[command])):
        assert f"--{name.replace('_', '-')}" in text
        assert properties[name]["description"].split(". ")[0] in text, name
    assert "--dry-run" in text and "--json" in text


@pytest.mark.parametrize("command", cli.FUNCTIONS)
def test_help_of_a_command_describes_every_flag(run, command):
    result = run(command, "--help")
    assert result.code == 0
    lines = [line.strip("│ ") for line in result.out.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("--"):  # a description stands behind the flag, or in the next line
            described = line.partition("  ")[2] or lines[number + 1]
            assert described and not described.startswith(("--", "(default")), line


def test_usage(run):
    assert run().code == 2 and run("--help").code == 0
    assert all(f"\n  {command} " in run("--help").out for command in (*cli.RECIPES, *cli.FUNCTIONS))
    assert run("--version").out.strip() == luthier.__version__


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stf"], "Unknown command 'stf'. Did you mean 'sft'?"),
        (["sft", "--learning-rat", "1"], "--learning-rate"),
        (["sft", "--r", "many"], "--r"),
        (["sft"], "does not say: model, data"),
        (["sft", "none.yaml"], "There is no recipe 'none.yaml'"),
        (["inspect"], "required"),
        (["merge", "."], "adapter_config.json"),
        (["demo", "--grpo", "--vision"], "choose one"),
    ],
)
def test_wrong_usage(run, arguments, told):
    result = run(*arguments)
    assert result.code == 2 and told in " ".join(result.err.split()) and not result.out


def test_the_nearest_key_is_suggested(place, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("modle: x\n")
    result = run("sft", tmp_path / "recipe.yaml")
    assert result.code == 2 and "Did you mean 'model'?" in result.err and "recipe.yaml" in result.err


def test_a_reader_that_leaves_early(place):
    """As in ``luthier sft --help | head -1``."""
    command = f"{sys.executable} -m luthier sft --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "u" and not done.stderr


def test_as_a_module(place):
    """In its own process: results on standard output, talk on standard error, no traceback for bad input."""
    command = [sys.executable, "-m", "luthier"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, luthier.__version__ + "\n")
    bad = subprocess.run([*command, "inspect", place / "none.jsonl"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("Error: There is no file") and "Traceback" not in bad.stderr


# --- bad input -------------------------------------------------------------------------------------------------------


def broken_models(place: Path) -> None:
    """Directories beside the good model, each broken in one way."""
    for name in ("no-weights", "truncated", "pickled", "strange", "no-config", "bad-json"):
        shutil.copytree(place / "model", place / name)
    for name in ("no-weights", "pickled"):
        (place / name / "model.safetensors").unlink()
    (place / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    os.truncate(place / "truncated" / "model.safetensors", 10_000)
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "strange" / "config.json").write_text(json.dumps(config | {"model_type": "hyperion"}))
    (place / "no-config" / "config.json").unlink()
    (place / "bad-json" / "config.json").write_text("{")


def broken_rows(place: Path) -> None:
    good = chat("What is it?", "It is it.")
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good) + "\n{'no': 'json'}\n")
    write_rows(place / "unanswered.jsonl", [good, {"messages": good["messages"][:1]}])
    write_rows(place / "role.jsonl", [good, {"messages": [{"role": "wizard", "content": "Abracadabra."}, *good["messages"]]}])
    write_rows(place / "mixed.jsonl", [good, {"instruction": "What is it?", "output": "It is it."}])
    write_rows(place / "columns.jsonl", [{"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}])
    write_rows(place / "nothing.jsonl", [{"a": 1}])
    write_rows(place / "silent.jsonl", [chat("What is it?", "", role="") | {}] * 3)
    (place / "rows.txt").write_text("What is it?")


@pytest.fixture(scope="module")
def broken(place):
    broken_models(place)
    broken_rows(place)
    (place / "a-file").write_text("")
    (place / "no-checkpoint").mkdir()
    return place


# what is given over a recipe that is right -> what the message holds
BAD = {
    "unknown template": (["--chat-template", "lama-3"], ["'lama-3'", "Did you mean 'llama-3'?", "chatml"]),
    "missing template file": (["--chat-template", "PLACE/none.jinja"], ["none.jinja"]),
    "unknown target module": (["--target-modules", "q_prj"], ["'q_prj'", "Did you mean 'q_proj'?", "down_proj"]),
    "unknown module to save": (["--modules-to-save", "lm_hed"], ["'lm_hed'", "Did you mean 'lm_head'?"]),
    "r=0": (["--r", "0"], ["r is 0", "at least 1"]),
    "two precisions": (["--load-in-4bit", "True", "--load-in-8bit"], ["load_in_4bit and load_in_8bit", "choose one"]),
    "unknown GGUF type": (["--gguf", "q9"], ["'q9'", "q8_0"]),
    "unknown optimizer": (["--optim", "adamw_8bits"], ["'adamw_8bits'", "Did you mean 'adamw_8bit'?"]),
    "missing logger": (["--report-to", "tensorbord"], ["'tensorbord'", "Did you mean 'tensorboard'?"]),
    "missing model": (["--model", "PLACE/none"], ["none", "Give an existing directory or a Hub name"]),
    "model is a file": (["--model", "PLACE/a-file"], ["a-file", "is a file"]),
    "directory without weights": (["--model", "PLACE/no-weights"], ["no-weights has no model weights", "model.safetensors"]),
    "directory without config": (["--model", "PLACE/no-config"], ["no-config", "config.json"]),
    "config that is not JSON": (["--model", "PLACE/bad-json"], ["bad-json/config.json is not valid JSON"]),
    "truncated safetensors": (["--model", "PLACE/truncated"], ["model.safetensors", "truncated", "10000 bytes"]),
    "pickle-only checkpoint": (["--model", "PLACE/pickled"], ["only as pickle (pytorch_model.bin)", "safetensors version"]),
    "unknown architecture": (["--model", "PLACE/strange"], ["model_type 'hyperion'", "pip install -U transformers"]),
    "dataset missing": (["--data", "PLACE/none.jsonl"], ["none.jsonl", "There is no file"]),
    "dataset empty": (["--data", "PLACE/empty.jsonl"], ["empty.jsonl is empty", "at least one row"]),
    "dataset not JSON": (["--data", "PLACE/broken.jsonl"], ["broken.jsonl", "line 3"]),
    "dataset of unknown kind": (["--data", "PLACE/rows.txt"], ["rows.txt", "'.txt'", ".jsonl"]),
    "dataset of unknown format": (["--data", "PLACE/nothing.jsonl"], ["['a']", "messages"]),
    "row without an answer": (["--data", "PLACE/unanswered.jsonl"], ["row 2", "answer"]),
    "unknown role": (["--data", "PLACE/role.jsonl"], ["row 2", "'wizard'", "assistant"]),
    "mixed formats": (["--data", "PLACE/mixed.jsonl"], ["row 2"]),
    "mixed columns": (["--data", "PLACE/columns.jsonl"], ["mixed formats", "prompt/completion", "instruction/output"]),
    "all rows masked": (["--data", "PLACE/silent.jsonl"], ["No row is left to train on: 3 x empty answer", "luthier inspect"]),
    "max length shorter than every row": (
        ["--max-seq-length", "4"],
        ["max_length 4 is shorter than every row", "max_seq_length"],
    ),
    "evaluation rows missing": (["--eval-data", "PLACE/none.jsonl"], ["none.jsonl", "There is no file"]),
    "output is a file": (["--output", "PLACE/a-file/out"], ["a-file/out", "choose another output directory"]),
    "resume from no checkpoint": (["--resume", "PLACE/no-checkpoint"], ["no-checkpoint is not a checkpoint to resume from"]),
    "resume from nothing": (["--resume", "PLACE/none"], ["The checkpoint", "does not exist"]),
    "resume with nothing there": (["--resume", "latest"], ["no complete checkpoint"]),
}


def given(place, arguments):
    recipe = {"--model": place / "model", "--data": place / "rows.jsonl", "--output": place / "bad-out"}
    flags = [str(argument).replace("PLACE", str(place)) for argument in arguments]
    recipe = {name: value for name, value in recipe.items() if name not in flags}
    return [*(part for pair in recipe.items() for part in pair), *RUN, *flags]


@pytest.mark.parametrize("case", BAD)
def test_bad_input(broken, run, case):
    flags, told = BAD[case]
    result = run("sft", *given(broken, flags))
    message = " ".join(result.err.replace("│", " ").split())
    assert result.code == 2, message
    assert not result.out and "Traceback" not in result.err
    for part in told:
        assert part in message
    assert not (broken / "bad-out").exists() and not list(broken.glob(".*"))


IN_TIME = sorted(set(BAD) - {"unknown module to save"})  # this one needs the model itself


@pytest.mark.parametrize("case", IN_TIME)
def test_bad_input_is_found_by_a_dry_run(broken, run, case):
    flags, told = BAD[case]
    result = run("sft", *given(broken, flags), "--dry-run")
    message = " ".join(result.err.replace("│", " ").split())
    assert result.code == 2, message
    for part in told:
        assert part in message


def test_unknown_key(broken, run, tmp_path):
    recipe = yaml.safe_load((broken / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"lora_rank": 8, "output": str(tmp_path / "out")}))
    result = run("sft", tmp_path / "recipe.yaml")
    assert result.code == 2 and "'lora_rank'" in result.err and "lora_alpha" in result.err
    assert not (tmp_path / "out").exists()


def test_a_key_of_another_workflow(broken, run, tmp_path):
    recipe = yaml.safe_load((broken / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"finetune_vision_layers": True}))
    result = run("sft", tmp_path / "recipe.yaml")
    assert result.code == 2 and "It belongs to luthier vision." in result.err


def test_a_gated_model(broken, run, monkeypatch):
    import huggingface_hub

    def gated(*args, **kwargs):
        response = SimpleNamespace(headers={}, request=None)  # of httpx, or of httpx2 with huggingface_hub 2
        raise hub_errors.GatedRepoError("gated", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    for command in (["sft", *given(broken, ["--model", "x/gated"])], ["chat", "x/gated"], ["estimate", "x/gated"]):
        result = run(*command)
        assert result.code == 2
        assert "x/gated is gated" in result.err and "hf auth login" in result.err


READ_ONLY = {
    "read-only directory": (errno.EROFS, "the file system is read-only"),
    "no permission": (errno.EACCES, "permission denied"),
    "full disk": (errno.ENOSPC, "the disk is full"),
}


@pytest.mark.parametrize("case", READ_ONLY)
def test_output_that_cannot_be_written_is_found_before_the_work(broken, run, monkeypatch, case):
    """Injected, since tests may run as root, whom no permission stops."""
    number, reason = READ_ONLY[case]

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("luthier.workflows.sft.read_dataset", lambda *args: pytest.fail("work began"))
    result = run("sft", *given(broken, []))
    assert result.code == 2
    assert reason in result.err and str(broken / "bad-out") in result.err and "choose" in result.err
    assert not (broken / "bad-out").exists()


@pytest.mark.parametrize("command", ["merge", "gguf"])
def test_a_disk_that_fills_up_while_saving(broken, run, monkeypatch, command, tmp_path):
    """What was there stays as it was, and nothing half-written lies beside it."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.txt").write_text("kept")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    result = run(command, broken / "out" / "adapter", "--output", output)
    assert result.code == 2, result.err
    assert "the disk is full" in result.err and str(output) in result.err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "PLACE/broken.jsonl"], ["line 3"]),
        (["inspect", "PLACE/rows.jsonl", "--rows", "-1"], ["rows is -1"]),
        (["inspect", "PLACE/rows.jsonl", "--chat-template", "lama-3"], ["Did you mean 'llama-3'?"]),
        (["inspect", "PLACE/rows.jsonl", "--model", "PLACE/none"], ["PLACE/none"]),
        (["estimate", "PLACE/strange"], ["'hyperion'"]),
        (["estimate", "PLACE/no-config"], ["config.json"]),
        (["estimate", "PLACE/model", "--load-in-8bit", "--full-finetuning"], ["choose one"]),
        (["estimate", "PLACE/model", "--r", "0"], ["r is 0"]),
        (["estimate", "PLACE/model", "--max-seq-length", "0"], ["max_seq_length is 0"]),
        (["merge", "PLACE/model"], ["PLACE/model", "adapter_config.json"]),
        (["merge", "PLACE/none"], ["PLACE/none"]),
        (["merge", "PLACE/out/adapter", "--max-shard-size", "5XB"], ["5XB"]),
        (["gguf", "PLACE/none"], ["PLACE/none"]),
        (["gguf", "PLACE/model", "--quant", "q9"], ["'q9'", "q8_0"]),
        (["gguf", "PLACE/truncated"], ["truncated"]),
        (["gguf", "PLACE/pickled"], ["pickle"]),
        (["gguf", "PLACE/strange"], ["'hyperion'"]),
        (["verify", "PLACE/rows.jsonl", "--against", "PLACE/model"], ["rows.jsonl"]),
        (["chat", "PLACE/none", "--prompt", "Hi?"], ["PLACE/none"]),
        (["chat", "PLACE/model", "--prompt", "Hi?", "--temperature", "-1"], ["temperature is -1"]),
        (["chat", "PLACE/model", "--prompt", "Hi?", "--max-seq-length", "8"], ["max_seq_length=8"]),
        (["eval", "PLACE/model"], ["--data"]),
        (["eval", "PLACE/model", "--data", "PLACE/empty.jsonl"], ["is empty"]),
        (["eval", "PLACE/model", "--data", "PLACE/rows.jsonl", "--task", "ocr"], ["FastLanguageModel"]),
        (["grpo", "--model", "PLACE/model", "--data", "PLACE/rows.jsonl"], ["rewards", "--rewards"]),
        (
            ["grpo", "--model", "PLACE/model", "--data", "PLACE/rows.jsonl", "--rewards", "PLACE/none.py:f"],
            ["PLACE/none.py"],
        ),
        (["vision", "--model", "PLACE/model", "--data", "PLACE/rows.jsonl", "--output", "PLACE/bad-out"], ["text model"]),
    ],
    ids=lambda value: " ".join(value)[:60].replace("PLACE/", "") if value[0] in (*cli.FUNCTIONS, *cli.RECIPES) else "",
)
def test_bad_input_of_the_other_commands(broken, run, arguments, told):
    before = sorted(broken.rglob("*"))
    result = run(*(argument.replace("PLACE", str(broken)) for argument in arguments))
    message = " ".join(result.err.split())
    assert result.code == 2, message
    assert not result.out
    for part in told:
        assert part.replace("PLACE", str(broken)) in message
    assert sorted(broken.rglob("*")) == before


# --- which errors are the user's -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: None + 1,
        lambda: int("x"),
        lambda: [].index(3),
        lambda: Path("/none").read_text(),
        lambda: json.loads("{"),
        lambda: torch.zeros(2) @ torch.zeros(3),
    ],
)
def test_a_mistake_of_ours_is_not_shown_as_the_users(place, monkeypatch, mistake):
    """A planted bug keeps its traceback; Python exits with 1 for it."""
    from luthier.data import read

    planted = type(read.read_dataset)(mistake.__code__.replace(co_filename=read.__file__), mistake.__globals__)
    monkeypatch.setattr("luthier.workflows.inspect.read_dataset", lambda *args: planted())
    with pytest.raises(Exception) as raised:  # noqa: B017, PT011
        cli.main(["inspect", str(place / "rows.jsonl")])
    assert not cli.raised_by_luthier(raised.value)


def test_a_planted_bug_exits_with_1(tmp_path):
    script = "import sys; from luthier import cli; cli._dispatch = lambda arguments: None + 1; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_training_that_diverges_failed(place, run, monkeypatch, tmp_path):
    """Not bad input: exit code 1, still without a traceback."""
    flags = ("--model", place / "model", "--data", place / "rows.jsonl", "--output", tmp_path / "out")
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr("trl.SFTTrainer.training_step", lambda *args, **kwargs: nan)
    result = run("sft", *flags, *RUN)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("Failed: ") and "learning_rate" in result.err


def test_of_several_processes_the_first_talks_and_writes(run, monkeypatch, tmp_path, capsys):
    """As torchrun starts them; errors come from whoever meets them."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    say("the first says this")
    table("Title", ["column"], [["cell"]])
    assert save_outputs(None, None, SFTRecipe(output=str(tmp_path))) == {} and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""
    assert "missing.yaml" in run("sft", str(tmp_path / "missing.yaml")).err
    monkeypatch.setattr(cli, "_load", lambda place: lambda recipe: {})
    assert run("sft", "--json") == (0, "", ""), "whoever reads the result reads one document"
    monkeypatch.setenv("RANK", "0")
    say("the first says this")
    assert capsys.readouterr().err == "the first says this\n"


@pytest.mark.parametrize("size", ["1", "", None])
def test_a_run_that_is_alone_talks_and_writes_whatever_its_rank(monkeypatch, capsys, size):
    """A scheduler may number runs by RANK that know nothing of each other."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
    say("it says this")
    assert capsys.readouterr().err == "it says this\n"


def test_recipes_do_not_shard_a_model(run, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    result = run("sft", "--model", str(tmp_path), "--data", "rows.jsonl", "--output", str(tmp_path / "out"))
    assert result.code == 2 and "torchrun" in result.err and not list(tmp_path.iterdir())
