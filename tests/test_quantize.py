"""Quantized kernels: the code book, the blocks, the error, and no gradient or wide copy of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_batch, tiny_model
from flax import nnx

from sdpo_jax.models.quantize import BLOCK, NF4, Quantized, _by_selects, dense, quantize
from sdpo_jax.objectives.logprobs import shared_prefix_logp
from sdpo_jax.runs import presets
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError

WIDE = dataclasses.replace(TINY, D=64, H=16, F=128)


def random_kernel(I=128, O=6):  # noqa: E741 - shape letters
    return np.random.default_rng(0).normal(0, 0.1, (I, O)).astype(np.float32)


def test_nf4_is_the_published_code_book():
    """The values that bitsandbytes prints for create_normal_map, to 7 digits."""
    published = [
        -1.0,
        -0.6961928,
        -0.5250731,
        -0.3949175,
        -0.2844414,
        -0.1847734,
        -0.0910500,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.3379152,
        0.4407098,
        0.5626170,
        0.7229568,
        1.0,
    ]
    np.testing.assert_allclose(NF4, published, atol=5e-8)


def test_nf4_takes_the_nearest_value_of_each_block_of_64_inputs():
    kernel = random_kernel()
    found = np.asarray(dense(quantize(kernel, "nf4"), jnp.float32))
    for o in range(kernel.shape[1]):
        for start in range(0, len(kernel), BLOCK):
            block = kernel[start : start + BLOCK, o]
            scale = np.abs(block).max()
            nearest = NF4[np.abs(block[:, None] / scale - NF4).argmin(1)] * scale
            np.testing.assert_allclose(found[start : start + BLOCK, o], nearest, rtol=1e-6)


def test_int8_errs_by_half_a_step_at_most():
    kernel = random_kernel()
    made = quantize(kernel, "int8")
    error = np.abs(np.asarray(dense(made, jnp.float32)) - kernel)
    assert (error <= np.asarray(made.scale) * 0.5001).all()
    assert made.codes.dtype == jnp.int8 and made.scale.shape == (1, 6)


def test_selects_find_the_values_of_the_table():
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(_by_selects(codes), NF4)


def test_nf4_takes_half_a_byte_a_weight_and_four_bytes_a_block():
    made = quantize(random_kernel(), "nf4")
    assert made.codes.nbytes == 128 * 6 // 2 and made.scale.nbytes == 128 // BLOCK * 6 * 4


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_block_of_zeros_stays_zero(kind):
    made = dense(quantize(jnp.zeros((64, 3)), kind), jnp.float32)
    np.testing.assert_array_equal(made, 0)


def test_a_width_that_blocks_do_not_divide_is_told():
    with pytest.raises(InputError, match="found a width of 65, expected multiples of 64"):
        quantize(np.ones((65, 2)), "nf4")


def dequantized(model):
    """The dense model with the quantized one's kernels."""
    plain = tiny_model(WIDE)
    pure, codes = nnx.to_pure_dict(plain.base), nnx.to_pure_dict(model.base)
    for name, kind in ((n, k) for n in pure["layers"] for k in ("int8", "nf4")):
        found = codes["layers"][name]
        if "codes" in found and (found["codes"].dtype == jnp.int8) == (kind == "int8"):
            made = jax.vmap(lambda c, s, kind=kind: dense(Quantized(c, s, kind), jnp.float32))
            pure["layers"][name]["kernel"] = made(found["codes"], found["scale"])
    base = jax.tree.map(lambda leaf: leaf, plain.base)
    nnx.replace_by_pure_dict(base, pure)
    return dataclasses.replace(plain, base=base)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_log_probs_and_gradients_are_those_of_the_dequantized_kernels(kind):
    model, batch = tiny_model(WIDE, base_dtype=kind), random_batch(2, 3)
    plain = dequantized(model)

    def both(m):
        def loss(lora):
            return shared_prefix_logp(nnx.merge(m.graphdef, lora, m.base), batch).sum()

        return jax.jit(jax.value_and_grad(loss))(model.lora)

    (value, gradient), (expected, of_plain) = both(model), both(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, of_plain)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_no_dense_stack_of_kernels_is_kept_for_the_backward_pass(kind):
    model, batch = tiny_model(WIDE, base_dtype=kind), random_batch(2, 3)

    def loss(lora, base):
        return shared_prefix_logp(nnx.merge(model.graphdef, lora, base), batch).sum()

    text = jax.jit(jax.grad(loss)).lower(model.lora, model.base).compile().as_text()
    assert f"f32[{WIDE.L},{WIDE.D},{WIDE.F}]" not in text


def test_a_float32_base_under_bfloat16_products_gives_what_a_bfloat16_one_gives():
    batch = random_batch(2, 3)
    narrow = tiny_model(WIDE, dtype=jnp.bfloat16)
    wide = tiny_model(WIDE, dtype=jnp.bfloat16, base_dtype="f32")
    assert {x.dtype for x in jax.tree.leaves(wide.base)} == {jnp.dtype(jnp.float32)}
    same_values = jax.tree.map(lambda x: x.astype(jnp.float32), narrow.base)
    found, expected = (
        jax.jit(shared_prefix_logp)(nnx.merge(m.graphdef, m.lora, base), batch)
        for m, base in ((wide, same_values), (narrow, narrow.base))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "version", "expected"),
    [
        ("fma avx512_bf16", "0.10.2", ("bfloat16", "f32")),
        ("amx_bf16", "0.10.2", ("bfloat16", "f32")),
        ("fma avx2", "0.10.2", ("float32", "same")),
        ("amx_bf16", "0.11.2", ("float32", "same")),
    ],
)
def test_the_quickstart_multiplies_in_what_the_cpu_is_fast_in(
    flags, version, expected, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(presets, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(presets.importlib.metadata, "version", lambda package: version)
    assert presets.cpu_dtypes() == expected


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_on_a_mesh_gives_the_same_log_probs(kind):
    model, batch = tiny_model(WIDE, base_dtype=kind), random_batch(8, 3, rows=4)
    mesh = sharding.make_mesh(2, 2, 2)
    place = sharding.placement(mesh)
    placed = jax.tree.map(
        lambda variable: variable.replace(jax.device_put(variable[...], place(variable))),
        (model.lora, model.base),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )

    @jax.jit
    def logp(lora, base, batch):
        return shared_prefix_logp(nnx.merge(model.graphdef, lora, base), batch)

    down = nnx.to_pure_dict(placed[1])["layers"]["down"]
    for part in ("codes", "scale"):
        fits = kind == "nf4" or part == "codes"  # int8 has one row of scales
        assert down[part].sharding.spec[1] == ("tensor" if fits else None)
    split = {k: jax.device_put(x, sharding.batch_sharding(mesh)) for k, x in batch.items()}
    found = logp(*placed, split)
    np.testing.assert_allclose(found, logp(model.lora, model.base, batch), atol=1e-4)
