"""The shape of the project: imports point one way, files and functions stay small, README's tree is the real tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "luthier"
LAYERS = [
    {"errors", "files", "terminal"}, {"config"}, {"ops"}, {"adapters"}, {"data"}, {"gguf"}, {"model"}, {"rl"}, {"evaluation"},
    {"proof"}, {"training"}, {"fast"}, {"workflows"}, {"demo"}, {"compat"}, {"cli"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ENTRANCES = {"__init__", "__main__"}  # public names and `python -m luthier`: above every layer
FILE_LINES, FUNCTION_LINES = 500, 100
FILES = sorted(SOURCE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_layers(tree: ast.AST) -> set[str]:
    """The layers that a module imports from, function-level imports included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "luthier":
                names.update(alias.name for alias in node.names)
            elif node.module and node.module.startswith("luthier."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("luthier."))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_shape(path):
    text = path.read_text()
    tree = ast.parse(text)
    layer = layer_of(path)
    if layer not in ENTRANCES:
        assert layer in RANK, f"{layer} is not a layer: {list(RANK)}"
        wrong = {name for name in imported_layers(tree) if RANK.get(name, 99) > RANK[layer]}
        assert not wrong, f"{layer} imports from {wrong}, which lie to its right"
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"broad except in line {node.lineno}"


def test_workflows_are_short():
    for path in sorted((SOURCE / "workflows").glob("*.py")):
        assert len(path.read_text().splitlines()) < 200, path.name


def test_the_checks_can_fail():
    assert imported_layers(ast.parse("def f():\n    from luthier.cli import main")) == {"cli"}
    assert imported_layers(ast.parse("import luthier.fast\nfrom luthier import rl")) == {"fast", "rl"}


def test_readme_tree_is_the_real_tree():
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    shown = set(re.findall(r"^  (\w+)(?:\.py|/)", block, re.MULTILINE))
    real = {p.stem for p in SOURCE.glob("*.py") if p.stem not in ENTRANCES} | {
        p.parent.name for p in SOURCE.glob("*/__init__.py")
    }
    assert shown == real
    for name in re.findall(r"^([\w.-]+/?) ", block, re.MULTILINE):
        assert (ROOT / name).exists(), f"README shows {name}, which does not exist"


def test_import_has_no_side_effect():
    probe = "import sys, luthier; print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_public_names_exist():
    import luthier

    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    with pytest.raises(AttributeError, match="FastLanguageModel"):
        luthier.FastLanguageModle  # noqa: B018
