"""Reading a prepared folder: every malformed line is named with its file and number."""

import json

import pytest

from sdpo_jax.data.prepared import Dataset, Window, read_dataset, write_dataset
from sdpo_jax.errors import InputError

TITLES = {item: f"title {item}" for item in range(30)}
GOOD = {"user": 1, "history": [0, 1, 2], "candidates": [4, 5, 6], "target": 5}


@pytest.fixture
def folder(tmp_path):
    rows = [Window(1, (0, 1, 2), (4, 5, 6), 5), Window("b", (3,), (7, 8, 9), 7)]
    splits = {"train": rows, "val": rows[:1], "test": rows[1:]}
    write_dataset(tmp_path / "data", Dataset("book", TITLES, splits, {"seed": 0}))
    return tmp_path / "data"


def put(folder, line, name="train.jsonl"):
    """Replaces line 2."""
    first = (folder / name).read_text().split("\n")[0]
    (folder / name).write_text(f"{first}\n{line}\n")


def test_what_is_written_is_read_back(folder):
    whole, part = read_dataset(folder), read_dataset(folder, ["test"])
    assert whole.splits["train"][1] == Window("b", (3,), (7, 8, 9), 7)
    assert whole.titles == TITLES and whole.domain == "book" and whole.meta["seed"] == 0
    assert list(part.splits) == ["test"]
    assert part.meta["fingerprint"] == whole.meta["fingerprint"]
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_the_fingerprint_is_of_what_lies_on_disk(folder):
    before = read_dataset(folder).meta["fingerprint"]
    put(folder, json.dumps(GOOD))
    assert read_dataset(folder, ["val"]).meta["fingerprint"] != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 7}, "target 7 outside the candidates"),
        ({"target": "5"}, "target '5'"),
        ({"target": 5.0}, r"target 5\.0"),
        ({"target": float("nan")}, "target nan"),
        ({"target": True}, "target True"),
        ({"candidates": [4, 5, 5]}, "with a repeated id"),
        ({"candidates": [4, 5, 99]}, "item 99 in candidates"),
        ({"candidates": [4, 5]}, "2 candidates, expected 3"),
        ({"candidates": [5]}, "candidates \\[5\\]"),
        ({"candidates": "456"}, "candidates '456'"),
        ({"history": []}, "history \\[\\]"),
        ({"history": [0, None]}, "None in history"),
        ({"history": [0, float("nan")]}, "nan in history"),
        ({"history": [0, 77]}, "item 77 in history"),
        ({"user": None}, "user None"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(folder, change, said):
    put(folder, json.dumps(GOOD | change))
    with pytest.raises(InputError, match=rf"train\.jsonl:2: found .*{said}"):
        read_dataset(folder)


@pytest.mark.parametrize("line", ['{"user": 1', "", "[1, 2]", '{"user": 1, "history": [1]}'])
def test_a_malformed_line_is_named(folder, line):
    put(folder, line + "\n")
    with pytest.raises(InputError, match=r"train\.jsonl:2: found"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": 1, "title": " "}', "title ' '"),
        ('{"id": 1, "title": "a\\nb"}', "title"),
        ('{"id": 1, "title": 3}', "title 3"),
        ('{"id": "1", "title": "a"}', "id '1'"),
        ('{"id": 0, "title": "a"}', "id 0 a second time"),
    ],
)
def test_a_wrong_item_is_named_with_its_line(folder, line, said):
    put(folder, line, "items.jsonl")
    with pytest.raises(InputError, match=rf"items\.jsonl:2: found .*{said}"):
        read_dataset(folder)


def test_candidates_with_one_title_between_them_are_an_error(folder):
    text = (folder / "items.jsonl").read_text().replace("title 6", "title 4")
    (folder / "items.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"train\.jsonl:1: found two candidates with the same"):
        read_dataset(folder)


def test_missing_and_empty_files_say_what_to_run(folder):
    (folder / "val.jsonl").write_text("")
    with pytest.raises(InputError, match=r"val\.jsonl: found no lines"):
        read_dataset(folder)
    (folder / "val.jsonl").unlink()
    with pytest.raises(InputError, match=r"val\.jsonl: .*run python -m sdpo_jax\.prepare"):
        read_dataset(folder)
    (folder / "dataset.json").write_text('{"domain": "food"}')
    with pytest.raises(InputError, match="found domain 'food'"):
        read_dataset(folder)
    with pytest.raises(InputError, match=r"nowhere/dataset\.json: .*run python -m"):
        read_dataset(folder.parent / "nowhere")


def test_writing_over_a_folder_with_something_in_it_is_refused(folder):
    dataset = read_dataset(folder)
    with pytest.raises(InputError, match="choose another --output"):
        write_dataset(folder, dataset)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
