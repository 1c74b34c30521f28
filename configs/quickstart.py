"""MovieLens-100K with SmolLM2-135M, on a laptop's CPU.

python -m sdpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart/run

configs/quickstart.py:long has four times the examples (`make long`); :smoke takes a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.small(common.get_config())
    config.dataset = "runs/quickstart/data"
    # The model's chat format as a prompt file, which leaves out its default system turn.
    config.chat_template, config.prompt_file = False, "configs/prompts/movie-chatml.txt"
    config.sft.max_steps, config.sdpo.max_steps = 32, 24
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
