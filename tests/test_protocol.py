"""Options of prepare: how windows are split, how long they are, who is dropped, what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_csv import write_csv
from test_goodreads import write_stand_in
from test_prepare import write_authors_lastfm

from sdpo_jax.data.prepared import UserSequence, read_dataset
from sdpo_jax.prepare import Options, prepare, report
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


def prepared(tmp_path, rows=None, seed=0, **options):
    """The data set of test_csv.py, or of (user, item, time, rating) rows."""
    source = tmp_path / "my.csv"
    if rows is None:
        write_csv(source)
    else:
        lines = [f"{user},{item},Title {item},{time},{rating}" for user, item, time, rating in rows]
        lines += [f"nobody,{item},Title {item},0,1" for item in range(40)]
        source.write_text("\n".join(["user,item,title,timestamp,rating", *lines]))
    output, options = str(tmp_path / "out"), Options(**options)
    meta = prepare("csv", str(source), output, seed=seed, options=options)
    return meta, read_dataset(tmp_path / "out")


def test_by_time_no_training_target_is_later_than_one_of_the_test(tmp_path):
    meta, data = prepared(tmp_path, split="time")
    # User u's items are 100 seconds after user u - 1's; of 7 rated 3 or more, 4 are targets.
    assert meta["counts"]["windows"] == {"train": 38, "val": 5, "test": 5}
    order = [int(w.user) * 10 + w.place for rows in data.splits.values() for w in rows]
    assert order == sorted(order)
    assert {w.user for w in data.splits["train"]} & {w.user for w in data.splits["val"]} == {"9"}
    assert "windows by the time of their target, 8:1:1" in meta["protocol"]
    assert meta["split"] == "time"


def test_the_order_of_equal_times_is_drawn_from_the_seed_and_not_the_files(tmp_path):
    """Sorted by item, as many files are, a rule without taste would know what comes next."""
    rows = [(user, item, 1000 + item // 2, 5) for user in range(40) for item in range(6)]

    def orders(name, rows, **options):
        (tmp_path / name).mkdir()
        meta, data = prepared(tmp_path / name, rows, **options)
        told = "60.0% of neighbouring interactions have the same time: their order is drawn"
        assert any(note.startswith(told) for note in meta["notes"])
        return {
            user: [int(data.titles[item].split()[1]) for item in sequence.items]
            for user, sequence in data.sequences.items()
        }

    found = orders("sorted", rows)
    assert found == orders("reversed", rows[::-1])
    assert found != orders("another seed", rows, seed=1)
    pairs = [items[i : i + 2] for items in found.values() for i in (0, 2, 4)]
    assert all(sorted(pair) == [pair[0] // 2 * 2, pair[0] // 2 * 2 + 1] for pair in pairs)
    assert 0.35 < np.mean([first < second for first, second in pairs]) < 0.65


def test_a_source_whose_times_leave_the_order_of_most_users_open_is_refused(tmp_path):
    rows = [(user, item, 1000, 5) for user in range(12) for item in range(6)]
    with pytest.raises(InputError, match=r"100.0% of neighbouring interactions have the same time"):
        prepared(tmp_path, rows)
    assert not (tmp_path / "out").exists()
    meta, _ = prepared(tmp_path, rows, allow_ties=True)
    assert any(note.startswith("100.0% of neighbouring") for note in meta["notes"])


def test_users_without_a_window_have_no_say_in_whether_times_tell_an_order(tmp_path):
    """As of a shop's baskets of two, each with one time."""
    rows = [(user, item, 100 * user + item, 5) for user in range(12) for item in range(6)]
    rows += [(100 + user, item, 9000 + user, 5) for user in range(99) for item in range(2)]
    meta, _ = prepared(tmp_path, rows, split="leave-one-out")
    assert not any("the same time" in note for note in meta["notes"])


def test_one_is_left_out_of_each_user_for_the_test_and_one_for_val(tmp_path):
    meta, data = prepared(tmp_path, split="leave-one-out")
    assert meta["counts"]["windows"] == {"train": 24, "val": 12, "test": 12}
    for place, split in ((6, "test"), (5, "val")):
        assert [w.user for w in data.splits[split]] == [str(user) for user in range(12)]
        assert {w.place for w in data.splits[split]} == {place}
    assert {w.place for w in data.splits["train"]} == {3, 4}


