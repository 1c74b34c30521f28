"""S-DPO: language models as recommenders, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdpo_jax.objectives.losses import sdpo_loss as sdpo_loss
    from sdpo_jax.serving.recommender import Recommender as Recommender

    __version__: str

__all__ = ["Recommender", "__version__", "sdpo_loss"]


def __getattr__(name: str) -> Any:
    """Public names, loaded when they are asked for: importing the package loads no JAX."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sdpo_jax")
    if name == "sdpo_loss":
        from sdpo_jax.objectives.losses import sdpo_loss

        return sdpo_loss
    if name == "Recommender":
        from sdpo_jax.serving.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'sdpo_jax' has no attribute {name!r}")
