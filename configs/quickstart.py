"""MovieLens-100K with SmolLM2-135M, on a laptop's CPU.

python -m sdpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart/run

configs/quickstart.py:long is the same run for 2 to 3 hours on 2 cores; :smoke takes a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = "runs/quickstart/data"
    config.model = "runs/quickstart/model"
    config.dtype, config.remat = "float32", "none"
    config.batch_size, config.microbatch = 8, 4
    config.num_negatives = 3
    # Few examples make noisy rewards: a smaller beta keeps the loss from being all noise.
    config.beta = 0.3
    config.lora.dropout = 0.0
    config.clip = 1.0
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.max_steps, config.sft.learning_rate = 32, 1e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 20, 1.5e-4
    config.validation_split, config.validation_windows = "val_all", 80
    config.eval_every, config.checkpoint_every = 20, 10
    return common.variant(config, arg, smoke=common.smoke, long=long)


def long(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Thousands of examples, where the stages begin to separate."""
    config.num_negatives = 7
    config.sft.max_steps, config.sdpo.max_steps = 300, 400
    config.validation_windows = 200
    config.eval_every = config.checkpoint_every = 100
    return config
