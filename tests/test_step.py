"""The compiled step: what is in it, what is not, and that its result ignores the device count."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, random_batch, random_examples, random_segments, tiny_model
from flax import nnx
from jax.sharding import AxisType, Mesh

from sdpo_jax.data.loader import choose_shapes, collate
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sdpo_jax.training.step import build_step, make_logp, preference_objective, sft_objective

OPTIMIZER = make_optimizer(1e-2, 10, warmup=0.1, clip=1.0, weight_decay=0.0)
SDPO = functools.partial(preference_objective, beta=1.0)
MAKE = pytest.mark.parametrize("make", [random_examples, random_segments])


def mesh_of(shape=(1, 1, 1)) -> Mesh:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def microbatches(batch, count: int):
    return {k: x.reshape(count, len(x) // count, *x.shape[1:]) for k, x in batch.items()}


def placed(model, mesh):
    """Base and adapter on `mesh`, as load_model puts them there."""
    place = sharding.placement(mesh)

    def put(state):
        return jax.tree.map(
            lambda variable: variable.replace(jax.device_put(variable[...], place(variable))),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )

    return put(model.lora), put(model.base)


def run(
    model,
    batch,
    *,
    mesh=None,
    count=1,
    objective=SDPO,
    layout="shared_prefix",
    steps=1,
    dropout_key=None,
):
    mesh = mesh or mesh_of()
    lora, base = placed(model, mesh)
    logp = make_logp(model.graphdef, layout)
    step, state = build_step(logp, objective, OPTIMIZER, lora, mesh, dropout_key=dropout_key)
    batches = jax.device_put(microbatches(batch, count), sharding.batch_sharding(mesh, 1))
    for _ in range(steps):
        state, metrics = step(state, base, batches)
    return state, metrics, step, (state, base, batches)


def flat(state) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.lora)])


@functools.cache
def step_of(make):
    *_, step, args = run(tiny_model(), random_batch(B=4, C=4, make=make))
    return step, args


@pytest.fixture
def lowered():
    return step_of(random_examples)


@MAKE
def test_no_array_has_logits_at_other_positions_than_those_that_predict(make):
    """V is 97, a size nothing else has: every array with it has at most B * (Q + S) rows."""
    step, args = step_of(make)
    B, S = args[2]["packed_BS"].shape[1:]
    Q = args[2]["head_BQ"].shape[2]
    text = step.lower(*args).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    of_logits = [s for s in shapes if TINY.V in s and s not in {(97, 16), (16, 97)}]
    assert of_logits, "the logits are there"
    assert max(np.prod(s) // TINY.V for s in of_logits) <= B * (Q + S)


def test_one_base_is_in_memory(lowered):
    step, args = lowered
    memory = step.lower(*args).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(args))
    assert memory.argument_size_in_bytes <= size * 1.02
    state = sum(x.nbytes for x in jax.tree.leaves(args[0]))
    assert memory.output_size_in_bytes <= state + 4096


def layer_scans(jaxpr):
    """The scans over L, however deep they lie."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == TINY.L:
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from layer_scans(inner)


@MAKE
def test_the_step_runs_the_layers_once_forward_and_once_backward(make):
    """A reference pass would be a third scan over L."""
    step, args = step_of(make)
    scans = layer_scans(step.trace(*args).jaxpr.jaxpr)
    assert sorted(scan.params["reverse"] for scan in scans) == [False, True]


@pytest.mark.parametrize("objective", [SDPO, sft_objective])
def test_the_model_is_traced_once_however_many_microbatches_there_are(objective):
    model, mesh, traced = tiny_model(), mesh_of(), []
    logp = make_logp(model.graphdef, "shared_prefix")

    def counted(*args):
        traced.append(args)
        return logp(*args)

    lora, base = placed(model, mesh)
    step, state = build_step(counted, objective, OPTIMIZER, lora, mesh)
    batches = microbatches(random_batch(B=8, C=3, rows=4), 4)
    step.trace(state, base, batches)
    assert len(traced) == 1


def test_no_weight_gradient_is_formed(lowered):
    """The backward scan's results have the shapes of adapters and activations, of no kernel."""
    step, args = lowered
    (backward,) = [s for s in layer_scans(step.trace(*args).jaxpr.jaxpr) if s.params["reverse"]]
    results = {out.aval.shape for out in backward.outvars}
    adapters = {x.shape for x in jax.tree.leaves(args[0].lora)}
    kernels = {x.shape for x in jax.tree.leaves(args[1]) if x.ndim == 3}
    assert adapters <= results and len(kernels) >= 4
    assert not kernels & results


def test_a_second_step_compiles_nothing(lowered):
    step, _ = lowered
    assert step._cache_size() == 1
    *_, step, _ = run(tiny_model(), random_batch(B=4, C=4), steps=3)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("shape", "make"),
    [((8, 1, 1), random_examples), ((2, 2, 2), random_examples), ((2, 2, 2), random_segments)],
)
def test_eight_devices_give_what_one_gives(shape, make):
    batch = random_batch(B=8, C=3, rows=8, make=make)
    one, metrics, *_ = run(tiny_model(), batch, count=2, steps=2)
    if shape[0] == 8:
        batch_count = 1  # eight examples at once, one per device
    else:
        batch_count = 2
    many, many_metrics, *_ = run(
        tiny_model(), batch, mesh=mesh_of(shape), count=batch_count, steps=2
    )
    np.testing.assert_allclose(flat(many), flat(one), atol=2e-5)
    np.testing.assert_allclose(many_metrics["loss"], metrics["loss"], rtol=1e-5)


