"""Histories, whose every title is a target, with SmolLM2-135M on one GPU: a few minutes.

python -m sdpo_jax.train --config=configs/history.py --workdir=runs/history/run

Any data set with --config.dataset=FOLDER; where it has no val_all, --config.validation_split=val.
configs/history.py:medium ends SFT after 600 steps and S-DPO after 100, :small is for a CPU, :smoke
takes a minute.
"""

import ml_collections

from sdpo_jax.runs import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = presets.histories(presets.get_config())
    return presets.variant(
        config, arg, medium=medium, small=presets.histories_on_cpu, smoke=presets.smoke
    )


def medium(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same number of steps for data sets of any size."""
    config.sft.max_steps, config.sdpo.max_steps = 600, 100
    return config
