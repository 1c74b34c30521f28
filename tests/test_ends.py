"""What ends an answer, and how long it may be: one notion for decoding and export."""

import json

import numpy as np
import pytest
from tiny import dataset_of, edit_config, window
from tiny_run import adapters, finish, make_run, model_of, save

from sdpo_jax.data import candidates
from sdpo_jax.data.tokens import NEW_TOKENS, new_tokens
from sdpo_jax.evaluate import evaluate
from sdpo_jax.export import export
from sdpo_jax.models.tokenizer import ends_of, load_tokenizer
from sdpo_jax.system.errors import InputError

EOS = 2  # of the tiny tokenizer


@pytest.fixture
def ends(tmp_path, model_folder):
    """`ends_of` with these values in config.json and generation_config.json."""
    tokenizer = load_tokenizer(model_folder)

    def call(config, generation):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ends_of(tmp_path, tokenizer)

    return call


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, None, (EOS,)),
        ({"eos_token_id": EOS}, {"eos_token_id": EOS}, (EOS,)),
        ({"eos_token_id": 5}, None, (EOS, 5)),
        ({"eos_token_id": None}, {"eos_token_id": [7, EOS, 8]}, (EOS, 7, 8)),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 7}, (EOS, 5, 7)),
    ],
)
def test_every_file_that_names_an_end_is_read_and_the_trained_one_is_first(
    config, generation, found, ends
):
    assert ends(config, generation) == found


@pytest.mark.parametrize("token", ["</s>", -1, [5, None], True])
def test_an_end_that_is_no_token_is_refused(token, ends):
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: found"):
        ends({}, {"eos_token_id": token})


@pytest.mark.parametrize(
    ("titles", "count"),
    [(["a"], NEW_TOKENS), (["a" * 20], 20), (["a" * 21, "b"], 21), (["a" * 300], 300)],
)
def test_an_answer_may_be_as_long_as_the_longest_title(titles, count, model_folder):
    assert new_tokens(titles, load_tokenizer(model_folder)) == count


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose longest title has 26 letters, each a token."""
    titles = {i: f"t{i}" for i in range(39)} | {39: "a title of twenty-six letters"[:26]}
    rng = np.random.default_rng(0)
    splits = {}
    for name in ("train", "val", "test"):
        rows = [rng.choice(40, 4, replace=False).tolist() for _ in range(3)]
        windows = [window(row[:3], row[3]) for row in rows]
        splits[name] = candidates.independent(windows, titles, 0, name)
    run = make_run(tmp_path_factory.mktemp("ends"), data=dataset_of(splits, titles))
    save(run, "sft", 1, adapters(model_of(run), 1))
    finish(run, "sft", 1)
    return run


def test_the_number_of_tokens_is_told_and_in_the_result(run, capsys):
    (summary,) = evaluate(run, ["sft"], decoders=["greedy"])
    assert summary["max_new_tokens"] == 26 and summary["truncated_prompts"] == 0
    assert "greedy generates up to 26 tokens, as the longest title" in capsys.readouterr().out


def test_the_export_ends_where_training_did(run, tmp_path):
    edit_config(run.parent / "model", eos_token_id=5)
    folder = export(run, "sft", "merged", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [EOS, 5]
    content = json.loads((folder / "generation_config.json").read_text())
    assert content["max_new_tokens"] == 26 and content["do_sample"] is False
