"""JAX settings that every command that computes wants."""

import jax

from sdpo_jax.wheels import cache_folder


def set_up_jax(dtype: str) -> None:
    """Persistent compilation cache in the user's cache folder, and honest float32 products."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if dtype == "float32":
        # GPUs and TPUs else round the operands of float32 products.
        jax.config.update("jax_default_matmul_precision", "highest")
