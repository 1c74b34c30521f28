"""The study on histories: its cells, and the verdicts on its page."""

import ast
import dataclasses
import functools
import importlib
import re
import time
from pathlib import Path

import numpy as np
import pytest
from test_reproduce import add, lines_of
from tiny import tiny_dataset

from sdpo_jax.data.prepared import write_dataset
from sdpo_jax.evaluation import window_groups
from sdpo_jax.reports.document import to_html, to_markdown
from sdpo_jax.reproduce import sparingly
from sdpo_jax.reproduction import histories, history_page, page
from sdpo_jax.reproduction.cells import DATASETS, SCALES, Place, Study
from sdpo_jax.reproduction.plan import plan
from sdpo_jax.runs.config import RunConfig

N = 40


@pytest.fixture
def study(tmp_path):
    sources = {"amazon": "raw", "lastfm": "raw"}
    return Study(tmp_path, SCALES["medium"], "model", sources=sources)


@pytest.fixture
def evaluated(study):
    """Of 40 windows SFT hits 8, DPO the same, S-DPO all but 4; over the catalogue SFT more."""
    folder = study.root / "movielens" / "history"
    hits = np.arange(N)
    for name, stage, candidates, catalogue in (
        ("sft", "sft", hits < 8, hits < 20),
        ("sdpo-k1-beta1", "sdpo", hits < 8, hits < 20),
        ("sdpo-k3-beta1", "sdpo", hits < 36, hits < 2),
    ):
        add(folder / name, stage, candidates, "score")
        add(folder / name, stage, catalogue, "beam", "catalogue", missed=None)
    return study


def test_cells_have_their_folder_config_and_validation_windows(study):
    planned = plan(study, {"history": ["movielens", "lastfm"]})
    folders = {str(cell.folder.relative_to(study.root)): cell for cell in planned}
    assert len(folders) == len(planned)
    cell = folders["lastfm/history/sdpo-k15-beta1"]
    train, score, beam = (step.command for step in cell.steps)
    assert "--config=configs/history.py:medium" in train
    assert "--config.validation_split=val" in train and "--config.num_negatives=15" in train
    assert "--config.microbatch=2" in train
    small = dataclasses.replace(study, scale=SCALES["small"], options=("--config.microbatch=1",))
    tuned = histories.tuned(Place(small, "lastfm"), 7).steps[0].command
    given = [flag for flag in tuned if "microbatch" in flag]
    assert given == ["--config.microbatch=1", "--config.microbatch=1"]  # the options' comes last
    sft = study.root / "lastfm" / "history" / "sft"
    assert f"--config.lora.init_from={sft / 'adapter'}" in train
    assert score[-3:] == ("--decoder=score", "--split=test", "--limit=2000")
    assert {"--rank=catalogue", "--decoder=beam"} <= set(beam)
    assert "--config.validation_split=val_all" in folders["movielens/history/sft"].steps[0].command
    networks = folders["movielens/history/sasrec"].steps[0].command
    assert "--candidates_only" not in networks


def test_all_of_amazon_s_published_windows_are_evaluated(study):
    score = histories.sft(Place(study, "amazon")).steps[2].command
    assert not [option for option in score if option.startswith("--limit")]


def test_the_first_row_of_every_data_set_comes_before_the_second_of_any(study):
    planned = plan(study, {"history": ["movielens", "lastfm"]})
    names = [str(cell.folder.relative_to(study.root)) for cell in planned]
    assert names.index("lastfm/history/sft") < names.index("movielens/history/sdpo-k3-beta1")
    assert names.index("movielens/history/sdpo-k3-beta1") < names.index("movielens/history/random")


def test_a_claim_is_shown_refuted_or_neither(evaluated):
    text = to_markdown(page.TITLE, page.parts(evaluated, {"history": ["movielens"]}, {}))
    of_candidates, rest = text.split("HR@10 over the catalogue", 1)
    of_catalogue, rows = rest.split("### MovieLens")[0], lines_of(of_candidates) | lines_of(rest)
    (candidates,) = lines_of(of_candidates)["S-DPO is ahead of SFT"]
    assert re.match(r"shown, p .*0.001: \+0.7", candidates)
    (catalogue,) = lines_of(of_catalogue)["S-DPO is ahead of SFT"]
    assert re.match(r"refuted, p .*: -0.4", catalogue)
    assert re.search(r"No figures yet: .*K = 15 is ahead of K = 3;", text)
    assert "Systems" in text and "Number of negatives" not in text  # K = 1 and 3 are above
    assert rows["DPO is ahead of SFT"][0].startswith("not shown, p 1.000: +0.000")
    assert rows["S-DPO, K = 3"][0].startswith("0.900 [")
    assert "S-DPO is ahead of SFT, HR@1 of 20, K = 3: shown on 1 of 1 data sets." in text
    assert re.search(r"- .*SASRec.*: not run yet", text)


