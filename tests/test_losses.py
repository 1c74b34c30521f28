"""The losses against arithmetic done by hand and the identities of the paper's Appendix A."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.objectives.losses import (
    OBJECTIVES,
    dpo_pairwise_loss,
    reward_metrics,
    rewards,
    sdpo_loss,
    sft_loss,
)

POLICY = jnp.array([[-4.0, -6.0, -5.0, -9.0]])
REFERENCE = jnp.array([[-5.0, -5.5, -5.2, -7.0]])
# beta 0.5: r = 0.5 * (1.0, -0.5, 0.2, -2.0)
R = (0.5, -0.25, 0.1, -1.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_is_equation_11_worked_by_hand():
    # -log sigmoid(-log(e^-0.75 + e^-0.4 + e^-1.5)); the sum is 0.472367 + 0.670320 + 0.223130
    by_hand = -math.log(sigmoid(-math.log(0.472367 + 0.670320 + 0.223130)))
    assert by_hand == pytest.approx(0.861123, abs=1e-5)
    np.testing.assert_allclose(sdpo_loss(POLICY, REFERENCE, 0.5), [by_hand], atol=1e-5)


def test_one_negative_is_dpo():
    # -log sigmoid(r_p - r_d), Rafailov et al. 2023, eq. 7; r_p - r_d = 0.75
    loss_B = sdpo_loss(POLICY[:, :2], REFERENCE[:, :2], 0.5)
    np.testing.assert_allclose(loss_B, [-math.log(sigmoid(0.75))], rtol=1e-6)


def test_the_pairwise_loss_is_the_mean_of_dpo_over_the_pairs():
    pairs = [-math.log(sigmoid(R[0] - r)) for r in R[1:]]
    loss_B = dpo_pairwise_loss(POLICY, REFERENCE, 0.5)
    np.testing.assert_allclose(loss_B, [sum(pairs) / 3], rtol=1e-6)


def test_with_one_negative_both_objectives_are_one():
    one, other = (loss(POLICY[:, :2], REFERENCE[:, :2], 0.5) for loss in OBJECTIVES.values())
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_pairwise_loss_starts_at_log_2_and_is_finite_at_huge_margins():
    np.testing.assert_allclose(dpo_pairwise_loss(POLICY, POLICY, 1.0), math.log(2), rtol=1e-6)
    far_BC = jnp.array([[-1000.0, 0.0, 0.0, 1000.0]])
    gradient = jax.grad(lambda x: dpo_pairwise_loss(x, jnp.zeros((1, 4)), 1.0).sum())(far_BC)
    np.testing.assert_allclose(gradient, [[-1, 1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("C", [2, 4, 16])
def test_loss_starts_at_log_C(C):
    logp_BC = jax.random.normal(jax.random.key(0), (3, C)) - 8
    np.testing.assert_allclose(sdpo_loss(logp_BC, logp_BC, 1.0), math.log(C), rtol=1e-6)


@pytest.mark.parametrize("margin", [1000.0, -1000.0])
def test_loss_and_gradient_are_finite_at_huge_margins(margin):
    policy_BC = jnp.array([[margin, 0.0, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: sdpo_loss(x, jnp.zeros((1, 4)), 1.0).sum())(
        policy_BC
    )
    expected = 0.0 if margin > 0 else 1000 + math.log(3)
    assert value == pytest.approx(expected, rel=1e-6)
    first = 0.0 if margin > 0 else -1.0
    np.testing.assert_allclose(gradient, [[first, -first / 3, -first / 3, -first / 3]], atol=1e-6)


def test_gradient_is_the_formula_of_section_3_1():
    """Each negative is pushed down by its share of softmax(r) over the negatives.

    d loss / d log pi(e_p) = -beta sigmoid(log sum_d exp(r_d - r_p)), and for a negative
    +beta sigmoid(...) / sum_d' exp(r_d' - r_d).
    """
    beta = 0.5
    outer = sigmoid(math.log(sum(math.exp(r - R[0]) for r in R[1:])))
    shares = [1 / sum(math.exp(other - r) for other in R[1:]) for r in R[1:]]
    gradient = jax.grad(lambda x: sdpo_loss(x, REFERENCE, beta).sum())(POLICY)
    expected = [-beta * outer, *(beta * outer * share for share in shares)]
    np.testing.assert_allclose(gradient, [expected], rtol=1e-5)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == max(shares)  # the hardest negative, r = 0.1


def test_appendix_a_ranking_the_preferred_first_is_a_softmax():
    """Plackett-Luce: the rankings that begin with e_p sum to exp(r_p) / sum_j exp(r_j)."""

    def ranking(order):
        left = [math.exp(R[i]) for i in order]
        return math.prod(left[k] / sum(left[k:]) for k in range(len(left)))

    total = sum(ranking((0, *rest)) for rest in itertools.permutations((1, 2, 3)))
    assert total == pytest.approx(math.exp(R[0]) / sum(map(math.exp, R)))
    (loss,) = sdpo_loss(POLICY, REFERENCE, 0.5)
    assert float(loss) == pytest.approx(-math.log(total), rel=1e-5)


def test_appendix_a_softmax_is_the_sigmoid_of_minus_logsumexp():
    softmax = math.exp(R[0]) / sum(map(math.exp, R))
    ratio = 1 / (1 + sum(math.exp(r - R[0]) for r in R[1:]))
    inner = math.log(sum(math.exp(r - R[0]) for r in R[1:]))
    assert softmax == pytest.approx(ratio) == pytest.approx(sigmoid(-inner))
    loss = float(sdpo_loss(POLICY, REFERENCE, 0.5)[0])
    assert loss == pytest.approx(-math.log(softmax), rel=1e-5)


def test_appendix_a_the_partition_function_cancels():
    """A term that only the prompt decides, beta log Z(x), shifts all rewards and no loss."""
    shifted = sdpo_loss(POLICY + 3.7, REFERENCE, 0.5)
    np.testing.assert_allclose(shifted, sdpo_loss(POLICY, REFERENCE, 0.5), rtol=1e-5)


def test_sft_loss_is_the_negative_log_likelihood_of_the_preferred():
    np.testing.assert_array_equal(sft_loss(POLICY), [4.0])


def test_reward_metrics_follow_their_names():
    r_BC = rewards(POLICY, REFERENCE, 0.5)
    metrics = {name: float(value[0]) for name, value in reward_metrics(r_BC).items()}
    assert metrics["rewards/chosen"] == pytest.approx(0.5)
    assert metrics["rewards/rejected"] == pytest.approx((-0.25 + 0.1 - 1.0) / 3)
    assert metrics["rewards/margins"] == pytest.approx(0.5 + 1.15 / 3)
    assert metrics["rewards/accuracies"] == 1.0


def test_a_tie_is_no_accuracy():
    assert reward_metrics(jnp.zeros((1, 4)))["rewards/accuracies"][0] == 0.0
