"""The paper's recipe on Amazon's reviews, Llama2-7B: SFT for 5 epochs, S-DPO for 3, K=3, beta 1.

python -m sdpo_jax.train --config=configs/amazon.py --workdir=runs/amazon/run

configs/amazon.py:smoke is the same path in a few steps of the quickstart's small model, :small
some hundred examples per stage with it, for a CPU, :medium one epoch of each stage, for one GPU.
"""

import ml_collections

from sdpo_jax.runs import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = presets.get_config()
    config.dataset = "runs/amazon/data"
    return presets.variant(
        config, arg, medium=presets.medium, small=presets.small, smoke=presets.smoke
    )
