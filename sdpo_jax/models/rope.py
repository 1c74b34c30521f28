"""RoPE (Su et al. 2021, arXiv 2104.09864), and its scalings for longer texts."""

import jax
import jax.numpy as jnp

from sdpo_jax.models.config import DecoderConfig

Angles = tuple[jax.Array, jax.Array]


def rotary(positions_BT: jax.Array, config: DecoderConfig) -> Angles:
    """Cosine and sine of the angles, [B, T, 1, rotated/2] in float32."""
    angles = positions_BT[..., None, None] * frequencies(positions_BT, config)
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(positions_BT: jax.Array, config: DecoderConfig) -> jax.Array:
    """Radians per position, [rotated/2], by the kind that config.json names.

    `linear`: all divided by the factor. `dynamic`: theta grows with the longest text of the batch
    once that exceeds the model's own length (NTK-aware scaling). `llama3`: low frequencies are
    divided by the factor, high ones unchanged, those between interpolated (Llama 3.1).
    """
    rope, width = config.rope, config.rotated
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    if rope.kind == "dynamic":
        length = jnp.maximum(positions_BT.max() + 1, rope.positions)
        stretch = rope.factor * length / rope.positions - (rope.factor - 1)
        return (rope.theta * stretch ** (width / (width - 2))) ** -exponent
    plain = rope.theta**-exponent
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        turns = rope.positions * plain / (2 * jnp.pi)  # over the model's own length
        between = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = jnp.clip(between, 0, 1)
        return (1 - kept) * plain / rope.factor + kept * plain
    return plain


def rotate(x_BTNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotates the first values of each head, in Hugging Face's half-split order."""
    cos, sin = angles
    half = cos.shape[-1]
    x32 = x_BTNH.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)
