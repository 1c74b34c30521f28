"""AdamW with a cosine schedule and clipping, the official recipe's."""

import optax


def learning_rate_schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the first `warmup` share of `steps`, then cosine to 0."""
    warmup_steps = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(steps, warmup_steps + 1))


def make_optimizer(
    peak: float = 1e-5,
    steps: int = 1000,
    *,
    warmup: float = 0.05,
    clip: float = 0.3,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Clips the gradient's global norm at `clip`, then AdamW (betas 0.9 and 0.999)."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate_schedule(peak, steps, warmup), weight_decay=weight_decay),
    )
