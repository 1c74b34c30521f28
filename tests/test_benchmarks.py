"""The benchmark programs run at toy size and write what README's tables are made from."""

import sys

import pytest

from benchmarks import step


def test_the_step_benchmark_measures_each_side_and_their_ratio(model_folder, dataset_folder):
    sides = ("strong", "ours")
    found = step.benchmark(model_folder, dataset_folder, sides, [0, 3], 8, 1, "float32")
    assert set(found["examples_per_second"]) == set(sides)
    assert found["examples_per_second"]["ours"]["3"]["median"] > 0
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


def test_prompts_of_the_workload_are_real_ones(model_folder, dataset_folder):
    from benchmarks.workload import lengths, read_workload

    examples = read_workload(model_folder, dataset_folder).examples(3, 2)
    assert [len(e.answers) for e in examples] == [3, 3, 3]
    assert lengths(examples)["prompt_tokens"] == pytest.approx(
        sorted(len(e.prompt) for e in examples)[1]
    )