def test_cold_targets_and_short_histories_are_reported_apart(evaluated):
    folder = evaluated.root / "movielens" / "data"
    data = tiny_dataset()
    windows = data.splits["test"]
    trained = [window.target for window in data.splits["train"]]
    write_dataset(folder, dataclasses.replace(data, splits=data.splits | {"test_all": windows}))
    assert window_groups.read(folder, "test_all") == {
        "cold targets": {i for i, w in enumerate(windows) if trained.count(w.target) < 5},
        "short histories": {i for i, w in enumerate(windows) if len(w.history) < 5},
    }
    text = to_markdown(page.TITLE, page.parts(evaluated, {"history": ["movielens"]}, {}))
    assert "cold targets: HR@1 of 20" in text


def test_the_page_is_written_again_once_a_twentieth_of_the_time_allows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    written = []

    def write(failed):
        written.append(now[0])
        now[0] += 2

    called = sparingly(write)
    for moment in (0, 5, 39, 40, 50, 100):
        now[0] = moment
        called({})
    assert written == [0, 40, 100]


def test_a_row_of_one_seed_starts_from_the_sft_of_that_seed(study):
    cell = histories.over_seeds(Place(study, "movielens"))[1].cell
    train = cell.steps[0].command
    assert "--config.seed=1" in train
    start = cell.folder.parent / "sft-seed1" / "adapter"
    assert f"--config.lora.init_from={start}" in train
    first = next(need for need in cell.needs if need.folder.name == "sft-seed1")
    assert "--config.seed=1" in first.steps[0].command


def test_the_keys_of_every_cell_make_a_config(study):
    planned = plan(study, {"history": ["movielens", "amazon"]})
    trainings = [c.steps[0].command for c in planned if c.steps[0].command[0][-5:] == "train"]
    assert len(trainings) > 50
    for _, config, _, *options in trainings:
        file, _, variant = config.removeprefix("--config=configs/").partition(":")
        made = importlib.import_module(f"configs.{file[:-3]}").get_config(variant)
        for option in options:
            key, _, value = option.removeprefix("--config.").partition("=")
            kind = type(functools.reduce(getattr, key.split("."), made))
            read = value if kind is str else ast.literal_eval(value)
            made.update_from_flattened_dict({key: read})
        RunConfig.of(made.to_dict())


def test_a_test_of_the_setup_trains_no_whole_epochs(study):
    smoke = dataclasses.replace(study, scale=SCALES["smoke"])
    commands = [
        step.command for cell in plan(smoke, {"history": ["movielens"]}) for step in cell.steps
    ]
    assert commands and not [c for c in commands for option in c if option.endswith("max_steps=0")]


def test_the_paper_s_prompts_are_rows_where_the_paper_has_the_data(study):
    rows = histories.over_prompts(Place(study, "lastfm"))
    assert [row.stage for row in rows] == ["sft", "sdpo"] * 2
    starts = []
    for row in rows:
        train, *_, evaluation = (step.command for step in row.cell.steps)
        assert "--config=configs/lastfm.py:medium" in train
        assert "--decoder=score" in evaluation
        starts += [Path(o.partition("=")[2]) for o in train if o.startswith("--config.lora.init")]
    folder = rows[0].cell.folder
    assert starts == [
        folder / "adapter",
        folder.with_name("sft") / "adapter",
        folder.with_name("paper-prompts-from-histories") / "adapter",
    ]
    assert histories.over_prompts(Place(study, "amazon")) == []


def test_every_claim_names_rows_that_are_run(study):
    labels = {row.label for row in histories.rows(Place(study, "movielens"))}
    assert {label for _, *pair in history_page.CLAIMS for label in pair} <= labels
    for dataset in DATASETS:
        place = Place(study, dataset)
        planned = {row.cell.folder for row in histories.rows(place)}
        for _, first, second in history_page.claims(place):
            assert {first.cell.folder, second.cell.folder} <= planned


def test_the_page_has_pictures_where_there_are_figures(evaluated):
    pytest.importorskip("matplotlib")
    text = to_html("", page.parts(evaluated, {"history": ["movielens"]}, {}))
    assert "HR@1 among 20 candidates over K negatives" in text
