"""What a step needs of a device, known before anything is loaded."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, random_examples, tiny_model

from sdpo_jax.models.decoder import REMAT
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.objectives.logprobs import shared_prefix_logp
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.train import explain
from sdpo_jax.training.step_memory import step_memory

DEEP = dataclasses.replace(TINY, L=12)
# Big enough for activations to outweigh what every program needs.
EXAMPLES = random_examples(np.random.default_rng(0), 16, 4, P=200)


@functools.cache
def needed(count: int = 8, **changes):
    keys = {
        "config": DEEP,
        "dtype": "float32",
        "remat": "none",
        "layout": "shared_prefix",
        "mesh": sharding.make_mesh(devices=jax.devices()[:1]),
    }
    return step_memory(lora=LoraConfig(rank=2), examples=EXAMPLES[:count], **keys | changes)


def test_a_bfloat16_base_is_counted_in_its_own_width():
    assert needed(dtype="bfloat16").base * 2 == needed().base


def test_a_quantized_base_is_counted_in_its_bytes():
    kernels = DEEP.L * (DEEP.D * (2 * DEEP.N + 2 * DEEP.G) * DEEP.H + 3 * DEEP.D * DEEP.F)
    less = needed().base - needed(base_dtype="int8").base
    scales = 4 * DEEP.L * ((DEEP.N + 2 * DEEP.G) * DEEP.H + 2 * DEEP.D + 2 * DEEP.F)
    assert less == 3 * kernels - scales


def test_temporaries_grow_with_the_microbatch_and_the_base_does_not():
    small, large = needed(4), needed(16)
    assert large.temporary > 2 * small.temporary
    assert large.base == small.base and large.state == small.state


def test_shared_prompts_need_less_than_full_rows_and_remat_less_than_none():
    assert needed().temporary * 2 < needed(layout="padded").temporary
    wide = dataclasses.replace(DEEP, F=1024)  # as in a real model, the MLP is the widest
    found = [needed(remat=remat, config=wide).temporary for remat in REMAT]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(REMAT)


def test_a_mesh_divides_the_base():
    whole = needed(8, mesh=sharding.make_mesh(8, 1, 1)).base
    assert needed(8, mesh=sharding.make_mesh(1, 8, 1)).base < whole / 4


def test_explain_says_what_fits_and_what_is_probably_fastest(config, capsys, tmp_path):
    config.batch_size = 16
    explain(RunConfig.of(config.to_dict()))
    *lines, last = capsys.readouterr().out.strip().splitlines()[1:]
    pairs = [line.split()[:2] for line in lines]
    assert pairs[:2] == [["--config.remat=cheap", f"--config.microbatch={n}"] for n in (1, 2)]
    assert all(line.endswith(" fits") for line in lines)
    assert last == "probably fastest: --config.remat=cheap --config.microbatch=2"
    assert list(tmp_path.iterdir()) == []


def test_explain_refuses_more_negatives_than_are_shown(config):
    config.num_negatives = 25
    with pytest.raises(InputError, match="at most 19"):
        explain(RunConfig.of(config.to_dict()))


def test_explain_refuses_devices_on_which_nothing_fits(config, capsys, monkeypatch):
    monkeypatch.setattr("sdpo_jax.training.step_memory.limit_of", lambda device: 1000)
    config.batch_size = 16
    with pytest.raises(InputError, match=r"microbatch: found none that fits in .*mesh\.fsdp"):
        explain(RunConfig.of(config.to_dict()))
    lines = capsys.readouterr().out.strip().splitlines()[1:]
    assert len(lines) == 3 and all(line.endswith("does not fit") for line in lines)


def test_the_official_step_in_jax_has_our_log_probs_and_needs_more(model_folder):
    from benchmarks.memory import beside_official, official_logp

    batch = random_batch(B=4, C=4)
    found = jax.jit(official_logp)(tiny_model().decoder, batch)
    expected = jax.jit(shared_prefix_logp)(tiny_model().decoder, batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    ratios = [row["ratio"] for row in beside_official(TINY, EXAMPLES[:8]).values()]
    assert min(ratios) > 2


def test_the_table_of_the_seven_billion_shape_needs_no_weights():
    from benchmarks.memory import LLAMA2_7B, llama_table

    rows = {(r["base_dtype"], r["remat"]): r for r in llama_table(LLAMA2_7B, [3], [1])}
    assert rows["bf16", "full"]["base"] == 2 * 6_738_415_616
    assert rows["bf16", "full"]["total"] < rows["bf16", "cheap"]["total"] < 20 * 2**30
    assert rows["nf4", "full"]["base"] < rows["int8", "full"]["base"] < 7 * 2**30
