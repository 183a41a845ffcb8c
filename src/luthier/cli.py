"""The command line: ``luthier sft recipe.yaml --max-steps 100``. Flags come from the recipes and the functions called.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input. An error that Luthier itself raised is the user's to mend and is
shown as one message; one from below is shown with its traceback.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

import luthier
from luthier.config import GRPORecipe, SFTRecipe, TrainRecipe, VisionRecipe, load_options, load_recipe
from luthier.errors import ExportProofError, unknown
from luthier.terminal import is_first_process, say, table

RECIPES: dict[str, type[TrainRecipe]] = {"sft": SFTRecipe, "grpo": GRPORecipe, "vision": VisionRecipe}
FUNCTIONS = {
    "merge": "luthier.workflows.export:merge",
    "gguf": "luthier.workflows.export:gguf",
    "verify": "luthier.workflows.export:verify",
    "chat": "luthier.workflows.chat:chat",
    "eval": "luthier.workflows.evaluate:evaluate",
    "inspect": "luthier.workflows.inspect:inspect",
    "estimate": "luthier.workflows.inspect:estimate",
    "doctor": "luthier.workflows.doctor:doctor",
    "demo": "luthier.demo.command:demo",
}
HELP = """usage: luthier COMMAND ...

  sft RECIPE.yaml      fine-tune a language model on chat rows (QLoRA by default)
  grpo RECIPE.yaml     reinforcement learning with reward functions
  vision RECIPE.yaml   fine-tune a vision-language model
  merge ADAPTER        write the merged weights of an adapter
  gguf DIR             write GGUF files for llama.cpp and Ollama
  verify FILE          prove that a GGUF file says what a model says
  chat MODEL           talk to a model or an adapter
  eval MODEL           loss, AIME, or OCR errors of a model, with and without its adapter
  inspect FILE         show a dataset as the model will see it: tokens, and which of them train
  estimate MODEL       memory that a run will take
  doctor               versions, GPU, what is missing and the command that mends it
  demo                 the whole pipeline on an embedded model; --grpo and --vision for those workflows

Every command takes a YAML file in the place of its first argument: its keys are the flags, and flags go over it.
luthier COMMAND --help shows every flag."""

DryRun = Annotated[bool, tyro.conf.arg(help="Check the recipe, show its rows and the memory it will take, load no weights.")]
AsJson = Annotated[bool, tyro.conf.arg(help="Print the result as JSON on standard output, for machines.")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # whoever read our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, ImportError, OSError) as error:
        if not raised_by_luthier(error):
            raise
        say(f"Error: {error.strerror if isinstance(error, OSError) and error.strerror else error}", quiet=False)
        return 2
    except (ExportProofError, FloatingPointError) as error:
        if not raised_by_luthier(error):
            raise
        say(f"Failed: {error}", quiet=False)
        return 1
    except KeyboardInterrupt as interrupt:
        say(f"Stopped. {interrupt}".rstrip())
        return 130


def raised_by_luthier(error: BaseException) -> bool:
    """Whether the error was raised on purpose: by a ``raise`` in this package, not by Python or a library below it."""
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    is_ours = Path(code.co_filename).is_relative_to(Path(luthier.__file__).parent)
    return is_ours and dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(luthier.__version__)
        return 0
    if command in RECIPES:
        return _run_recipe(command, rest)
    if command not in FUNCTIONS:
        raise unknown("command", command, [*RECIPES, *FUNCTIONS])
    _settle_libraries()
    function = _load(FUNCTIONS[command])
    if rest and Path(rest[0]).suffix in (".yaml", ".yml"):
        function, rest = functools.partial(function, **load_options(rest[0], function)), rest[1:]
    result = tyro.cli(function, args=rest, prog=f"luthier {command}", config=(tyro.conf.FlagCreatePairsOff,))
    return result if isinstance(result, int) else 0


def _run_recipe(command: str, arguments: list[str]) -> int:
    """``luthier sft [RECIPE.yaml] [flags]``: flags go over the file."""
    kind = RECIPES[command]
    recipe = kind()
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = load_recipe(arguments[0], kind), arguments[1:]
    command_line = dataclasses.make_dataclass(
        kind.__name__,
        [("recipe", tyro.conf.OmitArgPrefixes[kind], recipe), ("dry_run", DryRun, False), ("json", AsJson, False)],
        frozen=True,
    )
    prog = f"luthier {command} [RECIPE.yaml]"
    options = tyro.cli(command_line, args=_bare_resume(arguments), prog=prog, description=kind.__doc__)
    _settle_libraries()
    if options.dry_run:
        result = _load("luthier.workflows.dry_run:dry_run")(options.recipe)
    else:
        result = {kind: str(path) for kind, path in _train(command, options.recipe).items()}
        if not options.json:
            table("Written", ["what", "where"], list(result.items()))
    if options.json and is_first_process():
        print(json.dumps(result, indent=1))
    return 0


def _bare_resume(arguments: list[str]) -> list[str]:
    """``--resume`` without a checkpoint is that of the newest one."""
    given = []
    for flag, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="-"):
        given += [flag, "latest"] if flag == "--resume" and following.startswith("-") else [flag]
    return given


def _train(command: str, recipe: TrainRecipe) -> dict[str, Path]:
    try:
        return _load(f"luthier.workflows.{command}:run")(recipe)
    except KeyboardInterrupt:
        checkpoints = _load("luthier.training.checkpoints:list_checkpoints")(recipe.output)
        raise KeyboardInterrupt(*[f"--resume goes on from {path}" for path in checkpoints[-1:]]) from None


def _settle_libraries() -> None:
    """Thread settings, before torch is imported, and libraries that should not talk over us."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from luthier.workflows.quiet import quiet_libraries

    quiet_libraries()


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)
