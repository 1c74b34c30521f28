"""Every key of a run; a data set's file changes only what differs.

[paper] marks the values of the paper and its code.
"""

import importlib.metadata
import pathlib

import ml_collections

CPUINFO = pathlib.Path("/proc/cpuinfo")


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.dataset = "runs/data"  # folder written by sdpo_jax.prepare
    config.model = "runs/llama2-7b"  # folder written by sdpo_jax.convert
    config.seed = 0  # of templates, negatives, example order, adapter and dropout
    config.stages = ("sft", "sdpo")  # or one of them
    # What a prompt shows: candidates, the last titles and those among which to choose [paper]; or
    # history, the titles alone, each of which is a target of its own in training.
    config.prompt = "candidates"
    config.history = 10  # titles of a history's prompt; before a segment's first target too
    config.segment = 60  # targets of a history that are one example, at most
    config.prompt_file = ""  # templates in the authors' format; "" = the built-in ones
    config.chat_template = False  # True: prompts in the model's own chat format
    config.chat_options = '{"enable_thinking": false}'  # JSON: what else a chat format may read
    # A network that sdpo_jax.baselines kept: its item vectors stand behind the titles (LLaRA).
    config.item_vectors = ""
    config.max_length = 512  # [paper] tokens of prompt and answer; a longer prompt keeps its end

    # Examples per step over all devices; accumulation follows. An example of a history is a segment
    # with up to config.segment targets; the loss is the mean over the targets. [paper] 128
    config.batch_size = 128
    config.microbatch = 4  # examples a device takes at once
    config.num_negatives = 3  # [paper] K; 1 is DPO
    # Whence the negatives come: shown, the candidates of the prompt's window [paper]; uniform, all
    # titles; popularity, all by their share of the training targets to a power; hard, of a uniform
    # pool those in a band of the reference's log-probs; disliked, what the user rated lowest.
    # Except for shown, none is a title that the user has up to the last target of the split.
    config.negatives = "shown"
    config.redraw = False  # True: other negatives in each epoch
    config.popularity_power = 1.0
    config.hard_pool = 32  # titles of which hard negatives are chosen
    # Shares of the pool, the most likely first: those before the band are left out.
    config.hard_band = (0.05, 0.3)
    config.objective = "sdpo"  # or "dpo_pairwise": DPO's loss, the mean over the K pairs
    config.beta = 1.0  # [paper] of the rewards
    config.batch_layout = "shared_prefix"  # or "padded": K+1 full rows, the oracle
    config.dtype = "bfloat16"  # of the base and of matrix products; or "float32"
    config.base_dtype = "same"  # how the frozen base is held: f32, bf16, int8, nf4; same: in dtype
    # What the backward pass computes again, to save memory: none; cheap: what is element-wise;
    # full: each layer; least: each layer, its MLP in eight pieces.
    config.remat = "full"

    config.sft = ml_collections.ConfigDict()
    config.sft.epochs = 5  # [paper]
    config.sft.max_steps = 0  # 0 = all epochs
    config.sft.learning_rate = 1e-4  # at its peak; the paper names only stage 2's
    config.sdpo = ml_collections.ConfigDict()
    config.sdpo.epochs = 3  # [paper]
    config.sdpo.max_steps = 0  # 0 = all epochs
    config.sdpo.learning_rate = 1e-5  # [paper] at its peak
    config.warmup = 0.05  # [paper] share of the steps
    config.clip = 0.3  # [paper] global gradient norm
    config.weight_decay = 0.0  # of AdamW

    config.tune = "lora"  # or full: every weight is trained, held in float32, and none of lora.*
    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 8  # [paper]
    config.lora.alpha = 32.0  # [paper] the adapter counts alpha / rank
    config.lora.dropout = 0.1  # [paper] on the adapter's input
    # GPT-NeoX has q, k and v as one, adapted where all three are named, and no gate.
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.lora.init_from = ""  # a PEFT folder to go on from; "" = a fresh adapter

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # examples apart; one axis may be -1: the rest of the devices
    config.mesh.fsdp = 1  # examples apart, and the base cut in as many parts
    config.mesh.tensor = 1  # the base cut within heads and MLP

    config.distributed = ml_collections.ConfigDict()  # of a run of several processes
    config.distributed.start_seconds = 300  # how long each waits for the others
    config.distributed.heartbeat_seconds = 100  # after so long without a sign of one, all end

    config.validation_split = "val"  # on which the best step is chosen
    # Or a decoder, greedy, trie or score: its HR@1 in `evaluate --follow --split=<the one above>`,
    # a job beside this one, for which each stage then waits at its end.
    config.best_by = "loss"
    config.validation_windows = 0  # that many, evenly spread over the split; 0 = all
    config.log_every = 1  # steps
    config.eval_every = 50  # steps between validations; a checkpoint is written with each
    config.checkpoint_every = 50  # steps
    config.profile_steps = 0  # steps of each stage traced by jax.profiler into workdir/profile
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same run in a few steps of the quickstart's small model, to see that all is in place."""
    config.model = "runs/quickstart/model"
    config.dtype, config.remat = "float32", "cheap"
    config.batch_size, config.microbatch = 4, 2
    config.sft.max_steps = config.sdpo.max_steps = 4
    config.eval_every = config.checkpoint_every = 2
    config.validation_windows = 8
    return config


def small(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Hundreds of examples in each stage with the quickstart's small model: for a CPU."""
    config.model = "runs/quickstart/model"
    # The model is an instruct model: it answers sooner, and ends sooner, in its own chat format.
    config.chat_template = True
    config.dtype, config.remat = "float32", "cheap"
    config.batch_size, config.microbatch = 8, 4
    config.lora.dropout = 0.0
    config.clip = 1.0
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.max_steps, config.sft.learning_rate = 80, 1e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 40, 6e-5
    config.validation_windows = 64
    config.eval_every, config.checkpoint_every = 40, 20
    return config


def cpu_dtypes() -> tuple[str, str]:
    """`dtype` and `base_dtype`: products in bfloat16 where this CPU multiplies it, else in float32.

    Linux tells whether it does. Other CPUs emulate it, slower than float32, and jax 0.11 fails in
    such products on a CPU. The base is float32 in both cases: of a bfloat16 one XLA:CPU makes a
    float32 copy in every call.
    """
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    able = "avx512_bf16" in flags or "amx_bf16" in flags
    major, minor, *_ = importlib.metadata.version("jax").split(".")
    if able and (int(major), int(minor)) < (0, 11):
        return "bfloat16", "f32"
    return "float32", "same"


def medium(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Every training window once in each stage with the quickstart's small model: for one GPU."""
    config.model = "runs/quickstart/model"
    config.microbatch, config.remat = 32, "cheap"
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.learning_rate, config.sdpo.learning_rate = 1e-3, 1e-4
    config.eval_every = config.checkpoint_every = 200
    config.validation_windows = 256
    return config


def variant(config, arg: str, **changes):
    """Applies the change named by the config file's argument (`file.py:arg`), if there is one."""
    if arg and arg not in changes:
        raise ValueError(f"config argument {arg!r} is unknown: expected {' or '.join(changes)}")
    return changes[arg](config) if arg else config
