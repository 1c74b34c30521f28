"""The inputs of a run: all that it reads beside its config, and that its results depend on."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import Dataset, read_dataset, read_split
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.models.item_vectors import read_item_vectors
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import TENSORS
from sdpo_jax.models.store import Model, load_model, read_meta
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.runs.workdir import Run, check_fingerprint
from sdpo_jax.system.sharding import placement


@dataclasses.dataclass(frozen=True)
class Inputs:
    """See `open_inputs` and `inputs_of`.

    `wordings`: the templates before the chat format, `templates` after it; `vectors_IE`: item
    vectors of the prompts, if any.
    """

    config: RunConfig
    dataset: Dataset
    wordings: tuple[str, ...]
    templates: tuple[str, ...]
    vectors_IE: np.ndarray | None

    def model(self, mesh: Mesh, remat: str = "none") -> Model:
        """The model with a fresh adapter, on the devices of `mesh`; `remat`: for a gradient."""
        c = self.config
        return load_model(
            c.model,
            adapter_config(c),
            dtype=c.dtype,
            base_dtype=c.base_dtype,
            remat=remat,
            seed=c.seed,
            shardings=placement(mesh),
            vectors_IE=self.vectors_IE,
        )

    def encoder(self, tokenizer: Any, V: int) -> Encoder:
        """`V`: size of the model's vocabulary, from which item vectors are numbered on."""
        c = self.config
        first_vector = None if self.vectors_IE is None else V
        return Encoder(
            self.dataset,
            tokenizer,
            self.templates,
            c.seed,
            c.max_length,
            first_vector,
            c.prompt,
            c.history,
        )

    def fingerprints(self) -> dict[str, str]:
        """Kind -> SHA-256, of everything but the config."""
        c = self.config
        found = {
            "dataset": self.dataset.meta["fingerprint"],
            "model": read_meta(Path(c.model))["sha256"],
        }
        adapter = c.lora.init_from and Path(c.lora.init_from, TENSORS)
        for kind, file in (("adapter", adapter), ("item_vectors", c.item_vectors)):
            if file:
                found[kind] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return found

    def verify(self, run: Run) -> None:
        """Raises InputError if data, model or item vectors are not those of `run`.

        The adapter that its first stage started from is no longer needed.
        """
        paths = {
            "dataset": self.config.dataset,
            "model": self.config.model,
            "item_vectors": self.config.item_vectors,
        }
        without = dataclasses.replace(self.config.lora, init_from="")
        inputs = dataclasses.replace(self, config=dataclasses.replace(self.config, lora=without))
        for kind, found in inputs.fingerprints().items():
            check_fingerprint(run, kind, paths[kind], found)


def inputs_of(run: Run, split: str) -> Inputs:
    """Reads the inputs of a run, with the windows of one split, except the model's weights.

    Raises InputError for a missing, broken or changed file.
    """
    c = run.config
    dataset = read_split(Path(c.dataset), split)
    vectors_IE = read_item_vectors(c.item_vectors, dataset)
    inputs = Inputs(c, dataset, run.wordings, run.templates, vectors_IE)
    inputs.verify(run)
    return inputs


def open_inputs(config: RunConfig, templates: Sequence[str] | None = None) -> Inputs:
    """Reads the files that `config` names, except the model's weights, to train on them.

    `templates`: those that the run was started with; None: they are rendered now. Raises InputError
    for a missing or broken file.
    """
    dataset = read_dataset(Path(config.dataset))
    wordings = tuple(prompts.templates_of(dataset.domain, config.prompt_file, config.prompt))
    if templates is None:
        templates = _in_chat(config, wordings)
    vectors_IE = read_item_vectors(config.item_vectors, dataset)
    return Inputs(config, dataset, wordings, tuple(templates), vectors_IE)


def _in_chat(config: RunConfig, wordings: Sequence[str]) -> tuple[str, ...]:
    """The templates, in the model's chat format if `config.chat_template`."""
    if not config.chat_template:
        return tuple(wordings)
    tokenizer = load_tokenizer(Path(config.model))
    return tuple(prompts.in_chat(text, tokenizer, config.chat_options) for text in wordings)


def adapter_config(config: RunConfig) -> LoraConfig:
    """The adapter, or all weights: what is trained."""
    if config.tune == "full":
        return LoraConfig(targets=(), full=True)
    lora = config.lora
    return LoraConfig(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))
