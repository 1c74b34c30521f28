"""Programs compiled for devices that are not here: what their text says, and how it is read."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trainers import ROOT, environment

from benchmarks import aot, hlo
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.topologies import open_topology

COMPILERS = {"v5e:2x2": "libtpu", "h100": "jax_cuda12_plugin", "4xh100": "jax_cuda12_plugin"}


def compile_toy(topology: str, cache) -> list[dict]:
    """Rows of the toy programs, each in a process of its own."""
    rows = [aot.in_own_process(case, cache, 300) for case in aot.toy_cases(topology)]
    assert all("error" not in row for row in rows), rows
    return rows


@pytest.mark.parametrize("topology", COMPILERS)
def test_every_base_compiles_without_big_gathers_or_copies_of_joined_weights(topology, tmp_path):
    if importlib.util.find_spec(COMPILERS[topology]) is None:
        pytest.skip(f"needs {COMPILERS[topology]}: make aot has it")
    for row in compile_toy(topology, tmp_path):
        if topology.startswith("v"):  # nf4's table, which a GPU reads from its cache
            assert row["big_gathers"] == 0, row["name"]
        assert row["weight_copies"] == 0, row["name"]  # of XLA's dot merger
        assert row["wide_float32"] == 0, row["name"]  # of activations
        assert 0 < row["temporary"] < 2**28
    assert len(list(tmp_path.glob("*.hlo.gz"))) == 3  # not compiled again


def test_a_topology_that_is_unknown_or_has_no_compiler_is_refused_in_one_line():
    for name in ("h1000", "v5e", "v9:2x2", "x8h100"):
        with pytest.raises(InputError, match=f"topology: found {name}, expected for example v5e:"):
            open_topology(name)
    if importlib.util.find_spec("jax_cuda12_plugin") is not None:
        pytest.skip("the compiler is here")
    command = [
        sys.executable,
        "-c",
        "from sdpo_jax.system.topologies import *; open_topology('h100')",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert "pip install -e '.[gpu]'" in done.stderr.splitlines()[-1]


def test_a_kernel_in_a_loop_counts_once_per_iteration():
    def run(x_TD, w_LDD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_TD, w_LDD)[0]

    x, w = jnp.ones((48, 64)), jnp.ones((5, 64, 64))
    program = hlo.parse(jax.jit(run).lower(x, w).compile().as_text())
    flops = sum(
        turns * hlo.flops_of(one, computation, program)
        for one, computation, turns, _ in program.kernels()
    )
    assert flops == 5 * 2 * 48 * 64 * 64
    roofline = hlo.Roofline(bandwidth=1e9, flops=1e9, launch=0)
    assert hlo.modelled_seconds(program, roofline)["products"] >= flops / 1e9


def test_a_fusion_reads_the_slice_that_it_takes_and_writes_the_part_that_it_changes():
    text = """HloModule m

%fused (p0: f32[8,100], p1: s32[], p2: f32[100]) -> f32[8,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[100]{0} parameter(2)
  %z = s32[] constant(0)
  %s = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,100}
  %b = f32[1,100]{1,0} bitcast(%p2)
  %a = f32[1,100]{1,0} add(%s, %b)
  ROOT %u = f32[8,100]{1,0} dynamic-update-slice(%p0, %a, %p1, %z)
}

ENTRY %main (x: f32[8,100], i: s32[], y: f32[100]) -> f32[8,100] {
  %x = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[100]{0} parameter(2)
  ROOT %f = f32[8,100]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%fused
}
"""
    program = hlo.parse(text)
    ((one, computation, turns, depth),) = (k for k in program.kernels() if k[0].op == "fusion")
    assert (turns, depth) == (1, 0)
    assert hlo.moved_bytes(one, computation, program) == 400 + 4 + 400 + 400


def test_float32_activations_are_told_from_gradients_of_adapters():
    text = """HloModule m

ENTRY %main (x: bf16[64,128], w: bf16[128,256]) -> f32[64,256] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[128,256]{1,0} parameter(1)
  %a = f32[64,8]{1,0} parameter(2)
  %rounded = bf16[64,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gradient = f32[8,256]{1,0} dot(%a, %rounded), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %wide = f32[64,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    program = hlo.parse(text)
    assert len(hlo.wide_float32_products(program, 256)) == 1
    assert hlo.wide_float32_products(program, 512) == []


def test_copies_of_weights_are_told_from_slices_and_from_activations():
    text = """HloModule m

ENTRY %main (a: bf16[256,256]) -> bf16[256,264] {
  %a = bf16[256,256]{1,0} parameter(0)
  %slice = bf16[1,256,512]{2,1,0} fusion(%a), kind=kLoop, calls=%x
  %joined = bf16[256,264]{1,0} fusion(%a), kind=kLoop, calls=%x
  %tokens = bf16[1000,512]{1,0} fusion(%a), kind=kLoop, calls=%x
  ROOT %r = bf16[256,264]{1,0} copy(%joined)
}
"""
    slices, wider = hlo.weight_copies(hlo.parse(text), frozenset({256, 512}))
    assert slices == 2 * 256 * 512
    assert wider == 2 * (2 * 256 * 264)


def test_the_table_says_what_was_not_compiled_and_why(tmp_path):
    case = aot.Case("h100")
    rows = [
        {
            "name": case.name,
            "fixed": 2**30,
            "temporary": 2**31,
            "collective_bytes": 0,
            "seconds": 0.25,
        },
        {"name": "v5e:1x1 batch=16", "error": "RESOURCE_EXHAUSTED"},
    ]
    lines = aot.table(rows).splitlines()
    assert lines[2] == "| h100 | 1.00 | 2.00 | 3.00 | – | 250 |"
    assert "not compiled: RESOURCE_EXHAUSTED" in lines[3]
    assert len({c.name for c in aot.cases()}) == len(aot.cases())
    assert json.loads(json.dumps(vars(case)))["topology"] == "h100"
    assert np.prod(aot.examples_of(aot.Case("h100", prompt="history"), 1)[0].prompt.shape) > 500
