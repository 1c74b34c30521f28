"""The losses of the two stages, as functions of per-candidate sequence log-probs.

Candidate 0 is the preferred one. The leading axes are whatever the caller has: a batch's targets
are [B, M], and values per target keep them. Chen et al., "On Softmax Direct Preference Optimization
for Recommendation", NeurIPS 2024, arXiv 2406.09215.
"""

import jax
import jax.numpy as jnp


def sft_loss(policy_logp_BC: jax.Array) -> jax.Array:
    """Negative log-likelihood of the preferred answer in nats, summed over its tokens, [B]."""
    return -policy_logp_BC[..., 0]


def rewards(policy_logp_BC: jax.Array, reference_logp_BC: jax.Array, beta: float) -> jax.Array:
    """Implicit rewards `r = beta (log pi - log pi_ref)`, [B, C]."""
    return beta * (policy_logp_BC - reference_logp_BC)


def sdpo_loss(policy_logp_BC: jax.Array, reference_logp_BC: jax.Array, beta: float) -> jax.Array:
    """S-DPO's loss, eq. 11, one value per example, [B].

    The paper writes `-log sigmoid(-logsumexp_d(r_d - r_p))`. As `-log sigmoid(-z)` is
    `log(1 + exp z)`, and the 1 is `exp(r_p - r_p)`, this is `logsumexp(r) - r_p` over all C
    candidates, which stays finite at any margin. With C = 2 it is DPO; with policy = reference
    it is log C.
    """
    r_BC = rewards(policy_logp_BC, reference_logp_BC, beta)
    return jax.nn.logsumexp(r_BC, axis=-1) - r_BC[..., 0]


def dpo_pairwise_loss(
    policy_logp_BC: jax.Array, reference_logp_BC: jax.Array, beta: float
) -> jax.Array:
    """DPO's loss, the mean over the K pairs of preferred and dispreferred candidate, [B].

    `-log sigmoid(r_p - r_d)`: Rafailov et al. 2023, arXiv 2305.18290, eq. 7. What DPO makes of
    the same negatives: each counts alike, however the others rank. With policy = reference it
    is log 2, whatever K.
    """
    r_BC = rewards(policy_logp_BC, reference_logp_BC, beta)
    return jax.nn.softplus(r_BC[..., 1:] - r_BC[..., :1]).mean(-1)


# `config.objective` -> (loss_B of policy and reference log-probs and beta)
OBJECTIVES = {"sdpo": sdpo_loss, "dpo_pairwise": dpo_pairwise_loss}


def reward_metrics(r_BC: jax.Array) -> dict[str, jax.Array]:
    """Per-example values under TRL's names, each [B].

    `rewards/accuracies` is 1 where the preferred candidate has the single highest reward of all
    C (chance: 1/C); margins are against the mean of the rejected ones.
    """
    chosen_B, rejected_BK = r_BC[..., 0], r_BC[..., 1:]
    rejected_B = rejected_BK.mean(-1)
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": (chosen_B > rejected_BK.max(-1)).astype(jnp.float32),
    }
