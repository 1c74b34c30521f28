"""Recommendations from a trained model: here is what this person liked, what next?

    recommender = Recommender.from_workdir("runs/quickstart/run")
    recommender.recommend(["Toy Story", "Aladdin"], k=5)

A person needs no training: the history is the prompt. Shape letters are declared in
`sdpo_jax.system.sharding`; Y counts distinct titles.
"""

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sdpo_jax.data import loader
from sdpo_jax.data.prepared import Dataset
from sdpo_jax.data.text import plain
from sdpo_jax.data.tokens import Encoder, Example, title_ids
from sdpo_jax.evaluation import catalogue, decode, title_trie
from sdpo_jax.evaluation.beam import beam_search
from sdpo_jax.evaluation.evaluator import at_once
from sdpo_jax.evaluation.ranked_items import CatalogueTitles
from sdpo_jax.serving import sources
from sdpo_jax.serving.sources import Source
from sdpo_jax.serving.titles import Items, TitleIndex, people
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError, brief

BEAMS = 20
METHODS = ("beam", "score")


class Recommended(NamedTuple):
    """`score`: log-probability of the title given the history, in nats."""

    item: int
    title: str
    score: float


class Query(NamedTuple):
    """One person's question: `history` are items, oldest first; `template` a prompt's number."""

    history: tuple[int, ...]
    allowed_I: np.ndarray
    k: int
    template: int = 0


