"""The package as a house: which room may lean on which, and what loads without JAX."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import ROOT

from sdpo_jax.data.negatives import NEGATIVES
from sdpo_jax.models.decoder import REMAT
from sdpo_jax.models.lora import PROJECTIONS
from sdpo_jax.models.quantize import BASE_DTYPES
from sdpo_jax.objectives.logprobs import LAYOUTS
from sdpo_jax.objectives.losses import OBJECTIVES
from sdpo_jax.runs import config

PACKAGE = ROOT / "sdpo_jax"


def floors() -> list[str]:
    """The folders of the package from the ground up, as docs/architecture.md lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = text.partition("## Floors")[2].partition("\n## ")[0]
    names = [line.split("`")[1] for line in listed.splitlines() if line.startswith("1. `")]
    return [name.removesuffix("/") for name in names]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    modules = {module_of(p) for p in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules - {"sdpo_jax"}


def room(module: str) -> str:
    """A folder of the package; "commands" for what lies beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[1]).is_dir() else "commands"


def test_every_folder_has_its_floor():
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders | {"commands"} == {*floors()}


def test_imports_point_down_and_nothing_imports_a_command():
    order = floors()
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        if module == "sdpo_jax":
            continue
        for other in sorted(imported(path)):
            above = order.index(room(other)) > order.index(room(module))
            if above or (room(other) == "commands" and other != module):
                wrong.append(f"{module} -> {other}")
    assert not wrong


@pytest.mark.parametrize("folder", [name for name in floors() if name != "commands"])
def test_no_file_of_a_folder_leans_on_itself(folder):
    """No circle of files within a folder; between folders the floors forbid it."""
    graph = {module_of(p): imported(p) for p in (PACKAGE / folder).rglob("*.py")}
    assert graph
    leaves = True
    while leaves:
        leaves = {module for module, others in graph.items() if not others & set(graph) - {module}}
        graph = {module: others for module, others in graph.items() if module not in leaves}
    assert not graph


@pytest.mark.parametrize(
    "code",
    [
        "import sdpo_jax",
        "import sdpo_jax.report",
        "import sdpo_jax.chatrec",
        "import sdpo_jax.leakcheck",
        "import sdpo_jax.prepare",
    ],
)
def test_what_only_reads_and_writes_files_loads_no_jax(code):
    check = f"import sys; {code}; print([m for m in ('jax', 'flax', 'orbax') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("written", "offered"),
    [
        (config.REMAT, REMAT),
        (config.PROJECTIONS, PROJECTIONS),
        (config.BASE_DTYPES, BASE_DTYPES),
        (config.LAYOUTS, LAYOUTS),
        (config.OBJECTIVES, OBJECTIVES),
        (config.NEGATIVES, NEGATIVES),
    ],
)
def test_the_choices_of_a_config_are_those_that_the_modules_offer(written, offered):
    assert [*written] == [*offered]


def test_files_and_functions_fit_in_a_glance_and_the_formatter_is_obeyed():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"), *ROOT.glob("[bc]*/*.py")]
    texts = {path: path.read_text() for path in files}
    assert not [path.name for path, text in texts.items() if text.count("\n") > 400]
    long = [
        node.name
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long
    assert sum(text.count("# fmt: " + "skip") for text in texts.values()) <= 10


def test_every_folder_of_the_package_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {module_of(path) for path in PACKAGE.rglob("__init__.py")}
    assert {*setup["options"]["packages"].split()} == folders | {"sdpo_jax.configs"}
