"""Every key of a run: its default, meaning, allowed values, and whether it may change.

A config file takes `presets.get_config()` and changes what differs. Commands turn that into a
`RunConfig`, which the rest of the package reads. [paper] marks values of the paper and its code.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdpo_jax.data.negatives import NEGATIVES
from sdpo_jax.data.prompts import PROMPTS
from sdpo_jax.system import errors
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import (
    ABOVE_ZERO,
    COUNT,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    one_of,
    parse_json,
)

STAGES = ("sft", "sdpo")
DTYPES = ("float32", "bfloat16")
# Choices of modules that load JAX, repeated here so that a run can be read without it.
LAYOUTS = ("shared_prefix", "padded")
REMAT = ("none", "cheap", "full", "least")
BASE_DTYPES = ("same", "f32", "bf16", "int8", "nf4")
OBJECTIVES = {"sdpo": "S-DPO", "dpo_pairwise": "DPO, {K} pairs"}  # -> its name in tables
TRACKERS = ("none", "wandb", "trackio", "mlflow")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "qkv")


def _some_of(known: Sequence[str]) -> Kind:
    def right(value: Any) -> bool:
        found = list(value) if type(value) in (list, tuple) else []
        return found != [] and found == [name for name in known if name in found]

    return Kind(f"some of {', '.join(known)}, in this order", right)


def _is_object(value: Any) -> bool:
    try:
        return type(value) is str and type(parse_json(value)) is dict
    except ValueError:
        return False


def _is_band(value: Any) -> bool:
    shares = list(value) if type(value) in (list, tuple) else []
    return len(shares) == 2 and all(map(NUMBER.right, shares)) and 0 <= shares[0] < shares[1] <= 1


BOOLEAN = Kind("True or False", lambda value: type(value) is bool)
NOT_NEGATIVE = Kind("a finite number, 0 or more", lambda v: NUMBER.right(v) and v >= 0)
SEED = Kind("a whole number, 0 or more, below 2**32", lambda v: COUNT.right(v) and v < 2**32)
BELOW_ONE = Kind("a number, 0 <= it < 1", lambda v: NUMBER.right(v) and 0 <= v < 1)
AXIS = Kind("a whole number or -1", lambda v: type(v) is int and -1 <= v < 2**31)
BAND = Kind("two shares, the lower first", _is_band)
JSON_OBJECT = Kind("a JSON object as text", _is_object)


def key(default: Any, kind: Kind, about: str, *, free: bool = False, path: bool = False) -> Any:
    """A field of a config.

    `free`: it may change when a run resumes, since no result depends on it. `path`: it names a
    file or folder.
    """
    metadata = {"kind": kind, "about": about, "free": free, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    epochs: int = key(3, POSITIVE, "times through the training data; [paper] 5 in SFT, 3 in S-DPO")
    max_steps: int = key(0, COUNT, "steps after which the stage ends; 0: those of all epochs")
    learning_rate: float = key(
        1e-5, ABOVE_ZERO, "peak; [paper] 1e-5 in S-DPO, and none is given for SFT"
    )


@dataclasses.dataclass(frozen=True)
class LoraKeys:
    """The adapter."""

    rank: int = key(8, POSITIVE, "[paper] rank of the adapter")
    alpha: float = key(32.0, ABOVE_ZERO, "[paper] the adapter's product is scaled by alpha / rank")
    dropout: float = key(
        0.1, BELOW_ONE, "[paper] rate for the adapter's input, rounded to 1/256 or more"
    )
    targets: tuple[str, ...] = key(
        ("q", "k", "v", "o", "gate", "up", "down"),
        _some_of(PROJECTIONS),
        "linear maps with an adapter. GPT-NeoX has q, k and v as one map, adapted if all three are "
        "named, and no gate",
    )
    init_from: str = key("", TEXT, "a PEFT folder to start from; empty: a fresh adapter", path=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; one axis may be -1, for all that remain."""

    data: int = key(-1, AXIS, "parts of the examples", free=True)
    fsdp: int = key(1, AXIS, "parts of the examples, and of the base's arrays", free=True)
    tensor: int = key(1, AXIS, "parts of the base within heads and MLP", free=True)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Of a run of several processes."""

    start_seconds: int = key(300, POSITIVE, "how long each process waits for the others", free=True)
    heartbeat_seconds: int = key(
        100, POSITIVE, "all end after this time without a sign of life from one process", free=True
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The config of a run. Build it with `RunConfig.of`, which checks every key."""

    dataset: str = key("runs/data", TEXT, "folder written by sdpo_jax.prepare", path=True)
    model: str = key("runs/llama2-7b", TEXT, "folder written by sdpo_jax.convert", path=True)
    seed: int = key(0, SEED, "seed of templates, negatives, order, adapter and dropout")
    stages: tuple[str, ...] = key(STAGES, _some_of(STAGES), "stages to train")
    prompt: str = key(
        "candidates",
        one_of(*PROMPTS),
        "candidates: the last titles and those to choose among [paper]; history: titles alone, "
        "each of which is a target in training",
    )
    history: int = key(
        10, POSITIVE, "titles in the prompt of a history, and before a segment's first target"
    )
    segment: int = key(60, POSITIVE, "most targets per example of prompt=history")
    prompt_file: str = key(
        "", TEXT, "templates in the authors' format; empty: the built-in ones", path=True
    )
    chat_template: bool = key(False, BOOLEAN, "prompts in the model's own chat format")
    chat_options: str = key(
        '{"enable_thinking": false}', JSON_OBJECT, "variables of the chat format"
    )
    item_vectors: str = key(
        "",
        TEXT,
        "a network that sdpo_jax.baselines stored: its item vectors follow the titles (LLaRA)",
        path=True,
    )
    max_length: int = key(
        512, POSITIVE, "[paper] tokens of prompt and answer; a longer prompt loses its beginning"
    )

    batch_size: int = key(
        128,
        POSITIVE,
        "[paper] examples per step over all devices. An example of prompt=history is a segment; "
        "the loss is the mean over the targets",
    )
    microbatch: int = key(
        4, POSITIVE, "examples per data shard at once; times the shards, it divides batch_size"
    )
    num_negatives: int = key(3, POSITIVE, "[paper] K; 1 is DPO")
    negatives: str = key(
        "shown",
        one_of(*NEGATIVES),
        "shown: the candidates of the prompt's window [paper]; uniform: all titles; popularity: "
        "all, by their share of the training targets to a power; hard: those of a uniform pool in "
        "a band of the reference's log-probs; disliked: titles that the user rated lowest. Except "
        "for shown, no negative is a title that the user has up to the last target of the split",
    )
    redraw: bool = key(False, BOOLEAN, "draw other negatives in each epoch")
    popularity_power: float = key(1.0, NOT_NEGATIVE, "power of the shares of negatives=popularity")
    hard_pool: int = key(32, POSITIVE, "titles that hard negatives are chosen from")
    hard_band: tuple[float, float] = key(
        (0.05, 0.3),
        BAND,
        "first and last rank of hard negatives, as shares of the pool, the most likely first",
    )
    objective: str = key(
        "sdpo", one_of(*OBJECTIVES), "or dpo_pairwise: DPO's loss, the mean over the K pairs"
    )
    beta: float = key(1.0, ABOVE_ZERO, "[paper] scale of the rewards")
    batch_layout: str = key(
        "shared_prefix", one_of(*LAYOUTS), "or padded: K+1 full rows per prompt, the oracle"
    )
    dtype: str = key("bfloat16", one_of(*DTYPES), "dtype of the base and of matrix products")
    base_dtype: str = key(
        "same", one_of(*BASE_DTYPES), "dtype that stores the frozen base; same: that of dtype"
    )
    remat: str = key(
        "full",
        one_of(*REMAT),
        "what the backward pass recomputes to save memory. none; cheap: element-wise operations; "
        "full: each layer; least: each layer, its MLP in eight pieces",
    )

    sft: StageConfig = StageConfig(epochs=5, learning_rate=1e-4)
    sdpo: StageConfig = StageConfig(epochs=3, learning_rate=1e-5)
    warmup: float = key(0.05, BELOW_ONE, "[paper] share of the steps with a rising learning rate")
    clip: float = key(0.3, ABOVE_ZERO, "[paper] largest global norm of a gradient")
    weight_decay: float = key(0.0, NOT_NEGATIVE, "weight decay of AdamW")

    tune: str = key(
        "lora", one_of("lora", "full"), "full: every weight is trained, in float32, without lora.*"
    )
    lora: LoraKeys = LoraKeys()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    validation_split: str = key("val", TEXT, "split that the best step is chosen on")
    best_by: str = key(
        "loss",
        one_of("loss", "greedy", "trie", "score"),
        "or a decoder: its HR@1 in `evaluate --follow --split=<validation_split>`, a job beside "
        "this one, for which each stage waits at its end",
    )
    validation_windows: int = key(0, COUNT, "windows, evenly spaced over the split; 0: all")
    log_every: int = key(1, POSITIVE, "steps per line of the curves")
    eval_every: int = key(50, POSITIVE, "steps between validations, each with a checkpoint")
    checkpoint_every: int = key(50, POSITIVE, "steps between checkpoints")
    tracker: str = key(
        "none",
        one_of(*TRACKERS),
        "an experiment tracker that gets the curves too, by its own package",
        free=True,
    )
    profile_steps: int = key(
        0, COUNT, "steps of each stage traced by jax.profiler into workdir/profile", free=True
    )

    @classmethod
    def of(cls, tree: Mapping[str, Any], where: str = "config.", advice: str = "") -> "RunConfig":
        """From nested keys and values, of a config file or of a run's config.json.

        Raises InputError naming the key, after `where`, that is missing, unknown or wrong, or the
        keys that exclude each other.
        """
        made = _build(cls, tree, where, advice)
        _check_together(made)
        return made

    @property
    def method(self) -> str:
        """The name of the second stage."""
        K = self.num_negatives
        return "DPO" if K == 1 else OBJECTIVES[self.objective].format(K=K)

    @property
    def base_stored(self) -> str:
        """The dtype of the frozen base."""
        return self.dtype if self.base_dtype == "same" else self.base_dtype

    def to_dict(self) -> dict[str, Any]:
        """Nested keys and values of JSON's types."""
        return _as_json(dataclasses.asdict(self))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(of_name) for name, of_name in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _build(cls: type, tree: Any, where: str, advice: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(
            f"{where.rstrip('.')}: found {brief(tree)}, expected keys and values{advice}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := [name for name in tree if name not in fields]:
        raise InputError(f"{where}{unknown[0]}: found an unknown key{advice}")
    values = {}
    for name, field in fields.items():
        if name not in tree:
            raise InputError(f"{where}{name}: found nothing, expected a value{advice}")
        value = tree[name]
        if dataclasses.is_dataclass(field.default):
            values[name] = _build(type(field.default), value, f"{where}{name}.", advice)
            continue
        expected, right = field.metadata["kind"]
        if not right(value):
            raise InputError(f"{where}{name} is {brief(value)}, expected {expected}{advice}")
        if field.metadata["path"] and value.startswith("~"):
            value = errors.expand_home(f"{where}{name}", value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _check_together(config: RunConfig) -> None:
    if config.prompt == "history":
        for name in ("chat_template", "item_vectors"):
            if getattr(config, name):
                raise InputError(
                    f"config.{name} is {brief(getattr(config, name))} beside "
                    "config.prompt='history', whose prompt is lines of titles: leave it out, or "
                    "set --config.prompt=candidates"
                )
    if config.tune == "full":
        found = {
            "base_dtype": config.base_dtype,
            "item_vectors": config.item_vectors,
            "lora.init_from": config.lora.init_from,
        }
        able = {"base_dtype": ("same", "f32")}
        for name, value in found.items():
            if value not in able.get(name, ("",)):
                raise InputError(
                    f"config.{name} is {brief(value)} beside config.tune='full', which trains all "
                    f"weights in float32: set --config.{name}={able.get(name, ('',))[0]}"
                )
    if config.negatives == "hard" and config.hard_pool < config.num_negatives:
        raise InputError(
            f"config.hard_pool is {config.hard_pool}, expected at least config.num_negatives="
            f"{config.num_negatives}, which are chosen from it: raise --config.hard_pool"
        )


def keys(
    config: Any = RunConfig(), prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """("lora.rank", its field, its value) of every key of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def explained(config: RunConfig) -> str:
    """Every key with its value, its default where that differs, and its meaning."""
    lines = []
    for (name, field, value), (_, _, default) in zip(keys(config), keys(), strict=True):
        differs = "" if value == default else f" (default {default!r})"
        lines += [f"{name} = {value!r}{differs}", f"    {field.metadata['about']}"]
    return "\n".join(lines)
