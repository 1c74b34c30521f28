"""A run's model, windows and compiled decoders, set up once for many adapters."""

import collections
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sdpo_jax.data import loader
from sdpo_jax.data.negatives import against_disliked
from sdpo_jax.data.prepared import read_split
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.data.tokens import new_tokens
from sdpo_jax.evaluation import catalogue, decode, metrics, predictions, title_trie
from sdpo_jax.evaluation.beam import beam_search
from sdpo_jax.evaluation.predictions import Prediction
from sdpo_jax.evaluation.ranked_items import RankedItems
from sdpo_jax.evaluation.results import exposure_of
from sdpo_jax.objectives.logprobs import Batch
from sdpo_jax.runs.config import MeshConfig
from sdpo_jax.runs.inputs import inputs_of
from sdpo_jax.runs.workdir import Run
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax


def at_once(mesh: jax.sharding.Mesh) -> int:
    """Windows or people that are decoded together by default."""
    return 8 if sharding.platform(mesh) == "cpu" else 32


class Evaluator:
    """Decodes windows of one split with any adapter of a run.

    Args:
      run: of `workdir.read_run`.
      split: of the run's data set.
      limit: number of windows, evenly spaced over the split, so that they cover many users; 0: all.
      rank: "candidates", those of each window; "catalogue", see `RankedItems`; or "disliked", see
        `against_disliked`, which leaves out windows without such an item.
      beams: width of the decoder `beam`.
      batch_size: windows at once, rounded up to a multiple of the data shards; 0: 8 on a CPU, 32
        elsewhere. Results depend on it by rounding only.

    Raises:
      InputError: a missing or changed data set or model, an unknown split.
    """

    def __init__(
        self,
        run: Run,
        split: str,
        limit: int = 0,
        batch_size: int = 0,
        rank: str = "candidates",
        beams: int = 20,
    ):
        c = run.config
        set_up_jax(c.dtype)
        inputs = inputs_of(run, split)
        self.split, self.dataset = split, inputs.dataset
        self.rank, self.beams = rank, beams
        self.exposure = (
            exposure_of(read_split(Path(c.dataset), "train")) if rank == "catalogue" else None
        )
        mesh = _mesh(c.mesh)
        self.model = inputs.model(mesh)
        self.windows = dict(enumerate(self.dataset.splits[split]))
        self.rows = evenly_spaced(len(self.windows), limit)
        if rank == "disliked":
            self.windows = against_disliked(self.dataset, split)
            self.rows = [row for row in self.rows if row in self.windows]
            if not self.rows:
                raise InputError(
                    f"--rank: found disliked for {split}, where no user rates an item low after a "
                    "window's history, expected ratings: leave the flag out"
                )
        self.encoder = inputs.encoder(self.model.tokenizer, self.model.config.V)
        self.ends = (self.encoder.end, *self.model.ends)
        answers = [self.windows[row].candidates for row in self.rows]
        self._ranked = None
        if rank == "catalogue":  # the longest title, so that no prompt's room depends on its target
            self._ranked = RankedItems(self.dataset, split, self.encoder)
            answers = [(self._ranked.longest,)] * len(self.rows)
        self.examples = self.encoder.examples(split, self.rows, answers)
        batch_size = batch_size or at_once(mesh)
        self._rows, self._platform = sharding.data_shards(mesh), sharding.platform(mesh)
        self._batches = self._cut(loader.round_up(batch_size, self._rows))
        self._placed = sharding.batch_sharding(mesh)
        self._prefill, self._decoders = self._compile(sharding.replicated(mesh))

    @functools.cached_property
    def new_tokens(self) -> int:
        """The most tokens that `greedy` generates."""
        return new_tokens(self.dataset.titles.values(), self.model.tokenizer)

    def _cut(self, size: int) -> list[list[int]]:
        """Batches of similar length; the last is filled with repeats."""
        examples = self.examples
        order = sorted(
            range(len(examples)), key=lambda i: len(examples[i].prompt) + examples[i].packed
        )
        order += order[-1:] * (-len(order) % size)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _compile(self, whole: jax.sharding.Sharding):
        graphdef = self.model.graphdef

        def jitted(function: Callable) -> Callable:
            return jax.jit(
                lambda lora, base, *args: function(nnx.merge(graphdef, lora, base), *args)
            )

        decoders = {
            "greedy": jitted(
                lambda decoder, prefix, batch: decode.greedy(
                    decoder, prefix, self.ends, self.new_tokens
                )
            ),
            "trie": jitted(
                lambda decoder, prefix, batch: decode.trie(decoder, prefix, only(batch))
            ),
            "score": jitted(lambda *args: decode.score(*args)[:, 0]),
        }
        if self._ranked is not None:
            trie = self._ranked.trie
            titles = catalogue.to_devices(trie, title_trie.pieces(trie), whole)
            score = jitted(
                lambda decoder, prefix, batch, titles: catalogue.score_catalogue(
                    decoder, prefix, titles
                )
            )
            beam = jitted(
                lambda decoder, prefix, batch, titles: beam_search(
                    decoder, prefix, titles, batch["allowed_BY"], self.beams
                )
            )
            decoders = {
                name: lambda *args, f=f: f(*args, titles)
                for name, f in (("score", score), ("beam", beam))
            }
        return jitted(decode.prefill), decoders

    def run(
        self, lora: nnx.State, decoders: Sequence[str], advance: Callable[[int], Any] = int
    ) -> tuple[dict[str, list[Prediction]], dict[str, float]]:
        """Predictions of every decoder in order of rows, and its seconds.

        The prompts are run once for all decoders; the seconds of each include them, and
        compilation. `advance` is called with the number of windows done.
        """
        found: dict[str, dict[int, Prediction]] = {name: {} for name in decoders}
        seconds: dict[str, float] = collections.defaultdict(float)
        examples = [[self.examples[i] for i in part] for part in self._batches]
        limit = loader.most_shapes(len(examples), self._platform)
        shapes = None
        if self._ranked is not None:
            shapes = [loader.coarse_shape(part, self._rows) for part in examples]
        batches = loader.batches(examples, rows=self._rows, limit=limit, shapes=shapes)
        for part, batch in zip(self._batches, batches, strict=True):
            if self._ranked is not None:
                windows = [self.windows[self.rows[i]] for i in part]
                batch["allowed_BY"] = self._ranked.allowed_titles(windows)
            batch = jax.device_put(batch, self._placed)
            start = time.perf_counter()
            prefix = jax.block_until_ready(self._prefill(lora, self.model.base, batch))
            shared = time.perf_counter() - start
            for name in decoders:
                start = time.perf_counter()
                out = jax.device_get(self._decoders[name](lora, self.model.base, prefix, batch))
                seconds[name] += shared + time.perf_counter() - start
                by_window = zip(*out, strict=True) if name == "beam" else out
                for i, value in zip(part, by_window, strict=True):
                    found[name][i] = self._prediction(name, i, value)
            advance(len(set(part)))
        ordered = {name: [of[i] for i in range(len(self.rows))] for name, of in found.items()}
        return ordered, dict(seconds)

    def _prediction(self, decoder: str, i: int, value: Any) -> Prediction:
        """The prediction of window i from a decoder's output.

        `trie` and `score` choose a candidate, so they are always valid.
        """
        window = self.windows[self.rows[i]]
        titles, target = self.dataset.titles, window.candidates.index(window.target)
        record = predictions.about(self.rows[i], window, titles)
        if self._ranked is not None:
            if decoder == "beam":
                return record | self._ranked.by_beam(window, *value)
            return record | self._ranked.by_score(window, value)
        if decoder == "score":
            order = np.argsort(-value, kind="stable")
            items = [window.candidates[c] for c in order]
            rank = metrics.target_rank(value.tolist(), target)
            return record | predictions.ranked(items, value[order], titles, rank)
        candidates = [titles[item] for item in window.candidates]
        if decoder == "trie":
            return record | predictions.generated(candidates[value], int(value), target)
        text = self._text(value.tolist())
        return record | predictions.generated(text, metrics.recommended(text, candidates), target)

    def _text(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(
            list(itertools.takewhile(lambda token: token not in self.ends, tokens)),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # would change titles with spaces before marks
        )


def only(batch: Batch) -> jax.Array:
    """`answers_BCA` of examples with one target each."""
    return batch["answers_BMCA"][:, 0]


def _mesh(mesh: MeshConfig):
    """All devices here, with training's model sharding where their number allows it."""
    fsdp, tensor = max(mesh.fsdp, 1), max(mesh.tensor, 1)
    if jax.device_count() % (fsdp * tensor):
        fsdp = tensor = 1
    return sharding.make_mesh(-1, fsdp, tensor)
