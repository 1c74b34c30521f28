"""MovieLens-100K with SmolLM2-135M on a laptop's CPU: histories, whose every title is a target.

python -m sdpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart/run

configs/quickstart.py:long trains all weights, twice through all training data (`make long`);
:gpu trains an adapter on all of it, three times, in bfloat16; :smoke takes a minute.
"""

import ml_collections

from sdpo_jax.runs import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = presets.small(presets.get_config())
    config.dataset = "runs/quickstart/data"
    config.chat_template = False
    config.dtype, config.base_dtype = presets.cpu_dtypes()
    config.prompt, config.negatives = "history", "uniform"
    # Two segments, about 90 targets per step.
    config.batch_size, config.microbatch = 2, 2
    config.lora.rank, config.lora.alpha = 16, 64.0
    config.sft.max_steps, config.sft.learning_rate = 260, 2.5e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 6, 1e-4
    config.validation_split, config.validation_windows = "val_all", 50
    config.eval_every, config.checkpoint_every = 260, 65
    return presets.variant(config, arg, smoke=presets.smoke, long=long, gpu=gpu)


def long(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """All weights, two epochs of SFT: 132,000 targets."""
    config.tune = "full"
    config.batch_size, config.microbatch = 8, 4
    config.sft.epochs, config.sft.max_steps, config.sft.learning_rate = 2, 0, 3e-4
    config.sdpo.max_steps, config.sdpo.learning_rate = 24, 1e-5
    config.validation_windows = 600
    config.eval_every, config.checkpoint_every = 93, 31
    return config


def gpu(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """An adapter of rank 16, three epochs of SFT: 198,400 targets in a minute or two on one GPU."""
    config.dtype, config.base_dtype = "bfloat16", "same"
    config.batch_size, config.microbatch = 8, 8
    config.sft.epochs, config.sft.max_steps, config.sft.learning_rate = 3, 0, 2e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 60, 1e-4
    config.validation_windows = 600
    config.eval_every, config.checkpoint_every = 186, 186
    return config
