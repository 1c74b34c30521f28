"""Every key at its default, where a config of your own can start.

python -m sdpo_jax.train --config=configs/common.py --config.dataset=DATA --config.model=MODEL
"""

from sdpo_jax.runs.presets import get_config

__all__ = ["get_config"]
