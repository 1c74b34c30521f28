"""README and docs: their links, their commands, their code."""

import ast
import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from trainers import ROOT

from sdpo_jax.__main__ import COMMANDS
from sdpo_jax.runs.config import keys

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(
    r"(?:python3? -m sdpo_jax\.|python3? -m (benchmarks)\.|\bsdpo )(\w+)((?: +\S+)*)"
)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(module, its options) of each command in a block or a table."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|\t)(.*)$|`([^`\n]*)`", text, re.M)
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S)).splitlines()
    found = []
    for line in [*(a or b for a, b in lines), *fenced]:
        for folder, name, options in COMMAND.findall(line):
            if folder or name in COMMANDS:
                found.append((f"{folder or 'sdpo_jax'}.{name}", options.split()))
    return found


@functools.cache
def flags_of(module: str) -> set[str]:
    """Names of a program's flags: read off its source or, where a loop defines some, its help."""
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.args[0] for call in calls if "DEFINE_" in ast.unparse(call.func)]
    if all(isinstance(name, ast.Constant) for name in names):
        return {name.value for name in names}
    command = [sys.executable, "-m", module, "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    return {name.replace("[no]", "") for name in re.findall(r"^  --([\[\]\w]+):", told, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_the_options_that_are_shown(page):
    known_keys = {name for name, *_ in keys()}
    for module, options in commands(page):
        known = flags_of(module)
        for name in re.findall(r"(?:^|\s)--([\w.-]+)", " ".join(options)):
            if name.startswith("config."):
                assert name.removeprefix("config.") in known_keys, (module, name)
            else:
                assert name.replace("-", "_") in known | {"help"}, (module, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_of_a_page_is_there_with_its_variant(page):
    for name, variant in re.findall(r"configs/(\w+)\.py(?::(\w+))?", page.read_text()):
        importlib.import_module(f"configs.{name}").get_config(*[variant] if variant else [])


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 160


def test_the_code_of_every_page_runs(model_folder, tmp_path, monkeypatch):
    """With a tiny model and run where a page has the quickstart's."""
    quick = tmp_path / "runs" / "quickstart"
    quick.mkdir(parents=True)
    (quick / "model").symlink_to(model_folder)
    data, names = tiny_run.dataset(), ["toy story", "aladdin", "the lion king"]
    titles = dict(enumerate([*names, *list(data.titles.values())[len(names) :]]))
    data = dataclasses.replace(data, titles=titles)
    run = tiny_run.history_run(tmp_path / "tiny", "sdpo", data)
    (quick / "run").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    blocks = [b for p in PAGES for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.S)]
    ours = [block for block in blocks if "torch" not in block.splitlines()[0]]
    assert len(ours) >= 3 and len(blocks) - len(ours) == 1  # `make parity` runs the one with torch
    for block in ours:
        exec(block, {})
