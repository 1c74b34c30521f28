"""AdamW with a cosine schedule and clipping, the official recipe's."""

import optax


def learning_rate_schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the first `warmup` share of `steps`, then cosine to 0."""
    warmup_steps = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(steps, warmup_steps + 1))


def make_optimizer(
    peak: float, steps: int, *, warmup: float, clip: float, weight_decay: float
) -> optax.GradientTransformation:
    """Clips the gradient's global norm at `clip`, then AdamW (betas 0.9 and 0.999)."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate_schedule(peak, steps, warmup), weight_decay=weight_decay),
    )


def paper_optimizer() -> optax.GradientTransformation:
    """The official recipe's, for measurements of a step."""
    return make_optimizer(1e-5, 1000, warmup=0.05, clip=0.3, weight_decay=0.0)
