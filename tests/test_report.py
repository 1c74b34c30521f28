"""The report of a run: its rows, its comparisons, its picture."""

import builtins
import json
import math
import os

import numpy as np
import pytest
import tiny_run

from sdpo_jax.evaluation import results
from sdpo_jax.report import report
from sdpo_jax.reports import curves_plot, tables
from sdpo_jax.runs.workdir import Run, open_run, read_run
from sdpo_jax.system.errors import InputError

N = 40


def predictions(hits, decoder):
    records = [
        {
            "row": row,
            "user": row,
            "target": "heat",
            "valid": True,
            "hit": bool(hit),
            "rank": 1 if hit else 3,
            "generation": "heat",
        }
        for row, hit in enumerate(hits)
    ]
    for record in records:
        del record["rank" if decoder in ("greedy", "trie") else "generation"]
    return records


def add(run, stage, step, hits, decoder="score", split="test", rank="candidates"):
    """An evaluation of the catalogue has 25 items, of which the first 10 are recommended."""
    records = predictions(hits, decoder)
    if rank == "catalogue":
        records = [record | {"top": [*range(10)]} for record in records]
    about = {
        "stage": stage,
        "step": step,
        "decoder": decoder,
        "split": split,
        "seconds": 5.0,
        "protocol": "drawn for a test",
        "candidates": 20,
    }
    counts = {item: 7 for item in range(25)}
    summary = results.summarize(decoder, records, rank, (25, counts)) | about
    results.write_result(run / "eval", summary, records)


def curves(steps=30):
    """Lines as training writes them."""
    rng = np.random.default_rng(0)
    lines = []
    for stage, start, end in (("sft", 12.0, 4.0), ("sdpo", math.log(4), 1.0)):
        for step in range(steps + 1):
            at = {"stage": stage, "step": step, "examples": 8 * step, "time": 0.0}
            value = end + (start - end) * math.exp(-step / 8)
            extra = {}
            if stage == "sdpo":
                extra = {"rewards/margins": step / 20, "rewards/accuracies": 0.25 + step / 60}
            if step:
                noisy = {k: v + rng.normal(0, 0.05) for k, v in ({"loss": value} | extra).items()}
                lines.append(at | noisy)
            if step % 10 == 0:
                checked = {f"validation/{k}": v for k, v in ({"loss": value} | extra).items()}
                lines.append(at | checked | {"validation/windows": 80})
    return lines


@pytest.fixture
def run(tmp_path):
    """A finished run: of 40 windows the base hits 2, SFT 8, S-DPO those and 6 more."""
    path = tmp_path / "run"
    config = tiny_run.config_of(dataset="data", model="model")
    open_run(Run(path, config, {"dataset": "0", "model": "1"}, (), ()))
    hits = np.arange(N)
    for decoder in ("greedy", "score"):
        add(path, "base", 0, hits < 2, decoder)
        add(path, "sft", 20, hits < 8, decoder)
        add(path, "sft", 30, hits < 1, decoder)
        add(path, "sdpo", 30, hits < 14, decoder)
    tiny_run.finish(path, "sft", 20)
    tiny_run.finish(path, "sdpo", 30)
    (path / "metrics").mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in curves())
    (path / "metrics" / "metrics.jsonl").write_text(lines)
    return path


def rows_of(text):
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {(row[0], row[1]): row for row in cells}


def test_the_table_shows_the_results_of_every_stage(run):
    rows = rows_of(report(run))
    assert rows["", "step"] == [
        "",
        "step",
        "HR@1 greedy [95%]",
        "valid",
        "HR@1 score [95%]",
        "HR@5",
        "NDCG@10",
        "MRR",
        "reward accuracy [95%]",
        "n",
        "training s",
        "evaluation s",
    ]
    # Ranks are 1 or 3: NDCG 1 or 1/2, reciprocal 1 or 1/3; SFT hits 8 of 40.
    assert rows["SFT", "20"] == [
        "SFT",
        "20",
        "0.200 [0.105, 0.348]",
        "1.000",
        "0.200 [0.105, 0.348]",
        "1.000",
        "0.600",
        "0.467",
        "–",
        "40",
        "7",
        "5/5",
    ]
    assert rows["S-DPO", "30"][8] == "0.750 [0.645, 0.832]"  # 60 of 80 validation windows
    assert rows["base", "0"][10] == "–"
    assert rows["chance", ""][2:9] == ["0.050", "–", "0.050", "0.250", "0.227", "0.180", "0.250"]


