"""Whatever happens to data files, prompt files and configs ends in one line, or is no harm."""

import contextlib
import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from damage import (
    DEEP,
    NAMES,
    ODD,
    VALUES,
    cases,
    changed_bytes,
    changed_json_line,
    damage,
    fresh,
    put,
    told_of_odd_values,
    told_or_done,
    tree,
)
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags
from test_amazon import write_2018, write_windows
from test_csv import write_csv
from test_movielens import write_form
from test_prepare import write_authors_lastfm, write_movielens

from configs import movielens
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.prompts import read_templates
from sdpo_jax.data.readers.lastfm import split_titles
from sdpo_jax.prepare import Options, prepare
from sdpo_jax.runs.config import RunConfig, keys
from sdpo_jax.system import command
from sdpo_jax.system.errors import InputError
from sdpo_jax.train import check_folders

KEYS = sorted(name for name, _, _ in keys())

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def movielens_folder(tmp_path_factory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("raw") / "ml", users=12, items=40, each=8)


@pytest.fixture(scope="session")
def lastfm_folders(tmp_path_factory) -> dict[str, Path]:
    """The three forms of LastFM that prepare takes."""
    names = [":wumpscut:", "Welle:Erdball", *map(str, range(2, 40))]
    found = {}
    for form in ("lists", "lists with ids", "sequences"):
        found[form] = folder = tmp_path_factory.mktemp("raw") / "lastfm"
        if form == "sequences":
            folder.mkdir()
            sequences = {"train": [[0, 1, 2, 3, 4]], "val": [[5, 6, 7, 8]], "test": [[3, 2, 1, 0]]}
            (folder / "sequences.json").write_text(json.dumps(sequences))
        else:
            write_authors_lastfm(folder, names)
        if form != "lists":
            lines = (f"{item}::{name}\n" for item, name in enumerate(names))
            (folder / "id2name.txt").write_text("".join(lines))
    return found


@cases(60)
@given(st.data())
def test_a_damaged_prepared_folder_is_one_line(dataset_folder, case, data):
    file = data.draw(st.sampled_from(sorted(path.name for path in dataset_folder.iterdir())))
    folder = fresh(dataset_folder, case)
    put(folder / file, data.draw(damage(dataset_folder / file)))
    dataset = told_or_done(lambda: read_dataset(folder), folder.parent)
    if dataset:
        json.dumps([dataset.titles, dataset.meta], ensure_ascii=False).encode()


def test_every_odd_value_of_a_dataset_json_is_one_line(dataset_folder, case):
    folder = fresh(dataset_folder, case)
    told_of_odd_values(folder / "dataset.json", lambda: read_dataset(folder, ["test"]))


@cases(20)
@given(st.data())
def test_a_damaged_movielens_folder_is_one_line(movielens_folder, case, data):
    file = data.draw(st.sampled_from(("u.data", "u.item")))
    folder = fresh(movielens_folder, case)
    put(folder / file, data.draw(damage(movielens_folder / file)))
    output = str(folder.parent / "out")
    if told_or_done(
        lambda: prepare("movielens", str(folder), output),
        folder.parent,
        str(folder.parent),
        "items:",
    ):
        read_dataset(output)


