"""The paper's tables: what has to be run for them, running it, and the page."""

import dataclasses
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import tiny_dataset

from sdpo_jax.data.prepared import write_dataset
from sdpo_jax.data.prompts import DOMAINS
from sdpo_jax.evaluation import results
from sdpo_jax.reports.document import Heading, Notes, Table, Text, to_html, to_markdown
from sdpo_jax.reproduce import reproduce
from sdpo_jax.reproduction import cells, page
from sdpo_jax.reproduction.cells import SCALES, Place, Study
from sdpo_jax.reproduction.plan import TARGETS, plan
from sdpo_jax.runs.config import keys
from sdpo_jax.system.errors import InputError

N = 40
HOSTILE = "<script>alert(1)</script> | `x`"


@pytest.fixture
def study(tmp_path):
    """One that has a model, with its data set prepared."""
    return Study(tmp_path, SCALES["smoke"], "model")


def asked(*targets, **changes):
    """As the command's flags tell it."""
    keys = (
        "model",
        "options",
        *cells.DATASETS,
        *cells.BACKBONES,
        "endpoint",
        "chat_model",
    )
    wanted = {target: ["movielens"] for target in targets}
    return dict.fromkeys(keys, "") | {"scale": "smoke", "model": "m", "wanted": wanted} | changes


def names(study, *targets, dataset="movielens"):
    planned = plan(study, {target: [dataset] for target in targets})
    return [str(cell.folder.relative_to(study.root / dataset)) for cell in planned]


def add(folder, stage, hits, decoder="greedy", rank="candidates", missed=2, **about):
    """An evaluation as the commands write it."""
    records = [
        {
            "row": row,
            "hit": bool(hit),
            "valid": row % 4 > 0 or bool(hit),
            "rank": 1 if hit else missed,
        }
        for row, hit in enumerate(map(int, hits))
    ]
    about = {
        "stage": stage,
        "step": 4,
        "decoder": decoder,
        "split": "test_all",
        "seed": 0,
        "seconds": 1.0,
        "protocol": "drawn for a test",
    } | about
    summary = results.summarize(decoder, records, rank) | about
    results.write_result(folder / "eval", summary, records)


def test_every_cell_is_planned_once_and_after_those_that_it_needs(study):
    planned = plan(study, {target: ["movielens"] for target in TARGETS})
    folders = [cell.folder for cell in planned]
    assert len(set(folders)) == len(folders)
    for place, cell in enumerate(planned):
        assert {needed.folder for needed in cell.needs} <= set(folders[:place])
    assert names(study, "table3") == ["data"]
    assert names(study, "fig2") == ["data", "sft", "sdpo-k1-beta1", "sdpo-k3-beta1"]
    assert names(study, "table2") == [
        "data",
        "sft",
        "sdpo-k1-beta1",
        "dpo_pairwise-k3-beta1",
        "sdpo-k3-beta1",
    ]


def test_all_that_is_tuned_on_preferences_starts_from_the_one_sft_stage(study):
    study = dataclasses.replace(study, scale=SCALES["paper"])
    planned = plan(study, {"fig3": ["movielens"]})
    trainings = [
        cell.steps[0].command for cell in planned if cell.steps[0].command[0][-5:] == "train"
    ]
    assert [c[2] for c in trainings].count(f"--workdir={study.root}/movielens/sft") == 1
    tuned = trainings[1:]
    start = f"--config.lora.init_from={study.root}/movielens/sft/adapter"
    assert all(start in c and '--config.stages=("sdpo",)' in c for c in tuned)
    settings = {(c[-3].partition("=")[2], c[-2].partition("=")[2]) for c in tuned}
    assert settings == {
        *((k, "1.0") for k in ("1", "3", "5", "8", "10", "15")),
        *(("3", beta) for beta in ("0.1", "0.5", "3.0", "5.0")),
    }


