"""Mistakes a person can make end in one line that names the key or the file; nothing is written."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainers import train

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.system.errors import InputError
from sdpo_jax.train import check_length

ROOT = Path(__file__).parents[1]


def refused(config, run: Path) -> str:
    with pytest.raises(InputError) as error:
        train(config, run, stop=None)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "float16", "float32, bfloat16"),
        ("batch_layout", "packed", "shared_prefix, padded"),
        ("remat", "some", "none, cheap, full, least"),
        ("stages", ("sdpo", "sft"), "in this order"),
        ("stages", ("dpo",), "sft, sdpo"),
        ("beta", 0.0, "more than 0"),
        ("beta", math.nan, "more than 0"),
        ("num_negatives", 20, "at most 19"),
        ("batch_size", 12, "multiple of 8"),
        ("microbatch", 0, "more than 0"),
        ("mesh.tensor", 3, "8 devices"),
        ("sft.epochs", 0, "more than 0"),
        ("sdpo.learning_rate", -1e-5, "more than 0"),
        ("sft.max_steps", -1, "0 or more"),
        ("warmup", 1.0, "0 <= it < 1"),
        ("lora.dropout", 1.5, "0 <= it < 1"),
        ("lora.rank", 0, "more than 0"),
        ("lora.targets", ("q", "query"), "gate, up, down"),
        ("validation_split", "test", "has val: choose"),
        ("max_length", 3, "max_length"),
        ("prompt", "titles", "candidates, history"),
        ("history", 0, "more than 0"),
        ("segment", 0, "more than 0"),
        ("negatives", "random", "shown, uniform, popularity, hard, disliked"),
        ("redraw", 1, "True or False"),
        ("popularity_power", -0.5, "0 or more"),
        ("hard_band", (0.5, 0.2), "the lower first"),
        ("hard_pool", 0, "more than 0"),
        ("tune", "all", "lora, full"),
        ("prompt_file", "no/such/file.txt", "No such file"),
        ("dataset", "no/such/data", "sdpo_jax.prepare"),
        ("model", "no/such/model", "sdpo_jax.convert"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_is_right(config, key, value, words, tmp_path):
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: value})
    message = refused(config, tmp_path / "run")
    assert words in message
    assert key in message or str(value) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "history", "chat_template": True}, "config.chat_template is True"),
        ({"prompt": "history", "item_vectors": "x"}, "config.item_vectors is 'x'"),
        ({"prompt": "history", "max_length": 40}, "raise --config.max_length"),
        ({"prompt": "history", "batch_size": 512}, "give no batch of 512"),
        ({"tune": "full", "base_dtype": "int8"}, "set --config.base_dtype=same"),
        ({"tune": "full", "lora.init_from": "x"}, "config.lora.init_from is 'x'"),
        ({"negatives": "hard", "hard_pool": 2}, "at least config.num_negatives=3"),
        ({"negatives": "hard", "hard_pool": 99}, "config.hard_pool: found 44 titles"),
        ({"negatives": "uniform", "num_negatives": 45}, "config.num_negatives: found 44 titles"),
    ],
)
def test_values_that_do_not_go_together_are_refused(config, changes, words, tmp_path):
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    assert words in refused(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 200,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 50,
}


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 200),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 200),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 400),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 180),  # 20 of them for an answer
        ({"max_position_embeddings": None}, 10**9),
    ],
    ids=["default", "llama3", "linear", "dynamic", "not said"],
)
def test_prompts_beyond_the_models_positions_are_refused_whatever_its_rope(rope, positions):
    content = {key: value for key, value in (SMALL | rope).items() if value is not None}
    decoder = DecoderConfig.from_hf(content, "config.json")
    config = SimpleNamespace(max_length=positions, model="m")
    check_length(config, decoder, 20)
    if positions < 10**9:
        config.max_length += 1
        with pytest.raises(InputError, match=f"set --config.max_length={positions}"):
            check_length(config, decoder, 20)


def test_more_batch_than_windows_is_refused(config, tmp_path):
    config.batch_size, config.sft.epochs = 128, 1
    assert "64 examples x 1 epochs" in refused(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("items.jsonl", '"a0"', '" "', "items.jsonl:1"),
        ("items.jsonl", '"a0"', '"</s>"', "ordinary tokens"),
        ("items.jsonl", '"id": 1,', '"id": 0,', "a second time"),
        ("train.jsonl", '"place": 3', '"place": 2', "expected the target among them"),
        ("sequences.jsonl", '"items": [', '"items": [NaN, ', "integer item ids"),
        ("val.jsonl", '"candidates": [', '"candidates": [47, 47, ', "val.jsonl:1"),
        ("test.jsonl", '"user"', '"usr"', "no key 'user'"),
        ("dataset.json", '"movie"', '"film"', "movie, music, book"),
    ],
)
def test_a_malformed_data_file_is_told_with_its_line(config, file, old, new, words, tmp_path):
    shutil.copytree(config.dataset, tmp_path / "data")
    path = tmp_path / "data" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    config.dataset = str(tmp_path / "data")
    config.num_negatives, config.sdpo.max_steps = 19, 0  # every title is met
    assert words in refused(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}', "found JSON"),
        ("Seen: [HistoryHere]. Choose.", "without [CansHere]"),
        ("", "no template"),
    ],
)
def test_a_wrong_prompt_file_is_refused(config, content, words, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    config.prompt_file = str(path)
    assert words in refused(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_truncated_weights_are_refused(config, tmp_path):
    shutil.copytree(config.model, tmp_path / "model")
    largest = max((tmp_path / "model").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    config.model = str(tmp_path / "model")
    assert "convert the model again" in refused(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_with_other_things_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not a run" in refused(config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_workdir_with_a_broken_config_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "no valid JSON" in refused(config, tmp_path)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sdpo_jax.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/lastfm.py", "--config.betta=2"], "unknown key 'betta'"),
        (["--config=configs/lastfm.py", "--beta=2"], "--config.beta"),
        (["--config=configs/lastfm.py", "--config.batch_size=1e3"], "batch_size"),
        (["--config=configs/none.py"], "none.py"),
        (
            ["--config=configs/lastfm.py:tiny"],
            "'tiny' is unknown: expected medium or small or smoke",
        ),
        (["--config=configs/lastfm.py", "extra"], "unexpected argument"),
        ([], "--config: found nothing"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line_and_status_2(arguments, words, tmp_path):
    done = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_data_and_model_one_line_says_which_two_commands_come_first(tmp_path):
    missing = [f"--config.{key}={tmp_path / key}" for key in ("dataset", "model")]
    done = command("--config=configs/lastfm.py", f"--workdir={tmp_path / 'run'}", *missing)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"python -m sdpo_jax.prepare --dataset=lastfm --source=PATH --output={tmp_path}" in line
    assert "python -m sdpo_jax.convert --model=PATH --output=" in line
    assert list(tmp_path.iterdir()) == []
