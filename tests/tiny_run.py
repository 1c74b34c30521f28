"""A run as training leaves it, small enough to evaluate in a test."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
from tiny import hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import Dataset, UserSequence, read_dataset, write_dataset
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.runs.workdir import Run, open_run, write_stage_result
from sdpo_jax.training.step import TrainState

TITLES = ("heat", "alien", "aliens", "the thing", "jaws", "big", "fargo", "babe", "speed", "up")
ADAPTER = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("q", "v")}
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "v"))


def config_of(**changes) -> RunConfig:
    """That of a tiny run."""
    content = RunConfig().to_dict() | {"dtype": "float32", "batch_size": 8} | changes
    content["lora"] |= ADAPTER
    return RunConfig.of(content)


def dataset(windows: int = 11) -> Dataset:
    """Ten titles, four candidates and three items of history a window; of a user three a split."""
    rng = np.random.default_rng(0)
    items: dict[int, list[int]] = {}
    placed: dict[str, list] = {"train": [], "val": [], "test": []}
    for name, row in itertools.product(placed, range(windows)):
        ids, own = rng.permutation(len(TITLES))[:7].tolist(), items.setdefault(row // 3, [])
        own += [*ids[:3], ids[3 + row % 4]]
        placed[name].append((row // 3, len(own) - 1, tuple(ids[3:])))
    sequences = {user: UserSequence(user, tuple(own)) for user, own in items.items()}
    splits = {
        name: [sequences[user].window(place, 3, shown) for user, place, shown in rows]
        for name, rows in placed.items()
    }
    meta = {"protocol": "drawn for a test", "seed": 0, "history": 3}
    titles = dict(enumerate(TITLES))
    return Dataset("movie", titles, splits, meta, sequences, {item: {} for item in titles})


def adapters(model, seed: int):
    """An adapter that changes what the model says."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(x + rng.normal(0, 0.5, x.shape).astype(x.dtype), x.sharding),
        model.lora,
    )


def save(run: Path, stage: str, step: int, lora, loss: float | None = 1.0) -> None:
    checkpoints = Checkpoints(run / stage)
    state = TrainState(jax.numpy.int32(step), lora, {"moment": jax.numpy.zeros(2)})
    checkpoints.save(state, {"stage": stage}, loss)
    checkpoints.wait()
    checkpoints.close()


def finish(run: Path, stage: str, step: int) -> None:
    result = {
        "stage": stage,
        "steps": step,
        "best_step": step,
        "validation_loss": 1.0,
        "seconds": 7.0,
        "examples": 8 * step,
    }
    write_stage_result(run, stage, result)


def make_run(folder: Path, prompt: str = "candidates", data: Dataset | None = None) -> Path:
    """Prepared data, converted model and a started run without checkpoints; returns the run."""
    write_dataset(folder / "data", data or dataset())
    convert(hf_folder(folder / "hf"), folder / "model")
    config = config_of(dataset=str(folder / "data"), model=str(folder / "model"), prompt=prompt)
    meta = json.loads((folder / "model" / "model.json").read_text())
    fingerprint = read_dataset(folder / "data").meta["fingerprint"]
    templates = prompts.templates_of("movie", prompt=prompt)
    fingerprints = {"dataset": fingerprint, "model": meta["sha256"]}
    open_run(Run(folder / "run", config, fingerprints, templates, templates))
    return folder / "run"


def history_run(folder: Path, stage: str = "sft", data: Dataset | None = None) -> Path:
    """A run of histories that has finished `stage` with an adapter that changes the answers."""
    run = make_run(folder, "history", data)
    save(run, stage, 2, adapters(model_of(run), 2), 0.5)
    finish(run, stage, 2)
    return run


def model_of(run: Path):
    return load_model(run.parent / "model", LORA, dtype="float32")
