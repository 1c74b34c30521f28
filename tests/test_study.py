"""The study on histories: its cells, and the verdicts on its page."""

import dataclasses
import re

import numpy as np
import pytest
from test_reproduce import add, lines_of

from sdpo_jax.reports.document import to_html, to_markdown
from sdpo_jax.reproduction import histories, history_page, page
from sdpo_jax.reproduction.cells import DATASETS, SCALES, Place, Study
from sdpo_jax.reproduction.plan import plan

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
    score = histories.sft(Place(study, "amazon")).steps[1].command
    assert not [option for option in score if option.startswith("--limit")]


def test_the_first_row_of_every_data_set_comes_before_the_second_of_any(study):
    planned = plan(study, {"history": ["movielens", "lastfm"]})
    names = [str(cell.folder.relative_to(study.root)) for cell in planned]
    assert names.index("lastfm/history/sft") < names.index("movielens/history/sdpo-k3-beta1")
    assert names.index("movielens/history/sdpo-k3-beta1") < names.index("movielens/history/random")


def test_a_claim_is_shown_refuted_or_neither(evaluated):
    text = to_markdown(page.TITLE, page.parts(evaluated, {"history": ["movielens"]}, {}))
    rows = lines_of(text)
    candidates, catalogue = rows["S-DPO is ahead of SFT"]
    assert candidates.startswith("shown: +0.7") and "0.001" in candidates
    assert catalogue.startswith("refuted: -0.4")
    assert rows["K = 15 is ahead of K = 3"] == ["no figures", "no figures"]
    assert rows["DPO is ahead of SFT"][0].startswith("not shown: +0.000")
    assert rows["S-DPO, K = 3"][0].startswith("0.900 [")
    assert re.search(r"- .*SASRec.*: not run yet", text)


def test_every_claim_names_rows_that_are_run(study):
    for dataset in DATASETS:
        place = Place(study, dataset)
        planned = {row.cell.folder for row in histories.rows(place)}
        for _, first, second in history_page.claims(place):
            assert {first.cell.folder, second.cell.folder} <= planned


def test_the_page_has_pictures_where_there_are_figures(evaluated):
    pytest.importorskip("matplotlib")
    text = to_html("", page.parts(evaluated, {"history": ["movielens"]}, {}))
    assert "HR@1 among 20 candidates over K negatives" in text
