"""The benchmark programs run at toy size and write what the tables of docs/ are made from."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import history_run

from benchmarks import (
    kernels,
    large,
    load,
    loader,
    meshes,
    quantized,
    score,
    serving,
    start,
    step,
    tables,
)
from benchmarks.flops import matrix_flops
from benchmarks.workload import equal_examples
from sdpo_jax.data.loader import choose_shapes, collate
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.step import make_logp

ROOT = Path(__file__).parents[1]


def test_the_step_benchmark_measures_each_side_and_their_ratio(model_folder, dataset_folder):
    sides = ("strong", "ours")
    kinds = ("candidates", "history")
    found = step.benchmark(model_folder, dataset_folder, sides, [0, 3], 4, 1, "float32", kinds)
    assert set(found["targets_per_second"]) == {*sides, "history"}
    assert found["targets_per_second"]["ours"]["3"]["median"] > 0
    assert set(found["ratio"]) == {"ours/strong", "history/ours"}
    assert found["ratio"]["ours/strong"]["3"] > 0
    memory = {name: facts["temporary_bytes"] for name, facts in found["facts"]["3"].items()}
    assert memory["strong"] > 2 * memory["ours"]
    assert 0.9 < found["facts"]["3"]["ours"]["real_tokens_of_fed"] <= 1
    assert found["threads"] > 0 and found["versions"]["jax"]


def test_a_side_without_its_packages_is_left_out_in_one_line(model_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.torch_sides", raising=False)
    assert step.make_sides(["official", "trl"], model_folder, "float32") == {}
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("left out: official, trl") and "bench" in line
    with pytest.raises(InputError, match=r"--official: .*torch.*pip install -e '.\[bench\]'"):
        large.time_official("toy", 3, 4, 1)


def test_prompts_of_the_workload_are_real_ones(model_folder, dataset_folder):
    from benchmarks.workload import lengths, read_workload

    examples = read_workload(model_folder, dataset_folder).examples(3, 2)
    assert [(e.M, e.C) for e in examples] == [(1, 3)] * 3
    assert lengths(examples)["prompt_tokens"] == pytest.approx(
        sorted(len(e.prompt) for e in examples)[1]
    )


def test_scoring_in_one_pass_equals_copies_and_every_decoder_is_timed(model_folder, dataset_folder):
    found = score.benchmark(model_folder, dataset_folder, 2, 1, "float32")
    assert set(found["ratio"]) == {"score/copies", "score/score", "score/greedy", "score/trie"}
    assert all(speed["median"] > 0 for speed in found["examples_per_second"].values())


def test_the_loader_benchmark_counts_tokens_and_what_of_them_is_real(model_folder, dataset_folder):
    found = loader.benchmark(model_folder, dataset_folder, 64, 3)
    assert found["tokenizing_tokens_per_second"] > 0 and found["batching_tokens_per_second"] > 0
    assert 0.9 < found["real_tokens_of_fed"] <= 1


def test_fewer_bits_are_compared_with_float32(model_folder, dataset_folder):
    rows = quantized.benchmark(model_folder, dataset_folder, 8, ("bf16", "int8"))["rows"]
    assert rows["int8"]["base_bytes"] < rows["bf16"]["base_bytes"]
    for row in rows.values():
        assert 0 < row["logits_rms"] < 0.1 * row["logits_std"]


def test_the_memory_of_loading_is_told_in_files(model_folder, monkeypatch):
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    monkeypatch.setattr(load, "SIZES", load.SIZES | small)
    found = load.benchmark(model_folder, 0.5, files=2)
    assert found["arrays_bytes"] > found["largest_file_bytes"] > 0
    assert found["convert"]["peak_bytes"] > 0 and found["load"]["peak_bytes"] > 0


def test_the_large_step_runs_at_toy_size():
    found = large.benchmark("toy", ["full"], [3], 4, [2], 1)
    (row,) = found["steps"]
    assert row["seconds"] > 0 and row["tflops"] > 0
    assert row["mfu"] is None, "a CPU's peak is not known"


def test_the_tables_of_the_docs_are_made_from_the_file_that_they_name():
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    (named,) = set(re.findall(r"benchmarks/results/[\w-]+\.json", pages["speed.md"]))
    found, shown = tables.tables(ROOT / named), "".join(pages.values())
    assert found and all(table in shown for table in found)


def test_flops_are_those_of_every_product_as_often_as_it_runs():
    x = jnp.ones((5, 7))

    def chain(x):
        return jax.lax.scan(lambda x, _: (jax.jit(lambda x: x @ x.T @ x)(x), None), x, length=3)[0]

    assert matrix_flops(chain, x) == 3 * 2 * (5 * 7 * 5 + 5 * 5 * 7)


def gradient_flops(model, layout: str, negatives: int) -> int:
    examples = equal_examples(2, negatives, prompt=100)
    batch = collate(examples, choose_shapes([examples])[0])
    logp = make_logp(model.graphdef, layout)
    gradient = jax.grad(lambda lora: logp(lora, model.base, batch).sum())
    return matrix_flops(gradient, model.lora)


# What a candidates step took when its answers could be at the prompt's end alone.
FLOPS_OF_ONE_TARGET = {0: 22689216, 3: 29287872, 15: 71165376, 19: 90629568}


@pytest.mark.parametrize("negatives", FLOPS_OF_ONE_TARGET)
def test_targets_within_the_prompt_cost_those_at_its_end_nothing(model, negatives):
    found = gradient_flops(model, "shared_prefix", negatives)
    assert found <= FLOPS_OF_ONE_TARGET[negatives]


def test_a_negative_costs_its_own_tokens_alone(model):
    ours = {k: gradient_flops(model, "shared_prefix", k) for k in (1, 3)}
    rows = {k: gradient_flops(model, "padded", k) for k in (1, 3)}
    assert rows[3] == 2 * rows[1]
    assert ours[3] < 1.3 * ours[1]
    assert rows[3] > 3 * ours[3]


def test_a_second_start_finds_the_compiled_step(model_folder, dataset_folder):
    found = start.benchmark(model_folder, dataset_folder)
    assert set(found) == {"cold", "warm"} and min(found.values()) > 0


def test_all_kernels_of_this_device_compute_the_same():
    found = kernels.benchmark("toy", 1)["kernels"]
    assert {"blocks", "xla"} <= set(found)
    assert found["blocks"]["mean_square"] == pytest.approx(found["xla"]["mean_square"], rel=0.01)


def test_a_mesh_sends_what_it_must_and_no_weights_where_each_device_has_all():
    def sent(*shape: int) -> dict[str, dict]:
        return meshes.compile_mesh(shape, "toy", 1, "full")["collectives"]

    apart = sent(8, 1, 1)  # only the adapter's gradients are summed
    assert {name.split()[0] for name in apart} == {"all-reduce"}
    cut = sent(1, 8, 1)  # kernels come together forward and backward
    assert cut["all-gather in the layers"]["count"] >= 2 * 7 * 3


def test_the_serving_benchmark_asks_a_server_alone_and_together(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "TITLES", 3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = history_run(tmp_path)
    people = serving.histories(tmp_path / "data", 6)
    assert {len(history) for history in people} == {3}
    found = serving.benchmark([f"--workdir={run}"], people, 2)
    assert found["requests"] == 6 and found["seconds"]["p99"] >= found["seconds"]["p50"] > 0
    assert set(found["persons_per_second"]) == {"alone", "2 at once"} and found["ratio"] > 0
    assert len(found["memory_mib"]) == 6 and min(found["memory_mib"]) > 100
    with pytest.raises(InputError, match="the server does not answer"):
        serving.ask("http://127.0.0.1:1", people[0])
    monkeypatch.setattr(serving, "TITLES", 30)
    with pytest.raises(InputError, match="found no history of 30 titles"):
        serving.histories(tmp_path / "data", 6)
