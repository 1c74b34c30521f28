"""Eight simulated devices, and the folders that most tests start from."""

import gc
import os
import threading

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# What is compiled is not kept: most has shapes of its own, and keeping costs more than it saves.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import dataclasses
import functools
from pathlib import Path

import chat_endpoint
import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from tiny import hf_folder, history_dataset, tiny_dataset
from trainers import XLA_FLAGS

from configs import movielens
from sdpo_jax.chatrec import chatrec
from sdpo_jax.convert import convert
from sdpo_jax.data.loader import Shape, collate, round_up
from sdpo_jax.data.prepared import write_dataset
from sdpo_jax.data.tokens import Example
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig

os.environ["XLA_FLAGS"] = XLA_FLAGS  # read when the first array is made
SLOW = (
    "test_survival",
    "test_processes",
    "test_history_run",
    "test_benchmarks",
    "test_train",
    "test_step",
    "test_families",
)
TINY = DecoderConfig(V=97, L=3, D=16, N=4, G=2, H=4, F=24, tied=True)


gc.set_threshold(200_000, 20, 50)  # tracing makes much that lives on: 12% less time


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A decoder split as training splits it, with an adapter whose B is not zero."""

    graphdef: nnx.GraphDef
    lora: nnx.State
    base: nnx.State

    @property
    def decoder(self) -> Decoder:
        return nnx.merge(self.graphdef, self.lora, self.base)


@functools.cache
def tiny_model(
    config: DecoderConfig = TINY, seed: int = 0, dropout: float = 0.0, **kwargs
) -> TinyModel:
    lora = LoraConfig(rank=2, alpha=4.0, dropout=dropout)
    decoder = Decoder(config, lora, rngs=nnx.Rngs(seed), **kwargs)
    graphdef, lora, base = nnx.split(decoder, nnx.LoRAParam, ...)
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return TinyModel(graphdef, jax.tree.unflatten(structure, noisy), base)


@pytest.fixture
def model() -> TinyModel:
    return tiny_model()


def random_examples(rng, B: int, C: int, P: int = 11, A: int = 5, V: int = 97) -> list[Example]:
    """Prompts of 4 to P tokens and answers of 1 to A tokens, the last one EOS (2)."""

    def answer():
        n = rng.integers(0, A)
        return np.array([*rng.integers(3, V, n), 2], np.int32)

    return [
        Example.single(
            rng.integers(3, V, rng.integers(4, P + 1)).astype(np.int32),
            [answer() for _ in range(C)],
        )
        for _ in range(B)
    ]


def random_segments(rng, B: int, C: int, M: int = 5, A: int = 5, V: int = 97) -> list[Example]:
    """Histories of a head, 0 to 2 context titles and 1 to M targets, each title ending in 2."""

    def title():
        return np.array([*rng.integers(3, V, rng.integers(0, A)), 2], np.int32)

    def example():
        context, targets = int(rng.integers(0, 3)), int(rng.integers(1, M + 1))
        head = rng.integers(3, V, rng.integers(1, 5)).astype(np.int32)
        answers = tuple(tuple(title() for _ in range(C)) for _ in range(targets))
        titles = [title() for _ in range(context)]
        start = np.concatenate([head, *titles])
        sizes = [len(of[0]) for of in answers]
        places = len(start) - 1 + np.cumsum([0, *sizes[:-1]])
        prompt = np.concatenate([start, *(of[0] for of in answers)])[:-1]
        return Example(prompt, tuple(map(int, places)), answers, continued=True)

    return [example() for _ in range(B)]


def random_batch(
    B: int, C: int, seed: int = 0, rows: int = 1, make=random_examples
) -> dict[str, np.ndarray]:
    """`make`: random_examples, of one target each, or random_segments."""
    rng = np.random.default_rng(seed)
    batch = collate_padded(make(rng, B, C), rows)
    shape = batch["answers_BMCA"].shape[:3]
    return batch | {"reference_logp_BMC": rng.normal(-9, 2, shape).astype(np.float32)}


def collate_padded(examples: list[Example], rows: int = 1) -> dict[str, np.ndarray]:
    """A batch whose every axis has padding."""
    fullest = max(sum(e.tokens for e in part) for part in np.array_split(examples, rows))
    P, S, Q, M = (
        max(of)
        for of in zip(*((len(e.prompt), e.packed, e.heads, e.M) for e in examples), strict=True)
    )
    A = max(5, *(len(a) for e in examples for a in e.answers))
    shape = Shape(P + 1, S + 1, Q + (Q > 1), M + (M > 1), A, T=round_up(fullest + 1))
    return collate(examples, shape, rows)


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Path:
    """Where the copy of each case of a damaged folder lies; see damage.py."""
    return tmp_path_factory.mktemp("case") / "folder"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A converted model of 24k parameters with a tokenizer of one token a letter."""
    folder = tmp_path_factory.mktemp("model")
    convert(str(hf_folder(folder / "hf")), str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_dataset(folder, tiny_dataset())
    return folder


@pytest.fixture
def config(dataset_folder, model_folder) -> ml_collections.ConfigDict:
    """One step of each stage in this process, on its eight devices."""
    return tiny_config(dataset_folder, model_folder)


@pytest.fixture(scope="session")
def histories_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "histories"
    write_dataset(folder, history_dataset())
    return folder


def tiny_config(dataset_folder: Path, model_folder: Path) -> ml_collections.ConfigDict:
    config = movielens.get_config()
    config.dataset, config.model, config.dtype = str(dataset_folder), str(model_folder), "float32"
    config.batch_size, config.microbatch, config.mesh.data = 8, 1, 8
    config.sft.max_steps = config.sdpo.max_steps = 1
    return config


@pytest.fixture(scope="module")
def kept_compilations(tmp_path_factory):
    """For a file whose tests start one training again and again: what it compiled is kept."""
    changes = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compilations")),
    }

    def use(settings: dict[str, str], enabled: bool) -> None:
        os.environ.update(settings)
        jax.config.update("jax_compilation_cache_dir", settings.get("JAX_COMPILATION_CACHE_DIR"))
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()

    use(changes, True)
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    use({"JAX_ENABLE_COMPILATION_CACHE": "false"}, False)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", chat_endpoint.KEY)
    with chat_endpoint.Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def ask(server, dataset_folder, tmp_path):
    """`chatrec` on the tiny data set, with a new workdir."""

    def call(workdir=tmp_path / "new", dataset=dataset_folder, endpoint=None, model="m", **others):
        return chatrec(dataset, workdir, endpoint or server.url, model, **others)

    return call