class Recommender:
    """Ranks the items of a catalogue for people's histories. Not safe for threads.

    Args:
      source: model, adapters, catalogue and prompts.
      stage: which adapter is used; "" for the last one.
      beams: width of the beam; more are used where more titles are asked for.
    """

    def __init__(self, source: Source, stage: str = "", beams: int = BEAMS):
        self.source, self.beams = source, beams
        self.stage = stage or list(source.adapters)[-1]
        self.dataset, self.settings, s = source.dataset, source.settings, source.settings
        self.index = TitleIndex(self.dataset.titles, self.dataset.attributes)
        tokenizer = source.model.tokenizer
        self.encoder = Encoder(
            self.dataset, tokenizer, s.templates, s.seed, s.max_length, None, s.prompt, s.history
        )
        self._shards = sharding.data_shards(source.mesh)
        self.at_once = loader.round_up(at_once(source.mesh), self._shards)
        self._placed = sharding.batch_sharding(source.mesh)
        graphdef = source.model.graphdef

        def jitted(function: Callable, **settings: Any) -> Callable:
            def run(lora, base, *args, **static):
                return function(nnx.merge(graphdef, lora, base), *args, **static)

            return jax.jit(run, **settings)

        self._prefill, self._score = jitted(decode.prefill), jitted(decode.score)
        self._beam = jitted(beam_search, static_argnames="width")
        self._exact = jitted(catalogue.score_catalogue)

    @classmethod
    def from_workdir(
        cls, workdir: str | Path, stage: str = "sdpo", step: int | None = None, beams: int = BEAMS
    ) -> "Recommender":
        """The model of a run at a stage's best step, or at `step`. Raises InputError."""
        return cls(sources.of_workdir(workdir, (stage,), step), beams=beams)

    @classmethod
    def from_model(
        cls, folder: str | Path, adapter: str | Path | None = None, **settings: Any
    ) -> "Recommender":
        """A converted model with a PEFT adapter, if given; see `sources.of_model`."""
        return cls(sources.of_model(folder, adapter, **settings))

    @classmethod
    def from_bundle(
        cls, folder: str | Path, model: str | Path | None = None, beams: int = BEAMS
    ) -> "Recommender":
        """What `sdpo export --format=bundle` wrote; see `sources.of_bundle`."""
        return cls(sources.of_bundle(folder, model), beams=beams)

    def at_stage(self, stage: str) -> "Recommender":
        """The same with another adapter of its source; compiled programs are shared."""
        if stage not in self.source.adapters:
            known = ", ".join(self.source.adapters)
            raise InputError(f"stage: found {brief(stage)}, expected one of {known}")
        if self.dataset.titles:
            _ = self._on_devices  # made once for all stages
        other = copy.copy(self)
        other.stage = stage
        return other

    @property
    def identity(self) -> str:
        """SHA-256 of what its numbers depend on beside the question."""
        digest = hashlib.sha256(self.source.model.meta["sha256"].encode())
        digest.update(repr((self.dataset.titles, self.settings, self.beams)).encode())
        for leaf in jax.tree.leaves(self.source.adapters[self.stage]):
            digest.update(sharding.to_host(leaf).tobytes())
        return digest.hexdigest()

    @property
    def _weights(self) -> tuple[nnx.State, nnx.State]:
        return self.source.adapters[self.stage], self.source.model.base

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        exclude_seen: bool = True,
        items: Items | None = None,
        **options: Any,
    ) -> list[Any]:
        """The k best (title, score) for a person, best first; for several people a list of lists.

        Args:
          history: titles or ids, oldest first; or a list of such lists.
          k: how many; fewer come where fewer are allowed.
          exclude_seen: whether the history itself is left out.
          items: the items that may be recommended: ids, or a function of an item's attributes.
          **options: see `ranked`.
        """
        histories, single = people(history)
        found = [
            [(one.title, one.score) for one in listed]
            for listed in self.ranked(histories, k, exclude_seen, items, **options)
        ]
        return found[0] if single else found

    def ranked(
        self,
        histories: Sequence[Sequence[int | str]],
        k: int = 10,
        exclude_seen: bool = True,
        items: Items | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        fuzzy: bool = False,
        method: str = "beam",
        templates: Sequence[int] = (0,),
    ) -> list[list[Recommended]]:
        """The k best items for each person.

        Args:
          histories: of each person, titles or ids, oldest first.
          k: see `recommend`, as the next two.
          exclude_seen: see there.
          items: see there.
          where: attribute -> value, such as {"genres": "Comedy"}; see `TitleIndex.allowed`.
          fuzzy: whether an unknown title means the nearest one.
          method: "beam", or "score": every title's log-probability, which is exact and slower.
          templates: numbers of the prompt's wordings, taken in turn.

        Raises InputError for unknown titles, ids, attributes and methods, and for a model whose
        prompts show the candidates.
        """
        allowed_I = self.index.allowed(items, where)
        wordings = itertools.cycle(templates)
        return self.answer(
            [
                self.query(h, k, exclude_seen, allowed_I, fuzzy=fuzzy, template=next(wordings))
                for h in histories
            ],
            method,
        )

    def query(
        self,
        history: Sequence[int | str],
        k: int = 10,
        exclude_seen: bool = True,
        allowed_I: np.ndarray | None = None,
        *,
        fuzzy: bool = False,
        template: int = 0,
    ) -> Query:
        """A checked question; `allowed_I`: of `TitleIndex.allowed`. Raises InputError."""
        if self.settings.prompt != "history":
            raise InputError(
                "recommend: found a model whose prompts show the candidates "
                "(config.prompt=candidates), expected one of histories: use rank with candidates"
            )
        if type(k) is not int or k < 1:
            raise InputError(f"k: found {brief(k)}, expected a whole number of 1 or more")
        if not history:
            raise InputError("history: found none, expected one or more titles or ids")
        titles = self._titles
        known = tuple(self.index.item(one, fuzzy) for one in history)
        allowed_I = self.index.allowed() if allowed_I is None else allowed_I.copy()
        if exclude_seen:
            allowed_I[[titles.place[item] for item in known]] = False
        return Query(known, allowed_I, k, template)

    def answer(self, queries: Sequence[Query], method: str = "beam") -> list[list[Recommended]]:
        """The items for each query, those of several people computed together."""
        if method not in METHODS:
            raise InputError(f"method: found {brief(method)}, expected {' or '.join(METHODS)}")
        longest = [self.encoder.answer(self._titles.longest)]
        examples = [self._continuing(q.history, longest, q.template) for q in queries]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        found: list[list[Recommended]] = [[] for _ in examples]
        for part in self._cut(order):
            listed = self._answer_part(
                [examples[i] for i in part], [queries[i] for i in part], method
            )
            for i, one in zip(part, listed, strict=True):  # the last part is filled with repeats
                found[i] = one
        return found

    def _answer_part(
        self, examples: Sequence[Example], queries: Sequence[Query], method: str
    ) -> list[list[Recommended]]:
        allowed_BY = self._titles.titles_of(np.array([q.allowed_I for q in queries]))
        batch = jax.device_put(self._batch(examples) | {"allowed_BY": allowed_BY}, self._placed)
        prefix = self._prefill(*self._weights, batch)
        arguments = (*self._weights, prefix, self._on_devices)
        k = max(q.k for q in queries)
        if method == "beam":
            width = max(self.beams, loader.round_up(min(k, allowed_BY.shape[1]), BEAMS))
            found = self._beam(*arguments, batch["allowed_BY"], width=width, needed=k)
            title_BC, logp_BC = jax.device_get(found)
        else:
            logp_BY = np.where(allowed_BY, jax.device_get(self._exact(*arguments)), -np.inf)
            title_BC = np.argsort(-logp_BY, axis=1, kind="stable")[:, :k]
            logp_BC = np.take_along_axis(logp_BY, title_BC, 1)
        return [
            self._recommended(*self._titles.with_titles(title_C, logp_C, q.allowed_I), q.k)
            for title_C, logp_C, q in zip(title_BC, logp_BC, queries, strict=True)
        ]

    def _recommended(
        self, places: Sequence[int], logp: Sequence[float], k: int
    ) -> list[Recommended]:
        found = [int(self._titles.items[place]) for place in places[:k]]
        return [
            Recommended(item, self.dataset.titles[item], value)
            for item, value in zip(found, logp[:k], strict=True)
        ]

    def rank(
        self,
        history: Sequence[int | str],
        candidates: Sequence[int | str],
        *,
        template: int = 0,
    ) -> list[tuple[str, float]]:
        """(title, log-prob) of each candidate given a history, best first.

        Titles need not be of the catalogue. `template`: number of the prompt's wording.
        """
        if not history or not candidates:
            raise InputError("rank: found none, expected one or more titles of both kinds")
        shown, titles = ([self._title(x) for x in part] for part in (history, candidates))
        example = self._example(shown, titles, template)
        logp_C = self._logp(example)
        order = np.argsort(-logp_C, kind="stable")
        return [(titles[c], float(logp_C[c])) for c in order]

    def score(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """Log-probs of answers after a prompt, in nats.

        Nothing is added to either text but BOS, where the tokenizer begins every text with it, and
        EOS after each answer, which is tokenized alone.
        """
        if isinstance(answers, str) or not answers:
            raise InputError(f"answers: found {answers!r}, expected a list of one or more texts")
        tokenizer = self.source.model.tokenizer
        ids = self.encoder.bos + tokenizer(prompt, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"prompt: found {prompt!r}, expected a text that has tokens")
        ends = [title_ids(-1, answer, tokenizer, tokenizer.eos_token_id) for answer in answers]
        longest, most = len(ids) + max(map(len, ends)), self.source.model.config.positions
        if most is not None and longest > most:
            raise InputError(
                f"prompt: found {longest} tokens with an answer, expected up to {most}"
            )
        return self._logp(Example.single(np.array(ids, np.int32), ends)).tolist()

    def why(self, history: Sequence[int | str], item: int | str) -> list[tuple[str, float]]:
        """For each title of a history, how much the item's log-prob falls without it.

        The most important first. Raises InputError for a history of one title.
        """
        # The model does not read what comes before.
        known = [self.index.item(one) for one in history][-self.settings.history :]
        if len(known) < 2:
            raise InputError("history: found one title, expected two or more to compare")
        answer = [self.encoder.answer(self.index.item(item))]
        without = [known[:i] + known[i + 1 :] for i in range(len(known))]
        examples = [self._continuing(h, answer) for h in (known, *without)]
        whole, *parts = self._logp_of(examples)[:, 0].tolist()
        changes = [(self.dataset.titles[i], whole - v) for i, v in zip(known, parts, strict=True)]
        return sorted(changes, key=lambda pair: -pair[1])

    def _example(self, history: Sequence[str], titles: Sequence[str], template: int) -> Example:
        """The prompt of a history and candidates, by their titles."""
        given = Dataset(self.dataset.domain, dict(enumerate([*history, *titles])), {}, {}, {}, {})
        s = self.settings
        encoder = Encoder(
            given,
            self.source.model.tokenizer,
            s.templates[template : template + 1],
            s.seed,
            s.max_length,
            None,
            s.prompt,
            s.history,
        )
        shown = range(len(history))[-s.history :]
        listed = range(len(history), len(given.titles))
        answers = [encoder.answer(item) for item in listed]
        if s.prompt == "history":
            return encoder.continuing(shown, answers, 0)
        return encoder.among(shown, listed, answers)

    def _title(self, given: int | str) -> str:
        """As the catalogue writes it, if it has it."""
        if not isinstance(given, str):
            return self.dataset.titles[self.index.item(given)]
        item = self.index.known(plain(given))
        return plain(given) if item is None else self.dataset.titles[item]

    def _logp(self, example: Example) -> np.ndarray:
        """[C]: of the answers of one example."""
        room = loader.round_up(example.C, 4)  # few shapes: the last answer is repeated
        answers = (*example.answers, *[example.answers[-1]] * (room - example.C))
        return self._logp_of([Example.single(example.prompt, answers)])[0, : example.C]

    def _logp_of(self, examples: Sequence[Example]) -> np.ndarray:
        """[examples, C]: of the answers of examples that have equally many."""
        found = np.empty((len(examples), examples[0].C), np.float32)
        for part in self._cut(range(len(examples))):
            batch = jax.device_put(self._batch([examples[i] for i in part]), self._placed)
            prefix = self._prefill(*self._weights, batch)
            logp_BMC = jax.device_get(self._score(*self._weights, prefix, batch))
            found[part] = logp_BMC[:, 0]
        return found

    def _continuing(
        self, history: Sequence[int], answers: Sequence[np.ndarray], template: int = 0
    ) -> Example:
        """The prompt of a history's latest items, as many as an evaluated window has."""
        return self.encoder.continuing(history[-self.settings.history :], answers, template)

    @functools.cached_property
    def _titles(self) -> CatalogueTitles:
        """Titles and their trie."""
        if not self.dataset.titles:
            raise InputError("recommend: found no catalogue, expected one: give items.jsonl")
        return CatalogueTitles(self.dataset, self.encoder)

    @functools.cached_property
    def _on_devices(self) -> catalogue.Catalogue:
        trie = self._titles.trie
        whole = sharding.replicated(self.source.mesh)
        return catalogue.to_devices(trie, title_trie.pieces(trie), whole)

    def _cut(self, order: Sequence[int]) -> Iterator[list[int]]:
        """Parts of one size, of one example each where there is only one."""
        size = self._shards if len(order) == 1 else self.at_once
        filled = [*order, *[order[-1]] * (-len(order) % size)] if order else []
        for start in range(0, len(filled), size):
            yield filled[start : start + size]

    def _batch(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Collated to one of a few shapes."""
        return loader.collate(examples, loader.coarse_shape(examples, self._shards), self._shards)