@functools.cache
def with_dropout(*shape: int) -> list[float]:
    count = 8 // (shape[0] * shape[1]) if shape else 8
    model, batch = tiny_model(dropout=0.1), random_batch(B=8, C=3, rows=8)
    return losses(model, batch, mesh_of(shape) if shape else mesh_of(), count, jax.random.key(3))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_twenty_steps_with_dropout_lose_the_same_on_any_mesh(shape):
    found, expected = with_dropout(*shape), with_dropout()
    assert abs(expected[-1] - expected[0]) > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-5)


def losses(model, batch, mesh, count: int, dropout_key, objective=SDPO) -> list[float]:
    """Of twenty steps on the same batch, cut into `count` microbatches."""
    lora, base = placed(model, mesh)
    logp = make_logp(model.graphdef, "shared_prefix")
    step, state = build_step(logp, objective, OPTIMIZER, lora, mesh, dropout_key=dropout_key)
    batches = jax.device_put(microbatches(batch, count), sharding.batch_sharding(mesh, 1))
    found = []
    for _ in range(20):
        state, metrics = step(state, base, batches)
        found.append(float(metrics["loss"]))
    return found


def test_shardings_stay_where_they_were_pinned():
    mesh = mesh_of((2, 2, 2))
    lora, base = placed(tiny_model(), mesh)
    _, first = build_step(None, SDPO, OPTIMIZER, lora, mesh)
    kernel = base["layers"]["gate"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    state, *_ = run(tiny_model(), random_batch(B=8, C=3, rows=8), mesh=mesh, count=2, steps=2)
    jax.tree.map(_same, state, first)
    for moment in ("mu", "nu"):  # which lie as the adapter does
        jax.tree.map(_same, optax.tree.get(first.opt_state, moment), lora)


def _same(x, expected):
    assert x.sharding.is_equivalent_to(expected.sharding, x.ndim), (x.sharding, expected.sharding)


@pytest.mark.parametrize(
    ("make", "objective"),
    [(random_examples, SDPO), (random_segments, SDPO), (random_segments, sft_objective)],
)
def test_microbatches_add_up_to_the_global_batch(make, objective):
    """However many targets each of them holds."""
    batch = random_batch(B=8, C=3, rows=4, make=make)
    targets = (batch["place_BM"] >= 0).reshape(4, -1).sum(-1)
    assert (len(set(targets.tolist())) > 1) == (make is random_segments)
    whole, of_whole, *_ = run(tiny_model(), batch, count=1, objective=objective)
    cut, of_cut, *_ = run(tiny_model(), batch, count=4, objective=objective)
    np.testing.assert_allclose(flat(cut), flat(whole), atol=1e-6)
    assert of_cut["targets"] == of_whole["targets"] == targets.sum()
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_cut[name], value, rtol=1e-5, err_msg=name)


def test_every_target_of_the_global_batch_counts_alike():
    """The loss is their mean, not that of the examples' means."""
    model, batch = tiny_model(), random_batch(B=8, C=3, rows=4, make=random_segments)
    logp_BMC = jax.jit(make_logp(model.graphdef, "shared_prefix"))(model.lora, model.base, batch)
    loss_BM, _ = SDPO(logp_BMC, batch)
    there_BM = batch["place_BM"] >= 0
    _, metrics, *_ = run(model, batch, count=2)
    np.testing.assert_allclose(metrics["loss"], np.asarray(loss_BM)[there_BM].mean(), rtol=1e-5)
    of_examples = np.mean([x[there].mean() for x, there in zip(loss_BM, there_BM, strict=True)])
    assert abs(metrics["loss"] - of_examples) > 1e-3


def test_sft_on_a_history_feeds_its_tokens_once_and_nothing_beside_them():
    examples = random_segments(np.random.default_rng(5), 4, 1)
    batch = collate(examples, choose_shapes([examples])[0])
    assert batch["packed_BS"].shape == (4, 0)
    assert (batch["slot_WT"] >= 0).sum() == sum(len(e.prompt) for e in examples)
    state, metrics, *_ = run(tiny_model(), batch, objective=sft_objective)
    padded, expected, *_ = run(tiny_model(), batch, objective=sft_objective, layout="padded")
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(flat(state), flat(padded), atol=2e-5)


@pytest.mark.parametrize(
    ("objective", "make"),
    [(SDPO, random_examples), (SDPO, random_segments), (sft_objective, random_examples)],
)
def test_both_objectives_learn_a_batch(objective, make):
    found = losses(tiny_model(), random_batch(B=4, C=3, make=make), mesh_of(), 1, None, objective)
    assert found[-1] < found[0]


@MAKE
def test_loss_is_log_C_when_the_reference_is_the_policy(make):
    model = tiny_model()
    batch = random_batch(B=4, C=4, make=make)
    logp = jax.jit(make_logp(model.graphdef, "shared_prefix"))
    batch["reference_logp_BMC"] = np.asarray(logp(model.lora, model.base, batch))
    _, metrics, *_ = run(model, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(4), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], 0, atol=1e-4)


def test_bfloat16_products_follow_float32():
    batch = random_batch(B=4, C=3)
    exact, *_ = run(tiny_model(), batch)
    rough, *_ = run(tiny_model(dtype=jnp.bfloat16), batch)
    assert np.corrcoef(flat(exact), flat(rough))[0, 1] > 0.99


def test_learning_rate_warms_up_over_5_percent_and_ends_at_zero():
    schedule = learning_rate_schedule(1e-3, 100, 0.05)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(1e-3)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-9)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="8 devices"):
        sharding.make_mesh(3, 1, 1)
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
