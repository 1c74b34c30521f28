"""Whatever happens to the small files of a run ends in one line, or is no harm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from damage import NAMES, cases, damage, fresh, put, told_of_odd_values, told_or_done, tree
from hypothesis import given
from hypothesis import strategies as st

from sdpo_jax.evaluate import evaluate
from sdpo_jax.evaluation import results
from sdpo_jax.export import export
from sdpo_jax.report import report
from sdpo_jax.reports.model_card import model_card
from sdpo_jax.runs.inputs import inputs_of
from sdpo_jax.runs.steps import choose_step, last_finished
from sdpo_jax.runs.workdir import read_run, stage_result
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run with evaluations, without checkpoints."""
    run = tiny_run.make_run(tmp_path_factory.mktemp("whole"))
    for stage, step in (("sft", 2), ("sdpo", 3)):
        tiny_run.finish(run, stage, step)
        for decoder, rank in (("greedy", "candidates"), *(("score", r) for r in results.RANKS)):
            records = [
                {
                    "row": row,
                    "hit": row % 3 == 0,
                    "valid": True,
                    "rank": 1 + row % 4,
                    "top": [row, 7],
                }
                for row in range(6)
            ]
            about = {
                "stage": stage,
                "step": step,
                "decoder": decoder,
                "split": "test",
                "seconds": 5.0,
                "protocol": "drawn",
                "candidates": 4,
            }
            summary = results.summarize(decoder, records, rank, (10, {})) | about
            results.write_result(run / "eval", summary, records)
    return run


@cases(80)
@given(st.data())
def test_a_damaged_file_of_a_run_is_one_line(run, case, data):
    def check():
        read = read_run(folder)
        card = model_card(read, inputs_of(read, "val").dataset.meta, "sft", 2, "peft")
        for stage in read.config.stages:
            found = results.find(folder / "eval", stage, 2, "greedy", "test")
            assert found is None or results.read_predictions(found | {"path": path})
        return report(folder), card, last_finished(read)

    names = sorted(str(path.relative_to(run)) for path in run.rglob("*.json*"))
    file = data.draw(st.sampled_from(["config.json"] * 4 + names))
    folder = fresh(run, case)
    path = folder / "eval" / "sft-2-greedy.json"
    put(folder / file, data.draw(damage(run / file)))
    # Where another path came into config.json, the line is about that one.
    named = ("a prepared folder", "a converted model", "prompt templates")
    told_or_done(check, case.parent, str(folder), str(run.parent), *named)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("config.json", read_run),
        ("stages/sft.json", lambda folder: stage_result(folder, "sft")),
        ("eval/sft-2-score.json", report),
        ("eval/sft-2-score-catalogue.json", report),
    ],
)
def test_every_odd_value_of_a_small_file_of_a_run_is_one_line(run, case, file, read):
    folder = fresh(run, case)
    told_of_odd_values(folder / file, lambda: read(folder))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_run_that_is_not_there_is_one_line(name, tmp_path):
    path = tmp_path / "x" / "y" / "z" / name / "w"
    for call in (
        lambda: report(path),
        lambda: evaluate(path),
        lambda: export(path, "sft", "peft", tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=r"found no config\.json"):
            told_or_done(call, tmp_path) or call()
    assert tree(tmp_path) == {}


def test_a_best_step_without_its_checkpoint_is_told(run, case, monkeypatch):
    monkeypatch.setattr("sdpo_jax.runs.steps.steps", lambda run, stage: [1])
    with pytest.raises(InputError, match=r"sft\.json: found best_step 2, expected .*: 1: give one"):
        choose_step(read_run(fresh(run, case)), "sft", None)


@pytest.mark.parametrize("stages", [["../../x"], ["/x"], ["sft", "../x"]])
def test_a_stage_of_a_run_names_no_path(run, case, stages):
    folder = fresh(run, case)
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["stages"] = stages
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"config.stages is .*expected some of sft, sdpo"):
        evaluate(folder)


def test_an_evaluation_of_any_split_stays_in_its_folder(run, case):
    folder = fresh(run, case) / "eval"
    path = folder / "sft-2-greedy.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"split": "../../x"}))
    before = tree(case.parent)
    with pytest.raises(InputError, match=r"split: found '\.\./\.\./x', expected one of train, val"):
        results.write_result(folder, summary | {"split": "val"}, [])
    assert tree(case.parent) == before


@pytest.mark.parametrize("module", ["evaluate", "report"])
def test_a_command_on_a_damaged_run_ends_with_one_line_and_status_2(run, case, module):
    folder = fresh(run, case)
    (folder / "config.json").write_text('{"config": {}, "fingerprints": []}')
    before = tree(folder)
    done = subprocess.run(
        [sys.executable, "-m", f"sdpo_jax.{module}", f"--workdir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {folder}/config.json: ") and tree(folder) == before
