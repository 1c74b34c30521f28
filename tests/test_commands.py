"""The command `sdpo`, which starts all others."""

import ast
import re
import subprocess
import sys

import pytest
from trainers import ROOT

import sdpo_jax
from sdpo_jax.__main__ import COMMANDS, about
from sdpo_jax.runs.config import keys


def sdpo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sdpo_jax", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def has_flags(path) -> bool:
    """Whether a file is a command: it defines flags where it is the program."""
    return any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        for node in ast.parse(path.read_text()).body
    )


def test_help_lists_every_command_with_what_it_is_for():
    done = sdpo()
    assert done.returncode == 0 and done.stdout == sdpo("--help").stdout
    files = [p for p in (ROOT / "sdpo_jax").glob("*.py") if has_flags(p)]
    assert {*COMMANDS} == {p.stem for p in files} - {"__main__"} | {"baselines"}
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w.+\.$", done.stdout, re.M), name
        assert about(name) in done.stdout


@pytest.mark.parametrize("options", [["--dataset=nowhere"], ["--dataset", "nowhere"]])
def test_a_command_gets_its_options_and_its_exit_status(options):
    done = sdpo("leakcheck", *options)
    alone = subprocess.run(
        [sys.executable, "-m", "sdpo_jax.leakcheck", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (alone.returncode, alone.stderr)
    assert done.returncode == 2 and "nowhere" in done.stderr


def test_a_misspelt_command_is_one_line_with_the_nearest():
    done = sdpo("evalute", "--workdir=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean evaluate?" in done.stderr


def test_the_version_is_that_of_the_package():
    assert sdpo("--version").stdout.strip() == sdpo_jax.__version__


def test_public_names_are_there_and_others_are_not():
    assert sdpo_jax.sdpo_loss.__name__ == "sdpo_loss"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sdpo_jax.nothing  # noqa: B018


def test_a_help_page_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, "-m", "sdpo_jax.train", "--help"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # as of `| head -0`
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_help_config_prints_every_key_with_its_value_and_what_it_means():
    done = sdpo("train", "--config=configs/lastfm.py:small", "--help_config")
    assert done.returncode == 0, done.stderr
    for name, field, _ in keys():
        assert re.search(
            rf"^{name} = .*\n    {re.escape(field.metadata['about'])}$", done.stdout, re.M
        )
    assert "lora.dropout = 0.0 (default 0.1)" in done.stdout


FULL = """
import jax.numpy as jnp
from sdpo_jax.system.command import run_command

run_command(lambda argv: jnp.zeros(2**45).block_until_ready())
"""


def test_a_device_without_enough_memory_is_one_line_with_what_to_lower():
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the device's memory: found too little (RESOURCE_EXHAUSTED")
    assert "--config.microbatch" in line
