"""The paper's run on Goodreads with Llama2-7B: SFT for 5 epochs, S-DPO for 3, K=3, beta 1.

python -m sdpo_jax.train --config=configs/goodreads.py --workdir=runs/goodreads/run

configs/goodreads.py:smoke is the same path in a few steps of the quickstart's small model, :small
some hundred examples per stage with it, for a CPU, :medium one epoch of each stage, for one GPU.
"""

import ml_collections

from sdpo_jax.runs import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = presets.get_config()
    config.dataset = "runs/goodreads/data"
    return presets.variant(
        config, arg, medium=presets.medium, small=presets.small, smoke=presets.smoke
    )
