"""The keys of a run's config, each with the kind of value that it takes."""

from collections.abc import Sequence
from typing import Any

from sdpo_jax import errors
from sdpo_jax.data.negatives import NEGATIVES
from sdpo_jax.data.prompts import PROMPTS
from sdpo_jax.errors import InputError, shown
from sdpo_jax.files import ABOVE_ZERO, COUNT, NUMBER, POSITIVE, TEXT, Kind, one_of, parse_json
from sdpo_jax.models.decoder import REMAT
from sdpo_jax.models.lora import PROJECTIONS
from sdpo_jax.models.quantize import BASE_DTYPES
from sdpo_jax.objectives.logprobs import LAYOUTS
from sdpo_jax.objectives.losses import OBJECTIVES

BOOLEAN: Kind = ("True or False", lambda value: type(value) is bool)
STAGES = ("sft", "sdpo")
PATHS = ("dataset", "model", "prompt_file", "item_vectors", "lora.init_from")
DTYPES = ("float32", "bfloat16")


def _some_of(known: Sequence[str]) -> Kind:
    def right(value: Any) -> bool:
        found = list(value) if type(value) in (list, tuple) else []
        return found != [] and found == [name for name in known if name in found]

    return f"some of {', '.join(known)}, in this order", right


def _is_object(value: Any) -> bool:
    try:
        return type(value) is str and type(parse_json(value)) is dict
    except ValueError:
        return False


def _below_one(value: Any) -> bool:
    return NUMBER[1](value) and 0 <= value < 1


def _band(value: Any) -> bool:
    shares = list(value) if type(value) in (list, tuple) else []
    return len(shares) == 2 and all(map(NUMBER[1], shares)) and 0 <= shares[0] < shares[1] <= 1


def _axis(value: Any) -> bool:
    return type(value) is int and -1 <= value < 2**31


KINDS: dict[str, Kind] = {
    "prompt": one_of(*PROMPTS),
    "negatives": one_of(*NEGATIVES),
    "tune": one_of("lora", "full"),
    "redraw": BOOLEAN,
    "hard_band": ("two shares, the lower first", _band),
    "batch_layout": one_of(*LAYOUTS),
    "remat": one_of(*REMAT),
    "dtype": one_of(*DTYPES),
    "base_dtype": one_of(*BASE_DTYPES),
    "objective": one_of(*OBJECTIVES),
    "best_by": one_of("loss", "greedy", "trie", "score"),
    "chat_template": BOOLEAN,
    "stages": _some_of(STAGES),
    "lora.targets": _some_of(PROJECTIONS),
    "seed": ("a whole number, 0 or more, below 2**32", lambda v: COUNT[1](v) and v < 2**32),
    "popularity_power": ("a finite number, 0 or more", lambda v: NUMBER[1](v) and v >= 0),
    "weight_decay": ("a finite number, 0 or more", lambda v: NUMBER[1](v) and v >= 0),
    **dict.fromkeys((*PATHS, "validation_split"), TEXT),
    "chat_options": ("a JSON object as text", _is_object),
    **dict.fromkeys(
        ("batch_size", "microbatch", "num_negatives", "max_length", "history", "segment",
         "hard_pool", "log_every", "eval_every",
         "checkpoint_every", "lora.rank", "sft.epochs", "sdpo.epochs",
         "distributed.start_seconds", "distributed.heartbeat_seconds"), POSITIVE
    ),
    **dict.fromkeys(
        ("beta", "clip", "lora.alpha", "sft.learning_rate", "sdpo.learning_rate"), ABOVE_ZERO
    ),
    **dict.fromkeys(
        ("sft.max_steps", "sdpo.max_steps", "validation_windows", "profile_steps"), COUNT
    ),
    **dict.fromkeys(("warmup", "lora.dropout"), ("a number, 0 <= it < 1", _below_one)),
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor"), ("a whole number or -1", _axis)),
}  # fmt: skip


def method(config) -> str:
    """What the second stage of a run is called."""
    if config.num_negatives == 1:
        return "DPO"
    return "S-DPO" if config.objective == "sdpo" else f"DPO, {config.num_negatives} pairs"


def at_home(config) -> None:
    """Puts the home folder for "~" in the paths of a config. Raises InputError."""
    flat = config.to_dict()
    for key in PATHS:
        parent, _, name = key.rpartition(".")
        value = (flat.get(parent) or {} if parent else flat).get(name)
        if type(value) is str and value.startswith("~"):
            config.update_from_flattened_dict({key: errors.at_home(f"config.{key}", value)})


def check(config) -> None:
    """Refuses a config of which a key is missing or wrong. Raises InputError naming the key."""
    for key, (expected, right) in KINDS.items():
        value = config.to_dict()
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not right(value):
            raise InputError(f"config.{key} is {shown(value)}, expected {expected}")
    if config.prompt == "history":
        for key in ("chat_template", "item_vectors"):
            if getattr(config, key):
                raise InputError(
                    f"config.{key} is {shown(getattr(config, key))} beside "
                    "config.prompt='history', whose prompt is lines of titles: leave it out, or "
                    "set --config.prompt=candidates"
                )
    if config.tune == "full":
        for key, able in (("base_dtype", ("same", "f32")), ("item_vectors", ("",)),
                          ("lora.init_from", ("",))):  # fmt: skip
            value = config.to_dict()
            for part in key.split("."):
                value = value[part]
            if value not in able:
                raise InputError(
                    f"config.{key} is {shown(value)} beside config.tune='full', which trains all "
                    f"weights in float32: set --config.{key}={able[0]}"
                )
    if config.negatives == "hard" and config.hard_pool < config.num_negatives:
        raise InputError(
            f"config.hard_pool is {config.hard_pool}, expected at least config.num_negatives="
            f"{config.num_negatives}, which are chosen from it: raise --config.hard_pool"
        )
