"""JAX settings that every command that computes wants."""

import os
from pathlib import Path

import jax


def set_up_jax(dtype: str) -> None:
    """Persistent compilation cache in the user's cache folder, and honest float32 products."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "sdpo_jax" / "xla"))
    if dtype == "float32":
        # GPUs and TPUs else round the operands of float32 products.
        jax.config.update("jax_default_matmul_precision", "highest")