def test_users_with_few_windows_are_left_out_of_train_first(tmp_path):
    rows = [
        (user, item, 10 * user + item, 3) for user in range(12) for item in range(user // 3 + 3)
    ]
    _, data = prepared(tmp_path, rows, split="leave-one-out")
    assert [w.user for w in data.splits["train"]] == ["9", "10", "11"]
    assert [w.user for w in data.splits["val"]] == ["6", "7", "8", "9", "10", "11"]
    assert [w.user for w in data.splits["test"]] == [str(user) for user in range(3, 12)]
    assert [*data.sequences] == [str(user) for user in range(3, 12)]


@pytest.mark.parametrize(
    ("history", "lengths", "said"),
    [
        (2, {2}, "history 2 to 2 items"),
        (5, {3, 4, 5}, "history 3 to 5 items"),
        (50, {3, 4, 5, 6}, "history 3 to 50 items"),
    ],
)
def test_a_window_shows_as_many_titles_as_asked_for(tmp_path, history, lengths, said):
    meta, data = prepared(tmp_path, history=history)
    assert data.meta["history"] == history and said in meta["protocol"]
    assert {len(w.history) for w in data.splits["train"]} == lengths
    for window in data.splits["train"]:
        items = data.sequences[window.user].items
        assert items[window.place] == window.target
        assert window.history == items[max(0, window.place - history) : window.place]


def test_users_and_items_with_few_interactions_are_dropped_until_none_is(tmp_path):
    """Items 20 and 21 have too few, then user 50 has, then nobody."""
    rows = [(user, item, 100 * user + item, 3) for user in range(12) for item in range(10)]
    rows += [(50, item, item, 3) for item in (*range(8), 20, 21)]
    rows += [(3, 20, 1, 5), (3, 21, 2, 1), (3, 35, 3, 1), (4, 9, 999, 1)]
    meta, data = prepared(tmp_path, rows, min_interactions=10, history=3, num_candidates=4)
    assert "users and items with 10 or more" in meta["protocol"] and meta["min_interactions"] == 10
    assert [*data.sequences] == [str(user) for user in range(12)]
    assert set(data.titles.values()) == {f"Title {item}" for item in range(10)}
    assert set(data.attributes) == set(data.titles)
    assert meta["counts"]["interactions"] == 120 and meta["counts"]["items"] == 10
    assert not any(sequence.disliked for sequence in data.sequences.values())


def test_candidates_are_as_many_as_asked_for_and_twenty_are_those_of_the_default(tmp_path):
    meta, data = prepared(tmp_path, num_candidates=7)
    assert meta["num_candidates"] == 7 and "7 candidates: the target and 6" in meta["protocol"]
    assert {len(w.candidates) for rows in data.splits.values() for w in rows} == {7}
    assert "independent, 7 per window" in report(meta, "out")
    for name, options in (("a", Options()), ("b", Options(num_candidates=20))):
        prepare("csv", str(tmp_path / "my.csv"), str(tmp_path / name), options=options)
    assert read_dataset(tmp_path / "a").splits == read_dataset(tmp_path / "b").splits


def test_disliked_items_have_the_place_that_they_had_in_time(tmp_path):
    rows = [
        (1, 30, 1, 2),
        (1, 0, 2, 3),
        (1, 1, 3, 5),
        (1, 31, 4, 1),
        (1, 2, 5, 4),
        (1, 30, 6, 1),
        (1, 3, 7, 3),
        (1, 2, 8, 1),
        (1, 32, 9, 2),
        (1, 4, 10, 1),
        (1, 4, 11, 5),
        (1, 33, 12, 2.5),
    ]
    rows += [(user, item, 100 * user + item, 3) for user in range(2, 12) for item in range(5)]
    _, data = prepared(tmp_path, rows)
    sequence = data.sequences["1"]
    named = [(place, data.titles[item]) for place, item in sequence.disliked]
    # 30 the first time; not 2, which was liked before, nor 4, which was later.
    assert named == [(0, "Title 30"), (2, "Title 31"), (4, "Title 32"), (5, "Title 33")]
    assert [data.titles[item] for item in sequence.items] == [f"Title {n}" for n in range(5)]
    assert data.sequences["2"] == UserSequence("2", sequence.items, ())


def test_an_item_of_a_liked_title_is_not_disliked(tmp_path):
    """Two ids may share a title, and the title is what a model answers."""
    rows = [f"1,{item},Title {item},{item},5" for item in range(5)]
    rows += ["1,copy,Title 2,9,1", "1,other,Other,9,1"]
    rows += [f"{u},{i},Title {i},{100 * u + i},5" for u in range(2, 12) for i in range(5)]
    rows += [f"nobody,{item},Title {item},0,1" for item in range(5, 40)]
    (tmp_path / "my.csv").write_text("\n".join(["user,item,title,timestamp,rating", *rows]))
    prepare("csv", str(tmp_path / "my.csv"), str(tmp_path / "out"))
    data = read_dataset(tmp_path / "out")
    assert [data.titles[item] for _, item in data.sequences["1"].disliked] == ["Other"]


def test_further_columns_of_a_csv_file_are_attributes_of_the_item(tmp_path):
    source = write_csv(tmp_path / "my.csv")
    header, *lines = source.read_text().splitlines()
    rows = [f"{line},{n},,x{n}" for n, line in enumerate(lines)]
    source.write_text("\n".join([f"{header},shelf,,id", *rows]))
    prepare("csv", str(source), str(tmp_path / "out"))
    data = read_dataset(tmp_path / "out")
    assert data.attributes[0] == {"item": "i0", "shelf": "0"}
    assert (
        data.attributes[8] == {"item": "i8", "shelf": "15"} and data.titles[8] == "Title, the 8th"
    )


@pytest.mark.parametrize(
    ("option", "changed"),
    [("split", "time"), ("history", 5), ("min_interactions", 2), ("num_candidates", 10)],
)
def test_another_choice_is_not_written_over_a_prepared_folder(tmp_path, option, changed):
    prepared(tmp_path)
    with pytest.raises(InputError, match=rf"dataset\.json: found {option} .*{option}"):
        prepare(
            "csv",
            str(tmp_path / "my.csv"),
            str(tmp_path / "out"),
            options=Options(**{option: changed}),
        )


@pytest.mark.parametrize(
    ("option", "value"), [("split", "time"), ("history", 5), ("min_interactions", 2)]
)
def test_lastfm_has_the_windows_of_its_authors(tmp_path, option, value):
    write_authors_lastfm(tmp_path / "lastfm", [*map(str, range(40))])
    with pytest.raises(InputError, match=rf"^--{option}: found {value}, expected none for this"):
        prepare(
            "lastfm",
            str(tmp_path / "lastfm"),
            str(tmp_path / "out"),
            options=Options(**{option: value}),
        )
    options = Options(history=10, num_candidates=4)
    meta = prepare("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "out"), options=options)
    assert meta["split"] == "fixed" and meta["num_candidates"] == 4


def test_released_lists_have_their_own_length(tmp_path):
    write_authors_lastfm(tmp_path / "lastfm", [*map(str, range(40))])
    arguments = ("lastfm", str(tmp_path / "lastfm"), str(tmp_path / "out"), "released")
    with pytest.raises(InputError, match=r"^--num_candidates: found 4, expected none with --cand"):
        prepare(*arguments, options=Options(num_candidates=4))
    assert prepare(*arguments)["num_candidates"] == 20


def test_the_stand_in_keeps_its_splits_but_may_show_more_or_less(tmp_path):
    source = write_stand_in(tmp_path / "raw")
    for options in (Options(split="time"), Options(min_interactions=5)):
        with pytest.raises(InputError, match="expected none for this goodreads, whose splits are"):
            prepare("goodreads", source, str(tmp_path / "out"), options=options)
    prepare("goodreads", source, str(tmp_path / "out"), options=Options(history=3))
    windows = read_dataset(tmp_path / "out").splits["train"]
    assert {len(w.history) for w in windows} == {3}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--split=random", "--split"),
        ("--history=0", "--history"),
        ("--num_candidates=1", "--num_c"),
        ("--min_interactions=0", "--min_interactions"),
        ("--min_interactions=99", "my.csv: found no"),
        ("--num_candidates=99", "fewer --num_candidates"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(tmp_path, flag, said):
    source = write_csv(tmp_path / "my.csv")
    command = [
        sys.executable,
        "-m",
        "sdpo_jax.prepare",
        "--dataset=csv",
        f"--source={source}",
        f"--output={tmp_path / 'out'}",
        flag,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said.lstrip("-") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my.csv"]