@pytest.mark.parametrize(
    "options",
    ["--config.beta=2", "--config.lora.init_from=x", "'--config.microbatch=2", "--workdir=x", "2"],
)
def test_options_that_would_make_a_cell_another_are_refused(options, tmp_path):
    with pytest.raises(InputError, match=r"^--options: found "):
        reproduce(tmp_path, asked("fig2", options=options), dry_run=True)


def test_what_cells_were_made_with_is_added_once_and_never_changed(tmp_path):
    first = asked("table3")
    (tmp_path / "reproduce.json").write_text(json.dumps(first))
    second = asked("table1", endpoint="http://localhost/v1", chat_model="weak")
    reproduce(tmp_path, second, dry_run=True)
    (tmp_path / "reproduce.json").write_text(json.dumps(second))
    with pytest.raises(InputError, match="--chat_model: found 'strong', expected 'weak' as in"):
        reproduce(tmp_path, second | {"chat_model": "strong"}, dry_run=True)
    reproduce(tmp_path, first, dry_run=True)


def test_a_scale_says_what_is_run(study):
    (smoke,) = (c for c in plan(study, {"fig2": ["movielens"]}) if c.folder.name == "sft")
    assert "--config=configs/movielens.py:smoke" in smoke.steps[0].command
    assert smoke.steps[2].command[-2:] == ("--split=test_all", "--limit=16")
    paper = dataclasses.replace(study, scale=SCALES["paper"], options=("--config.microbatch=2",))
    cell = cells.sft(Place(paper, "lastfm"))
    assert cell.steps[0].command[1] == "--config=configs/lastfm.py"
    assert cell.steps[0].command[-1] == "--config.microbatch=2"
    assert cell.steps[2].command[-1] == "--split=test"


def test_the_small_model_is_converted_where_none_is_given(study):
    study = dataclasses.replace(study, model="")
    planned = plan(study, {"table2": ["movielens"]})
    assert [str(cell.folder.relative_to(study.root)) for cell in planned][:3] == [
        "movielens/data",
        "model",
        "movielens/sft",
    ]
    assert planned[1].steps[0].command == ("sdpo_jax.convert", f"--output={study.root}/model")
    assert f"--config.model={study.root}/model" in planned[2].steps[0].command


def test_other_language_models_are_runs_with_other_keys(study):
    told = {row.label: row.missing for row in cells.table1(Place(study, "movielens"))}
    assert {label for label, why in told.items() if why} == {"ChatRec"}
    study = dataclasses.replace(study, endpoint="http://localhost/v1", chat_model="m")
    planned = {cell.folder.name: cell for cell in plan(study, {"table1": ["movielens"]})}
    assert "--endpoint=http://localhost/v1" in planned["chatrec"].steps[0].command
    file = "configs/prompts/movie-tallrec.txt"
    assert f"--config.prompt_file={file}" in planned["tallrec"].steps[0].command
    study = dataclasses.replace(study, options=("--config.chat_template=True",))
    command = cells.tallrec(Place(study, "movielens")).steps[0].command
    assert [flag for flag in command if "chat_template" in flag][-1].endswith("=False")
    assert all(Path(f"configs/prompts/{domain}-tallrec.txt").exists() for domain in DOMAINS)
    vectors = study.root / "movielens" / "sasrec" / "baselines" / "sasrec.safetensors"
    assert f"--config.item_vectors={vectors}" in planned["llara"].steps[0].command
    assert planned["sasrec"] in planned["llara"].needs


def test_other_backbones_are_run_where_their_folders_are_given(study):
    assert names(study, "table4") == ["data"]
    study = dataclasses.replace(study, backbones={"pythia": "runs/pythia"})
    assert names(study, "table4") == [
        "data",
        "pythia/sft",
        "pythia/sdpo-k1-beta1",
        "pythia/sdpo-k3-beta1",
    ]
    (sft,) = (c for c in plan(study, {"table4": ["movielens"]}) if c.folder.name == "sft")
    assert "--config.model=runs/pythia" in sft.steps[0].command


