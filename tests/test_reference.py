"""Cached reference log-probs are used only for what they were computed from."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import random_segments
from jax.sharding import Mesh

from sdpo_jax.data.tokens import Example
from sdpo_jax.system.processes import Interrupted, StopSignal
from sdpo_jax.system.sharding import AXES
from sdpo_jax.training import inference as inference_module
from sdpo_jax.training import reference
from sdpo_jax.training.inference import Inference

LORA = {"a": jax.numpy.ones((2, 3))}
SETTINGS = {"dtype": "float32", "batch_layout": "shared_prefix"}


def example(*answer: int) -> Example:
    return Example.single(np.array([5, 6], np.int32), [np.array(answer, np.int32)])


KEY = reference.fingerprint("base", LORA, [example(7, 2)], SETTINGS)


@pytest.mark.parametrize(
    "changed",
    [
        ("other", LORA, [example(7, 2)], SETTINGS),
        ("base", {"a": LORA["a"] * 2}, [example(7, 2)], SETTINGS),
        ("base", LORA, [example(8, 2)], SETTINGS),
        ("base", LORA, [example(7, 2), example(7, 2)], SETTINGS),
        ("base", LORA, [example(7, 2)], SETTINGS | {"dtype": "bfloat16"}),
    ],
)
def test_base_adapter_tokens_and_settings_all_change_the_fingerprint(changed):
    assert reference.fingerprint(*changed) != KEY
    assert reference.fingerprint("base", LORA, [example(7, 2)], SETTINGS) == KEY


def test_stored_log_probs_are_read_back_only_under_their_own_fingerprint(tmp_path):
    path = tmp_path / "reference" / "train.npz"
    assert reference.read_reference(path, KEY) is None
    logp_XC = np.array([[-1.5, -2.25]])
    reference.write_reference(path, KEY, logp_XC)
    np.testing.assert_array_equal(reference.read_reference(path, KEY), logp_XC)
    assert reference.read_reference(path, "another") is None
    assert [p.name for p in path.parent.iterdir()] == ["train.npz"]


def test_moving_a_token_between_prompt_and_answer_changes_the_fingerprint():
    one = Example.single(np.array([5, 6], np.int32), [np.array([7, 2], np.int32)])
    other = Example.single(np.array([5], np.int32), [np.array([6, 7, 2], np.int32)])
    keys = {reference.fingerprint("base", LORA, [e], SETTINGS) for e in (one, other)}
    assert len(keys) == 2


def test_another_place_of_a_target_changes_the_fingerprint():
    one, other = (
        Example(np.array([5, 6, 7], np.int32), places, ((np.array([7, 2], np.int32),),) * 2, True)
        for places in ((0, 1), (0, 2))
    )
    keys = {reference.fingerprint("base", LORA, [e], SETTINGS) for e in (one, other)}
    assert len(keys) == 2


ONE_TARGET = [
    Example.single(np.arange(1, n, dtype=np.int32), [np.array([7, 2], np.int32)])
    for n in (4, 9, 5, 8, 6)
]


def inference_by(logp) -> Inference:
    """Two examples at once on one device, with `logp` in place of the model."""
    inference = Inference.__new__(Inference)
    inference.base, inference.microbatch, inference.rows = None, 2, 1
    inference.mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    inference._logp = logp
    return inference


@pytest.mark.parametrize("examples", [ONE_TARGET, random_segments(np.random.default_rng(0), 5, 1)])
def test_an_interrupted_pass_goes_on_where_it_stopped(examples):
    computed, saved = [], []

    def logp(lora, base, batch):
        computed.append(len(batch["prompt_BP"]))
        stop.received = len(computed) == 2  # a signal comes while the second batch is computed
        # Of each target how many tokens its prompt has.
        padding_B1 = (~batch["prompt_mask_BP"]).sum(-1, keepdims=True)
        return -(batch["place_BM"] - padding_B1 + 1)[..., None].astype(np.float32)

    stop = SimpleNamespace(received=False)
    stop.ask = lambda: stop.received
    stop.check = lambda: StopSignal.check(stop)
    inference = inference_by(logp)
    with pytest.raises(Interrupted):
        inference.logp(None, examples, stop, save=lambda out: saved.append(out.copy()))
    left = np.isnan(saved[-1]).sum()
    assert len(computed) == 2 and left in {example.M for example in examples}
    stop.received = False
    whole = inference.logp(None, examples, stop, known_XC=saved[-1])
    assert len(computed) == 3
    expected = [-1 - place for example in examples for place in example.places]
    np.testing.assert_array_equal(whole[:, 0], expected)


@pytest.mark.parametrize(("count", "tokens", "size"), [(3, 2**15, 8), (11, 2**15, 8), (3, 20, 2)])
def test_an_accelerator_computes_more_examples_at_once_and_all_of_them(
    count, tokens, size, monkeypatch
):
    monkeypatch.setattr(inference_module.sharding, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(inference_module, "TOKENS", tokens)
    sizes = []

    def logp(lora, base, batch):
        sizes.append(len(batch["prompt_BP"]))
        return batch["prompt_mask_BP"].sum(-1)[:, None, None].astype(np.float32)

    examples = [ONE_TARGET[i % len(ONE_TARGET)] for i in range(count)]
    stop = SimpleNamespace(ask=lambda: False, check=lambda: None)
    found = inference_by(logp).logp(None, examples, stop)
    assert set(sizes) == {size}
    np.testing.assert_array_equal(found[:, 0], [len(example.prompt) for example in examples])