@pytest.mark.parametrize(
    "kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_zip_is_one_line(movielens_folder, tmp_path, kind):
    path = tmp_path / "ml.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for file in ("u.data", "u.item"):
            archive.write(movielens_folder / file, file)
    whole, output = path.read_bytes(), tmp_path / "out"

    @cases(20)
    @given(changed_bytes(whole, 80) | changed_bytes(whole[-200:]).map(lambda b: whole[:-200] + b))
    def check_one(content):
        path.write_bytes(content)
        if told_or_done(
            lambda: prepare("movielens", str(path), str(output)), tmp_path, str(tmp_path), "items:"
        ):
            assert read_dataset(output)
            for file in output.iterdir():
                file.unlink()

    check_one()


@cases(48)
@given(st.data())
def test_a_damaged_lastfm_folder_is_one_line(lastfm_folders, case, data):
    source = lastfm_folders[data.draw(st.sampled_from(sorted(lastfm_folders)))]
    file = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    candidates = data.draw(st.sampled_from(("independent", "released")))
    folder = fresh(source, case)
    put(folder / file, data.draw(damage(source / file)))
    output = str(folder.parent / "out")
    if told_or_done(
        lambda: prepare("lastfm", str(folder), output, candidates),
        folder.parent,
        str(folder.parent),
        "items:",
    ):
        read_dataset(output)


@pytest.fixture(scope="session")
def other_folders(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """Forms of Amazon and MovieLens, and the data set that each is of."""
    place = tmp_path_factory.mktemp("others")
    for form, ending, separator in (("ml-1m", "dat", "::"), ("ml-20m", "csv", ",")):
        write_form(place / form, form)
        films = [(item, f"Film {item} (1990)", "Drama") for item in range(100, 140)]
        rows = [(u, 100 + (u + n) % 40, 5, 9 * u + n) for u in range(20, 32) for n in range(8)]
        for name, lines in (("movies", films), ("ratings", rows)):
            with open(place / form / f"{name}.{ending}", "a") as file:
                file.writelines(separator.join(map(str, line)) + "\n" for line in lines)
    return {
        "reviews": ("amazon", write_2018(place / "reviews")),
        "windows": ("amazon", write_windows(place / "windows")),
        "ml-1m": ("movielens", place / "ml-1m"),
        "ml-20m": ("movielens", place / "ml-20m"),
    }


@cases(80)
@given(st.data())
def test_a_damaged_folder_of_amazon_or_a_larger_movielens_is_one_line(other_folders, case, data):
    dataset, source = other_folders[data.draw(st.sampled_from(sorted(other_folders)))]
    file = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    folder = fresh(source, case)
    if file.endswith(".gz"):
        text = gzip.decompress((source / file).read_bytes())
        damaged = (changed_json_line(text) | changed_bytes(text, 600)).map(gzip.compress)
        put(folder / file, data.draw(damaged | changed_bytes((source / file).read_bytes())))
    else:
        put(folder / file, data.draw(damage(source / file)))
    output = str(folder.parent / "out")
    options = Options(num_candidates=4)
    if told_or_done(
        lambda: prepare(dataset, str(folder), output, options=options),
        folder.parent,
        str(folder.parent),
        "items:",
    ):
        read_dataset(output)


@cases(40)
@given(st.data())
def test_a_damaged_csv_file_is_one_line(tmp_path_factory, data):
    file = write_csv(tmp_path_factory.mktemp("csv") / "my.csv")
    put(file, data.draw(damage(file)))
    output = str(file.parent / "out")
    if told_or_done(
        lambda: prepare("csv", str(file), output), file.parent, str(file.parent), "items:"
    ):
        read_dataset(output)


def test_a_history_of_thousands_of_joined_titles_is_cut_at_once():
    known = {"a", "a::a", "b"}
    assert split_titles("a::" * 2000 + "c", known) is None
    assert split_titles("a::" * 2000 + "b", known) == ["a"] * 2000 + ["b"]
    assert split_titles("a:::x:", {"a", ":x:"}) == ["a", ":x:"]


@cases(24)
@given(st.data())
def test_a_damaged_prompt_file_is_one_line(case, data):
    path = fresh(ROOT / "configs" / "prompts", case) / "movie-chatml.txt"
    content = data.draw(damage(path) | st.sampled_from([d.encode() for d in DEEP.values()]))
    put(path, content)
    templates = told_or_done(lambda: read_templates(path), path.parent)
    assert not templates or all(not t.startswith("\ufeff") for t in templates)


def parsed(*arguments: str):
    """The config that a command line gives, as `run_command` parses it; else what it prints."""
    argv = ["train", f"--config={ROOT}/configs/movielens.py", *arguments]
    values, told = flags.FlagValues(), io.StringIO()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    with mock.patch.object(flags, "FLAGS", values), contextlib.redirect_stderr(told):
        try:
            command._parse(argv)
        except SystemExit as end:
            assert end.code == 2
            return told.getvalue()
    return values.config


TEXTS = st.sampled_from(
    [
        *(str(value) for value in ODD if value != "\0"),
        "1_000",
        "0x10",
        "(",
        "()",
        "('sft',)",
        "('sft', 'sft')",
        "([],)",
        "({},)",
        "(1,)",
        "None",
        "-" * 3000 + "1",
        "(" * 300,
        "(" * 90 + ")" * 90,
        "9" * 5000,
        "sft,sdpo",
        "__import__('os').system('x')",
        "1e999",
    ]
) | st.text(max_size=8).filter(lambda text: "\0" not in text)


@pytest.mark.filterwarnings("ignore:the load_module")
@cases(80)
@given(st.sampled_from(KEYS), TEXTS)
def test_a_wrong_value_on_the_command_line_is_one_line(case, key, text):
    config = parsed(f"--config.{key}={text}")
    if isinstance(config, str):
        assert config.startswith("error: ") and config.count("\n") == 1
        assert key in config or "nested too deeply on the command line" in config
        return
    if read := told_or_done(lambda: RunConfig.of(config.to_dict()), case, f"config.{key}"):
        told_or_done(lambda: check_folders(read, "movielens"), case, "nothing to train on yet")


@cases(60)
@given(st.sampled_from(KEYS), VALUES | st.just({1: 2}))
def test_a_wrong_value_in_a_config_file_is_one_line(case, key, value):
    content = movielens.get_config().to_dict()
    *folders, name = key.split(".")
    (content[folders[0]] if folders else content)[name] = value
    try:
        config = ConfigDict(content)
    except ValueError:  # a dot in a key
        return
    told_or_done(lambda: RunConfig.of(config.to_dict()), case, f"config.{key}")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_a_config_lacks_is_named(key):
    config = movielens.get_config()
    *folders, name = key.split(".")
    with config.unlocked():
        del (config[folders[0]] if folders else config)[name]
    with pytest.raises(InputError, match=f"config.{key}: found nothing, expected a value"):
        RunConfig.of(config.to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_path_that_is_not_there_is_one_line(name, tmp_path):
    path = str(tmp_path / "x" / "y" / "z" / name / "w")
    for call in (
        lambda: read_dataset(path),
        lambda: read_templates(path),
        lambda: prepare("movielens", path, str(tmp_path / "out")),
        lambda: prepare("lastfm", path, str(tmp_path / "out")),
        lambda: prepare("goodreads", path, str(tmp_path / "out")),
        lambda: prepare("amazon", path, str(tmp_path / "out")),
        lambda: prepare("csv", path, str(tmp_path / "out")),
    ):
        with pytest.raises(InputError):
            told_or_done(call, tmp_path) or call()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_an_output_holds_the_data_or_is_one_line(movielens_folder, name, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    output = tmp_path / "a" / "b" / name
    arguments = ("movielens", str(movielens_folder), str(output))
    if told_or_done(lambda: prepare(*arguments), tmp_path):
        assert read_dataset(output).splits["train"]
    elif name != "..":
        assert len(name) == 300


def test_a_name_of_a_path_reaches_the_terminal_as_one_printable_line(tmp_path):
    name = "a\n\x1b[31mb\udcff"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sdpo_jax.prepare",
            "--dataset=movielens",
            f"--source={tmp_path / name}",
            f"--output={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/a \\x1b[31mb\\udcff: found No such file")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
