"""Evaluation of a tiny run: files, agreement with the models, following, and refusals."""

import json
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx

from sdpo_jax.data.loader import Shape, collate
from sdpo_jax.data.prepared import Window
from sdpo_jax.evaluate import evaluate, follow
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.objectives.logprobs import padded_logp
from sdpo_jax.runs import steps
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system.errors import InputError

ALL = ("greedy", "trie", "score")


@pytest.fixture(scope="module")
def model_and_run(tmp_path_factory):
    """A finished run: sft at steps 2 and 4 (best: 2), sdpo at step 3."""
    run = tiny_run.make_run(tmp_path_factory.mktemp("tiny"))
    model = tiny_run.model_of(run)
    for stage, step, loss in (("sft", 2, 0.5), ("sft", 4, 0.9), ("sdpo", 3, 1.3)):
        tiny_run.save(run, stage, step, tiny_run.adapters(model, step), loss)
    tiny_run.finish(run, "sft", 2)
    tiny_run.finish(run, "sdpo", 3)
    return model, run


@pytest.fixture
def run(model_and_run, tmp_path):
    """A copy of the finished run without evaluations; data and model are shared."""
    return shutil.copytree(model_and_run[1], tmp_path / "run", ignore=lambda *_: ["eval"])


def test_the_files_hold_what_checks_read(run):
    evaluate(run, ["base", "sft", "sdpo"], "val", ALL, limit=5)
    names = {path.stem for path in (run / "eval").glob("*.json")}
    assert names == {f"{stage}-{d}" for stage in ("base-0", "sft-2", "sdpo-3") for d in ALL}
    for path in (run / "eval").glob("*.json"):
        summary = json.loads(path.read_text())
        lines = [*map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())]
        assert [line["row"] for line in lines] == [0, 2, 5, 8, 10]  # evenly spread over 11
        assert summary["n"] == 5 and summary["split"] == "val" and summary["candidates"] == 4
        assert summary["protocol"] == "drawn for a test" and summary["seconds"] > 0
        assert summary["hit_ratio_at_1"] == sum(line["hit"] for line in lines) / 5
        low, high = summary["hit_ratio_at_1_ci95"]
        assert 0 <= low <= summary["hit_ratio_at_1"] <= high <= 1
        assert summary["valid_ratio"] == sum(line["valid"] for line in lines) / 5
        ranking = {"hit_ratio_at_5", "ndcg_at_5", "ndcg_at_10", "mrr"}
        assert ranking & set(summary) == (ranking if summary["decoder"] == "score" else set())
        for line in lines:
            assert line["target"] in tiny_run.TITLES and line["user"] == line["row"] // 3
            assert ("ranked" if summary["decoder"] == "score" else "generation") in line
            assert summary["decoder"] != "trie" or line["generation"] in tiny_run.TITLES
    assert not list((run / "eval").glob(".*")), "a temporary file was left"


def test_scores_are_those_of_full_rows_and_the_batch_does_not_matter(model_and_run, run):
    model, _ = model_and_run
    read = read_run(run)
    small, large = Evaluator(read, "test", batch_size=3), Evaluator(read, "test", batch_size=11)
    one, _ = small.run(tiny_run.adapters(small.model, 3), ["score"])
    other, _ = large.run(tiny_run.adapters(large.model, 3), ["score"])
    decoder = nnx.merge(model.graphdef, tiny_run.adapters(model, 3), model.base)
    oracle = jax.jit(lambda batch: padded_logp(decoder, batch))
    for i in (0, 7):
        example, window = large.examples[i], large.windows[i]
        batch = collate([example], Shape(300, 60, Q=1, M=1, A=12, T=360))
        expected = np.asarray(oracle(batch)[0, 0])
        titles = [tiny_run.TITLES[item] for item in window.candidates]
        scores = dict(one["score"][i]["ranked"])
        np.testing.assert_allclose([scores[title] for title in titles], expected, atol=2e-3)
    for a, b in zip(one["score"], other["score"], strict=True):
        assert [title for title, _ in a["ranked"]] == [title for title, _ in b["ranked"]]
        np.testing.assert_allclose(*([x for _, x in p["ranked"]] for p in (a, b)), atol=2e-3)


def test_greedy_is_judged_by_what_it_says(run, monkeypatch):
    evaluator = Evaluator(read_run(run), "test")
    said = iter(["heat", "aliens", "", "jaws or big"])
    monkeypatch.setattr(evaluator, "_text", lambda _: next(said))
    evaluator.windows = [
        Window(0, 3, (3, 4, 5), candidates, target)
        for candidates, target in [((0, 1), 0), ((1, 2), 2), ((0, 1), 0), ((4, 5), 5)]
    ]
    judged = [evaluator._prediction("greedy", i, np.zeros(1)) for i in range(4)]
    assert [(p["valid"], p["hit"]) for p in judged] == [(True, True)] + 3 * [(False, False)]