def test_a_data_set_without_its_raw_files_is_left_out_with_a_line(study):
    assert plan(study, {"table1": ["lastfm"]}) == []
    text = to_markdown("", page.parts(study, {"table3": ["movielens", "lastfm"]}, {}))
    assert "LastFM: left out: needs --lastfm=PATH" in text
    given = dataclasses.replace(study, sources={"lastfm": "raw"})
    assert "--source=raw" in plan(given, {"table3": ["lastfm"]})[0].steps[0].command


def test_a_dry_run_prints_what_is_left_and_writes_nothing(tmp_path, capsys):
    root = tmp_path / "tables"
    assert reproduce(root, asked("fig2"), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [
        "sdpo_jax.prepare",
        "sdpo_jax.train",
        "sdpo_jax.export",
        "sdpo_jax.evaluate",
        *2 * ["sdpo_jax.train", "sdpo_jax.evaluate"],
    ]
    assert "'--config.stages=(\"sft\",)'" in lines[1]  # as a shell needs it
    assert not root.exists()


@pytest.fixture
def evaluated(study):
    """Of 40 windows SFT hits 8, S-DPO those and 6 more, SASRec 10."""
    folder = study.root / "movielens"
    data = tiny_dataset()
    meta = data.meta | {"protocol": HOSTILE, "counts": {"users": 943, "items": 48}}
    write_dataset(folder / "data", dataclasses.replace(data, meta=meta))
    hits = np.arange(N)
    for decoder in cells.DECODERS:
        add(folder / "sft", "sft", hits < 8, decoder, protocol=HOSTILE)
        add(folder / "sdpo-k3-beta1", "sdpo", hits < 14, decoder)
    add(folder / "sasrec", "sasrec", hits < 10, "score", seed=3)
    add(folder / "sft", "sft", hits < 1, split="val")
    for name, stage in (("sft", "sft"), ("sasrec", "sasrec")):  # of no figure of the paper's
        add(folder / name, stage, hits < 2, "score", "catalogue")
    return study


def lines_of(text):
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_figures_with_intervals_beside_the_paper_s(evaluated):
    text = to_markdown(page.TITLE, page.parts(evaluated, {"table1": ["movielens"]}, {}))
    rows = lines_of(text)
    # 14 - 8 of 40 windows: as the report's test works it out.
    assert rows["SFT"] == [
        "0.200 [0.105, 0.348]",
        "–",
        "0.800 [0.652, 0.895]",
        "0.200 [0.105, 0.348]",
        "40",
        "4",
        "0",
        "+0.150 [+0.018, +0.268]",
        "0.031",
    ]
    assert rows["SASRec"][:3] == ["0.250 [0.142, 0.402]", "0.3444", "0.825 [0.681, 0.913]"]
    assert rows["SASRec"][4:7] == ["40", "4", "3"]
    assert rows["S-DPO"][-2:] == ["–", "–"]
    assert rows["DPO"] == ["–"] * 9 and "; DPO: not run yet" in text
    assert "Split test_all, n = 40. Protocol: drawn for a test." in text


def test_table_3_has_the_paper_s_sizes_beside_ours(evaluated):
    text = to_markdown("", page.parts(evaluated, {"table3": ["movielens"]}, {}))
    assert lines_of(text)["MovieLens"] == ["943", "943", "48", "1,682", "–", "100,000"]


def test_a_movielens_of_another_size_has_no_figures_of_the_paper(evaluated):
    other = dataclasses.replace(evaluated, sources={"movielens": "raw"})
    text = to_markdown(
        "", page.parts(other, {"table1": ["movielens"], "table3": ["movielens"]}, {})
    )
    assert "0.3444" not in text and "100,000" not in text


def test_a_failure_is_on_the_page_with_its_line(evaluated):
    cell = cells.tuned(Place(evaluated, "movielens"), 1)
    parts = page.parts(evaluated, {"table2": ["movielens"]}, {cell.folder: f"no {HOSTILE}"})
    assert Heading("movielens/sdpo-k1-beta1: no " + HOSTILE, 3) in parts
    assert "DPO: no &lt;script&gt;" in to_html("", parts)


def test_no_text_of_a_file_is_a_tag_on_the_page(evaluated):
    parts = page.parts(evaluated, {"table1": ["movielens"], "table3": ["movielens"]}, {})
    parts += [Text(HOSTILE), Table([[HOSTILE]]), Heading(HOSTILE), Notes([HOSTILE])]
    text = to_html(HOSTILE, parts)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8
    assert "<script" not in to_markdown(HOSTILE, parts)


def test_figures_are_drawn_in_the_page_which_needs_nothing_else(evaluated):
    pytest.importorskip("matplotlib")
    folder = evaluated.root / "movielens" / "sdpo-k3-beta1" / "metrics"
    folder.mkdir()
    lines = [
        {
            "stage": "sdpo",
            "step": step,
            "validation/loss": 1.4 - step / 50,
            "rewards/chosen": step / 100,
        }
        for step in range(40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = to_html("", page.parts(evaluated, {"fig2": ["movielens"], "fig3": ["movielens"]}, {}))
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        ElementTree.fromstring(picture)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(re.findall(r'id="([^"]+)"', text))
    assert not re.search(r'(src|href)="(?!#)|<link|@import|url\((?!#)', text)


def test_without_matplotlib_there_is_a_line_in_place_of_pictures(evaluated, monkeypatch):
    def refuse(*args):
        raise ImportError("matplotlib")

    monkeypatch.setattr(page.figures, "_svg", refuse)
    text = to_html("", page.parts(evaluated, {"fig2": ["movielens"]}, {}))
    assert "<svg" not in text and "matplotlib is not installed" in text


def test_a_folder_of_another_scale_is_refused_and_another_target_adds_to_the_page(
    dataset_folder, tmp_path
):
    (tmp_path / "movielens").mkdir()
    os.symlink(dataset_folder, tmp_path / "movielens" / "data")
    for target in ("table3", "table4"):
        assert reproduce(tmp_path, asked(target))
    text = (tmp_path / "reproduce.md").read_text()
    assert "## Table 3" in text and "Pythia-2.8B: needs --pythia=FOLDER" in text
    with pytest.raises(InputError, match=r"--scale: found 'small', expected 'smoke' as in"):
        reproduce(tmp_path, asked("table3", scale="small"))
    (tmp_path / "reproduce.json").write_text('{"wanted": 1}')
    with pytest.raises(InputError, match=r"reproduce\.json: .*choose another --workdir"):
        reproduce(tmp_path, asked("table3"))


def test_the_paper_s_scale_needs_a_model(tmp_path):
    with pytest.raises(InputError, match=r"--model: found nothing, expected a folder of sdpo_jax"):
        reproduce(tmp_path, asked("table1", scale="paper", model=""), dry_run=True)


def test_every_key_that_a_training_is_given_is_one_of_the_config(study):
    for cell in plan(study, {target: ["movielens"] for target in TARGETS}):
        for step in (step for step in cell.steps if step.command[0] == "sdpo_jax.train"):
            given = re.findall(r"--config\.([a-z_.]+)=", " ".join(step.command))
            assert given and set(given) <= {name for name, _, _ in keys()}


def test_cells_are_run_by_the_commands_and_stand_on_the_page(tmp_path, monkeypatch):
    data = tiny_dataset()
    splits = data.splits | {"test_all": data.splits["test"]}
    write_dataset(tmp_path / "movielens" / "data", dataclasses.replace(data, splits=splits))
    monkeypatch.setitem(
        TARGETS, "table1", lambda place: [cells.row(place, name) for name in ("popularity", "base")]
    )
    # A training that ends at the door, as there is no model.
    assert not reproduce(tmp_path, asked("table1", model=str(tmp_path / "none")))
    text = (tmp_path / "reproduce.md").read_text()
    assert lines_of(text)["popularity"][3] == "12"
    assert "- base model, zero-shot: sdpo_jax.train: nothing to train on yet: first run" in text
    assert "<td>popularity</td>" in (tmp_path / "reproduce.html").read_text()
