"""Inputs and result files of the benchmarks: real prompts and titles as token ids."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sdpo_jax.data import prompts
from sdpo_jax.data.negatives import Negatives
from sdpo_jax.data.prepared import Dataset, read_dataset
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.data.segments import units
from sdpo_jax.data.tokens import Encoder, Example
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import read_object, write_json
from sdpo_jax.training.order import Key, encode

PROMPT, ANSWER = 300, 9  # Llama tokens of a prompt and of a title with EOS
SEGMENT = 60  # largest number of targets per history
ROWS = 16  # full rows in memory at once: more, with all logits, do not fit 24 GB
TOKENS = 8192  # of packed rows in memory at once, for the same reason
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "torch", "transformers", "peft", "trl")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Evenly spread training windows; the answers are the target and K drawn negatives."""

    dataset: Dataset
    encoder: Encoder

    def examples(self, count: int, num_negatives: int) -> list[Example]:
        kind = "shown" if self.encoder.prompt == "candidates" else "uniform"
        shown = len(self.dataset.splits["train"][0].candidates)
        if kind == "shown" and num_negatives >= shown:
            raise InputError(
                f"--k: found {num_negatives}, expected at most {shown - 1}: the data set has "
                f"{shown} candidates per window"
            )
        train = units(self.encoder, "train", SEGMENT)
        keys = [Key(unit) for unit in evenly_spaced(len(train), count)]
        negatives = Negatives(self.dataset, kind, self.encoder.seed)
        made = encode(self.encoder, "train", train, keys, negatives, num_negatives)
        return list(made.values())


def read_workload(
    model: str | Path, dataset: str | Path, seed: int = 0, prompt: str = "candidates"
) -> Workload:
    """From a converted model's tokenizer and a prepared folder."""
    data = read_dataset(dataset, ["train"])
    templates = prompts.templates_of(data.domain, prompt=prompt)
    tokenizer = load_tokenizer(Path(model))
    return Workload(data, Encoder(data, tokenizer, templates, seed, 512, prompt=prompt))


def equal_examples(count: int, num_negatives: int, prompt: int = PROMPT) -> list[Example]:
    """Examples of the lengths that a Llama tokenizer gives, for models without one."""
    answers = (np.ones(ANSWER, np.int32),) * (num_negatives + 1)
    return [Example.single(np.ones(prompt, np.int32), answers)] * count


def full_rows_at_once(count: int, answers: int) -> int:
    """Examples of `count` to compute at once as full rows: a divisor of `count`."""
    return _divisor(count, ROWS // answers)


def packed_at_once(examples: Sequence[Example]) -> int:
    """Examples with shared prompts to compute at once: a divisor of their number."""
    return _divisor(len(examples), TOKENS // max(example.tokens for example in examples))


def _divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`; 1 if `limit` is 0."""
    return max((n for n in range(1, limit + 1) if count % n == 0), default=1)


def lengths(examples: Sequence[Example]) -> dict[str, float]:
    """Median lengths in tokens."""
    return {
        "prompt_tokens": statistics.median(len(e.prompt) for e in examples),
        "answer_tokens": statistics.median(len(a) for e in examples for a in e.answers),
    }


def environment() -> dict:
    """Device, threads and versions, for the result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def read_result(file: Path) -> dict:
    """The content of a file of `write_result`. Raises InputError."""
    return read_object(file, "expected a result of benchmarks: remove it")


def result_file() -> Path:
    """benchmarks/results/<device>.json, such as amd-epyc-2-threads.json; or the accelerator."""
    found = environment()
    name = found["device"]
    if jax.default_backend() == "cpu":
        name = f"{found['processor'] or name} {found['threads']} threads"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def write_result(result: dict, output: str) -> None:
    """Writes the file `output`, or prints the result if `output` is empty."""
    if output:
        write_json(Path(output), result)
    else:
        print(json.dumps(result))


def spread_of(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