def test_generation_ends_at_eos_and_keeps_spaces(run):
    evaluator = Evaluator(read_run(run), "test")
    encode = evaluator.model.tokenizer
    ids = encode("the thing , 2", add_special_tokens=False).input_ids
    eos = encode.eos_token_id
    assert evaluator._text([*ids, eos, *ids]) == "the thing , 2" == evaluator._text(ids)


def test_by_default_the_last_finished_stage_at_its_best_step(run):
    (summary,) = evaluate(run, decoders=["score"], limit=2)
    assert (summary["stage"], summary["step"]) == ("sdpo", 3)
    (run / "stages" / "sdpo.json").unlink()
    read = read_run(run)
    assert steps.last_finished(read) == "sft" and steps.choose_step(read, "sft", None) == 2
    assert steps.choose_step(read, "sft", 4) == 4 and steps.choose_step(read, "base", None) == 0
    (run / "stages" / "sft.json").unlink()  # still training: by validation loss
    assert steps.choose_step(read, "sft", None) == 2


def test_following_sees_each_checkpoint_once_and_ends_with_the_run(model_and_run, run, capsys):
    model, _ = model_and_run
    (run / "stages" / "sdpo.json").unlink()
    (run / "sft" / "9.orbax-checkpoint-tmp").mkdir()  # half-written: to be left alone

    def trainer():
        tiny_run.save(run, "sdpo", 6, tiny_run.adapters(model, 6))
        tiny_run.finish(run, "sdpo", 6)

    late = threading.Timer(1.0, trainer)
    late.start()
    written = follow(run, decoders=["score"], limit=2, poll_seconds=0.05)
    late.join()
    steps = [(summary["stage"], summary["step"]) for summary in written]
    assert steps == [("sft", 2), ("sft", 4), ("sdpo", 3), ("sdpo", 6)]
    assert follow(run, decoders=["score"], limit=2) == []  # all evaluated before
    assert "skipped" not in capsys.readouterr().out


def test_following_survives_a_checkpoint_that_vanishes(run, monkeypatch, capsys):
    shutil.rmtree(run / "sft" / "4" / "lora")
    written = follow(run, ["sft"], decoders=["score"], limit=2)
    assert [summary["step"] for summary in written] == [2]
    assert "sft step 4: deleted before it could be read, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="no readable checkpoint"):
        evaluate(run, ["sft"], step=4)


def test_a_step_that_vanishes_while_a_stage_is_listed_is_no_error(run, monkeypatch):
    answers = iter([FileNotFoundError("sft/2"), None])

    def listing(folder, read_only):
        if error := next(answers, FileNotFoundError("sft/2")):
            raise error
        return Checkpoints(folder, read_only=read_only)

    monkeypatch.setattr(steps, "Checkpoints", listing)
    assert steps.steps(read_run(run), "sft") == [2, 4]
    with pytest.raises(InputError, match="vanish while they are listed"):
        steps.steps(read_run(run), "sft")


def changed(run, key, value):
    config = json.loads((run / "config.json").read_text())
    config[key[0]][key[1]] = value
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(stages=["dpo"]), "--stage: found 'dpo', expected base, sft, sdpo"),
        (dict(decoders=["beam"]), "--decoder: found 'beam', expected greedy, trie, score"),
        (dict(decoders=[]), "--decoder: found '', expected greedy, trie, score"),
        (dict(split="train"), "--split: found 'train', expected test, val"),
        (dict(split="test_all"), "--split: found test_all, expected one that .* has: .*test"),
        (dict(stages=["sft"], step=3), "--step: found 3, .* for sft: 2, 4"),
        (dict(stages=["sft", "base"], step=2), "--step: found several stages"),
    ],
)
def test_what_the_run_does_not_have_is_refused(run, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(run, **arguments)


def test_a_run_that_is_not_whole_or_not_the_same_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="found no config"):
        evaluate(tmp_path / "nowhere")
    shutil.rmtree(run / "stages")
    with pytest.raises(InputError, match="found no finished stage"):
        evaluate(run)
    shutil.rmtree(run / "sft")
    with pytest.raises(InputError, match="sft: found no checkpoint"):
        evaluate(run, ["sft"])
    for kind in ("dataset", "model"):
        other = shutil.copytree(run, tmp_path / kind)
        changed(other, ("fingerprints", kind), "0" * 64)
        with pytest.raises(InputError, match=f"expected 000000000000… .*put back the {kind}"):
            evaluate(other, ["base"])
        changed(other, ("fingerprints", kind), read_run(run).fingerprints[kind])
        changed(other, ("config", kind), str(tmp_path / "nothing"))
        with pytest.raises(InputError, match="nothing"):
            evaluate(other, ["base"])


@pytest.mark.parametrize("flag", ["--limit=0", "--split=tset"])
def test_bad_flags_are_one_line_and_status_2(run, flag):
    code = [sys.executable, "-m", "sdpo_jax.evaluate", f"--workdir={run}", flag]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert flag[2:].split("=")[0] in done.stderr and not (run / "eval").exists()