def test_stages_are_compared_on_the_same_windows(run):
    rows = rows_of(report(run))
    # 6 windows only S-DPO hits: p = 2 / 2**6; 7/42 - 1/42 ± 1.96 sqrt((8/42 - (6/42)²) / 42).
    assert rows["S-DPO – SFT", "score"][2:] == ["+0.150 [+0.018, +0.268]", "0.031", "6", "0", "40"]
    assert rows["S-DPO – base", "greedy"][3:] == ["<0.001", "12", "0", "40"]
    assert ("SFT – base", "score") in rows


def test_windows_that_only_one_evaluation_has_are_left_out(run):
    add(run, "sdpo", 30, np.ones(10), "score")
    rows = rows_of(report(run))
    assert rows["S-DPO – SFT", "score"][4:] == ["2", "0", "10"]
    assert rows["S-DPO", "30"][9] == "10/40"


def test_a_system_trained_again_is_shown_whatever_its_older_catalogue_says(run):
    add(run, "sasrec", 30, np.arange(N) < 3, rank="catalogue")
    add(run, "sasrec", 12, np.arange(N) < 10)
    rows = rows_of(report(run).split("## Whole catalogue")[0])
    assert rows["SASRec", "12"][4].startswith("0.250")
    assert ("S-DPO – SASRec", "score") in rows


