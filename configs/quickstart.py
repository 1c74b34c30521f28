"""MovieLens-100K with SmolLM2-135M, on a laptop's CPU.

python -m sdpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart/run

configs/quickstart.py:long has four times the examples (`make long`); :smoke takes a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = "runs/quickstart/data"
    config.model = "runs/quickstart/model"
    # The model is an instruct model: it answers sooner, and ends sooner, in its own chat format.
    config.prompt_file = "configs/prompts/movie-chatml.txt"
    config.dtype, config.remat = "float32", "cheap"
    config.batch_size, config.microbatch = 8, 4
    config.lora.dropout = 0.0
    config.clip = 1.0
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.max_steps, config.sft.learning_rate = 32, 1e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 24, 6e-5
    config.validation_split, config.validation_windows = "val_all", 96
    config.eval_every, config.checkpoint_every = 24, 8
    return common.variant(config, arg, smoke=common.smoke, long=long)


def long(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A thousand examples in each stage, where the stages begin to separate."""
    config.sft.max_steps = config.sdpo.max_steps = 128
    config.sdpo.learning_rate = 1e-4
    config.validation_windows = 160
    config.eval_every, config.checkpoint_every = 64, 16
    return config
