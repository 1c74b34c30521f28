"""MovieLens-100K with SmolLM2-135M on a laptop's CPU: histories, whose every title is a target.

python -m sdpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart/run

configs/quickstart.py:long trains all weights, twice through all training data (`make long`);
:smoke takes a minute. On one GPU use configs/history.py.
"""

import ml_collections

from sdpo_jax.runs import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = presets.histories_on_cpu(presets.get_config())
    return presets.variant(config, arg, smoke=presets.smoke, long=long)


def long(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """All weights, two epochs of SFT: 132,000 targets."""
    config.tune = "full"
    config.batch_size, config.microbatch = 8, 4
    config.sft.epochs, config.sft.max_steps, config.sft.learning_rate = 2, 0, 3e-4
    config.sdpo.max_steps, config.sdpo.learning_rate = 24, 1e-5
    config.validation_windows = 600
    config.eval_every, config.checkpoint_every = 93, 31
    return config