def test_windows_of_one_user_that_agree_widen_the_interval():
    records = [{"row": i, "user": i // 4, "hit": i // 4 < 3, "valid": True} for i in range(N)]
    alike, apart = (
        results.summarize("greedy", found)
        for found in (records, [record | {"user": record["row"]} for record in records])
    )
    assert (alike["users"], apart["users"]) == (10, 40)
    widths = [np.ptp(found["hit_ratio_at_1_ci95"]) for found in (alike, apart)]
    assert widths[0] > 1.5 * widths[1]


def test_other_systems_stand_above_the_stages_and_beside_s_dpo(run):
    add(run, "sasrec", 7, np.arange(N) < 10)
    add(run, "sasrec", 7, np.arange(N) < 3, rank="catalogue")
    text = report(run).split("## Whole catalogue")[0]
    rows = rows_of(text)
    assert text.index("SASRec") < text.index("| base")
    assert rows["SASRec", "7"][2:6] == ["–", "–", "0.250 [0.142, 0.402]", "1.000"]
    assert rows["S-DPO – SASRec", "score"][4:] == ["4", "0", "40"]


def test_the_whole_catalogue_has_a_table_of_its_own(run):
    assert "Whole catalogue" not in report(run)
    add(run, "sasrec", 7, np.arange(N) < 4, rank="catalogue")
    add(run, "sft", 20, np.arange(N) < 2, rank="catalogue")
    add(run, "sft", 20, np.arange(N) < 8, "beam", rank="catalogue")
    candidates, catalogue = report(run).split("## Whole catalogue")
    assert "SASRec" not in candidates and "S-DPO – SFT" in candidates
    head, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in catalogue.splitlines()
        if line.startswith("| ")
    ]
    assert head == [
        "",
        "step",
        "decoder",
        "HR@1 [95%]",
        "HR@5 [95%]",
        "HR@10 [95%]",
        "HR@20 [95%]",
        "NDCG@10",
        "MRR",
        "coverage@10",
        "Gini@10",
        "popularity@10",
        "n",
    ]
    assert [row[:3] for row in rows] == [
        ["SASRec", "7", "score"],
        ["SFT", "20", "score"],
        ["SFT", "20", "beam"],
    ]
    # As among the candidates, ranks are 1 or 3; 10 of 25 items are recommended equally often.
    assert rows[2][3:] == [
        "0.200 [0.105, 0.348]",
        *3 * ["1.000 [0.912, 1.000]"],
        "0.600",
        "0.467",
        "0.400",
        "0.600",
        "7.0",
        "40",
    ]
    assert "ranked among all 25 items except those of the window's history" in catalogue


def test_the_catalogue_alone_makes_a_report(run):
    for path in (run / "eval").iterdir():
        path.unlink()
    add(run, "sdpo", 30, np.arange(N) < 8, "beam", rank="catalogue")
    text = report(run)
    assert "Protocol: drawn for a test." in text and "| S-DPO | 30   | beam" in text
    assert not any(words in text for words in ("valid", "chance", "Paired"))


def test_each_table_has_the_best_step_that_it_can_show(run):
    add(run, "sft", 30, np.arange(N) < 2, rank="catalogue")
    _, rows = tables.choose_rows(read_run(run))
    steps = {rank: {row.stage: row.step for row in of_rank} for rank, of_rank in rows.items()}
    assert steps["candidates"]["sft"] == 20 and steps["catalogue"] == {"sft": 30}


def test_a_run_of_another_objective_says_so(run):
    file = run / "config.json"
    stored = json.loads(file.read_text())
    stored["config"]["objective"] = "dpo_pairwise"
    file.write_text(json.dumps(stored))
    assert ("DPO, 3 pairs – SFT", "score") in rows_of(report(run))
    stored["config"]["num_negatives"] = 1
    file.write_text(json.dumps(stored))
    assert ("DPO – SFT", "score") in rows_of(report(run))


def test_a_row_shows_the_best_step_or_else_the_last_one_evaluated(run):
    def steps():
        _, rows = tables.choose_rows(read_run(run))
        return [(row.stage, row.step) for row in rows["candidates"]]

    assert steps() == [("base", 0), ("sft", 20), ("sdpo", 30)]
    (run / "stages" / "sft.json").unlink()
    assert steps() == [("base", 0), ("sft", 30), ("sdpo", 30)]


def test_another_split_keeps_the_earlier_one(tmp_path):
    (tmp_path / "eval").mkdir()
    for split, n in (("val", 4), ("test", 5), ("val", 6)):
        add(tmp_path, "base", 0, np.ones(n), split=split)
        latest = json.loads((tmp_path / "eval" / "base-0-score.json").read_text())
        assert latest["split"] == split
        assert results.find(tmp_path / "eval", "base", 0, "score", split)["n"] == n
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {
        f"base-0-score{suffix}.{kind}" for suffix in ("", "-test") for kind in ("json", "jsonl")
    }
    kept = {
        s["split"]: results.read_predictions(s) for s in results.read_results(tmp_path / "eval")
    }
    assert (len(kept["val"]), len(kept["test"])) == (6, 5)


def test_the_split_evaluated_last_unless_asked(run):
    add(run, "sdpo", 30, np.zeros(N), split="val")
    for file in (run / "eval").iterdir():
        if "val" not in file.read_text()[:2000]:
            os.utime(file, (0, 0))
    assert "split val" in report(run)
    assert ("S-DPO – SFT", "score") in rows_of(report(run, "test"))
    with pytest.raises(InputError, match=r"--split: found train, expected .*: test, val"):
        report(run, "train")


def test_a_run_of_which_little_is_there_still_has_a_report(run):
    for path in (run / "stages").iterdir():
        path.unlink()
    (run / "metrics" / "metrics.jsonl").unlink()
    for path in (run / "eval").glob("s*"):
        path.unlink()
    text = report(run)
    assert "Paired" not in text and "curves" not in text and not (run / "curves.png").exists()
    assert (run / "report.md").read_text() == text


def test_nothing_evaluated_and_broken_files_are_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        report(tmp_path / "nowhere")
    (run / "eval" / "sft-20-score.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"sft-20-score\.jsonl:1: found .*evaluate again"):
        report(run)
    (run / "eval" / "sft-20-score.json").write_text("[]")
    with pytest.raises(InputError, match=r"sft-20-score\.json: found"):
        report(run)
    for path in (run / "eval").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="found no evaluation, expected one: run python -m"):
        report(run)


def test_the_picture_is_drawn(run):
    pytest.importorskip("matplotlib")
    assert "![training curves](curves.png)" in report(run)
    data = (run / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    assert not list(run.glob(".*"))


def test_without_matplotlib_there_is_no_picture(run, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "curves" not in report(run)
    assert capsys.readouterr().out.count("\n") == 1


def test_the_running_mean_keeps_ends():
    assert curves_plot.smoothed([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert curves_plot.smoothed([1, 2], 1) == [1, 2]
