"""Tokenizes windows, prompt and answers separately, so that answers can share a prompt's tokens."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import Dataset, Window
from sdpo_jax.data.text import plain
from sdpo_jax.system.errors import InputError

NEW_TOKENS = 20  # the authors' evaluate_batch.py
MARK = "\ue000"  # around an item's number in the text of a prompt; a private-use character
_MARKED = re.compile(f"{MARK}(\\d+){MARK}")


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of C answers for each of its M targets; all int32.

    An answer ends in its end token. `places`: per target, the index of the prompt token that
    predicts its answers' first token. `continued`: the prompt contains each target's first answer,
    so only the others are fed beside it.
    """

    prompt: np.ndarray
    places: tuple[int, ...]
    answers_MC: tuple[tuple[np.ndarray, ...], ...]
    continued: bool = False

    @classmethod
    def single(cls, prompt: np.ndarray, answers: Sequence[np.ndarray]) -> "Example":
        """One target, whose answers follow the prompt's end."""
        return cls(prompt, (len(prompt) - 1,), (tuple(answers),))

    @property
    def answers(self) -> tuple[np.ndarray, ...]:
        """The M * C answers, target by target."""
        return tuple(answer for answers_C in self.answers_MC for answer in answers_C)

    @property
    def M(self) -> int:
        return len(self.answers_MC)

    @property
    def C(self) -> int:
        return len(self.answers_MC[0])

    @property
    def packed(self) -> int:
        """Number of answer tokens fed beside the prompt: all but each answer's last."""
        return sum(len(a) - 1 for answers in self.answers_MC for a in answers[self.continued :])

    @property
    def heads(self) -> int:
        """Number of prompt tokens that predict a token of an answer."""
        return sum(len(answers[0]) for answers in self.answers_MC) if self.continued else self.M

    @property
    def tokens(self) -> int:
        """Number of tokens fed in all."""
        return len(self.prompt) + self.packed


def title_ids(item: int, title: str, tokenizer, end: int) -> np.ndarray:
    """Token ids of a title without special tokens, then `end`.

    Raises InputError if the title encodes to nothing or to special tokens.
    """
    ids = tokenizer(title, add_special_tokens=False).input_ids
    if not ids or set(ids) & {*tokenizer.all_special_ids, end}:
        raise InputError(
            f"item {item}: title {title!r} encodes to {ids}, expected one or more ordinary "
            "tokens: correct the title in items.jsonl"
        )
    return np.array([*ids, end], np.int32)


def new_tokens(titles: Iterable[str], tokenizer) -> int:
    """Most tokens of a free answer: the paper's 20, or the longest title's if it has more."""
    ids = tokenizer([*titles], add_special_tokens=False).input_ids
    return max(NEW_TOKENS, *map(len, ids))


def check_titles(titles: Mapping[int, str], tokenizer) -> None:
    """Raises InputError unless every title has tokens that decode to it.

    A title that decodes to another text could never match a generated answer.
    """
    changed = []
    for item, title in titles.items():
        ids = title_ids(item, title, tokenizer, tokenizer.eos_token_id)[:-1]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if plain(back) != plain(title):
            changed.append(f"item {item}: {title!r} comes back as {back!r}")
    if changed:
        raise InputError(
            f"{len(changed)} titles are changed by the model's tokenizer ({changed[0]}): "
            "correct them in items.jsonl, or use another model"
        )


class Encoder:
    """Renders and tokenizes the windows of a data set.

    Every prompt begins with BOS if the tokenizer puts one there (Llama's does), in both stages.
    `max_length` bounds prompt plus longest answer. A longer prompt loses its beginning, as in the
    official recipe; `truncated` counts those prompts, `encoded` all.

    `prompt` is one of `prompts.PROMPTS`. A history has up to `history` titles, one per line; the
    line break also ends the answers. A history that is too long loses its oldest titles.

    With `first_vector`, the size of the model's vocabulary, a title in a prompt can be followed by
    its item's vector (`sdpo_jax.models.item_vectors`): the token id `first_vector` plus the item's
    index in items.jsonl.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer,
        templates: Sequence[str],
        seed: int,
        max_length: int,
        first_vector: int | None = None,
        prompt: str = "candidates",
        history: int = 10,
    ):
        self.dataset, self.tokenizer, self.templates = dataset, tokenizer, templates
        self.seed, self.max_length = seed, max_length
        self.prompt, self.history = prompt, history
        self.encoded = self.truncated = 0
        self.bos = prompts.bos(tokenizer)
        self.end = prompts.answer_end(tokenizer, prompt)
        self._answers: dict[int, np.ndarray] = {}
        self._heads: dict[int, list[int]] = {}
        self.first_vector = first_vector
        self._place = {item: n for n, item in enumerate(dataset.titles)}
        if any(MARK in text for text in (*templates, *dataset.titles.values())):
            raise InputError(f"found the character {MARK!r} in a title or prompt: remove it")

    def truncation(self) -> str:
        """The warning about prompts that were too long, or ""."""
        if not self.truncated:
            return ""
        return (
            f"warning: {self.truncated} of {self.encoded} prompts exceed "
            f"config.max_length={self.max_length} and lose their beginning"
        )

    def window(self, split: str, row: int) -> Window:
        return self.dataset.splits[split][row]

    def prompt_text(self, split: str, row: int, vectors: bool = False) -> str:
        """The prompt of a row; its template is a pure function of (seed, split, row).

        With `vectors`, each title is followed by its item's number between marks.
        """
        window, titles = self.window(split, row), self.dataset.titles
        index = prompts.template_index(self.seed, split, row, len(self.templates))
        history = window.history if self.prompt == "candidates" else self.before(window)

        def title(item: int) -> str:
            return titles[item] + (f"{MARK}{self._place[item]}{MARK}" if vectors else "")

        return prompts.render(
            self.templates[index], [*map(title, history)], [*map(title, window.candidates)]
        )

    def before(self, window: Window) -> tuple[int, ...]:
        """The items that a history prompt may contain before a window's target, oldest first."""
        items = self.dataset.sequences[window.user].items
        return items[max(0, window.place - self.history) : window.place]

    def answer(self, item: int) -> np.ndarray:
        """`title_ids` of an item, computed once."""
        if item not in self._answers:
            title = self.dataset.titles[item]
            self._answers[item] = title_ids(item, title, self.tokenizer, self.end)
        return self._answers[item]

    def examples(
        self,
        split: str,
        rows: Sequence[int],
        items: Sequence[Sequence[int]],
        vectors: Sequence[bool] | None = None,
    ) -> list[Example]:
        """Examples of `rows`; the answers of `rows[i]` are the titles of `items[i]`, in order.

        `vectors`: whether each prompt has item vectors (default: if there are any).
        """
        if self.prompt == "history":
            return [
                self._history(split, row, [*map(self.answer, listed)])
                for row, listed in zip(rows, items, strict=True)
            ]
        vectors = vectors or [self.first_vector is not None] * len(rows)
        texts = [self.prompt_text(split, row, v) for row, v in zip(rows, vectors, strict=True)]
        return [
            self._example(ids, [*map(self.answer, listed)])
            for ids, listed in zip(self._ids(texts), items, strict=True)
        ]

    def segment(self, split: str, rows: Sequence[int], items: Sequence[Sequence[int]]) -> Example:
        """One example of a history in which the titles at the consecutive `rows` all are targets.

        `items[i]`: the target of `rows[i]`, then its negatives.
        """
        targets = [self.answer(target) for target, *_ in items]
        ids = self.head(split, rows[0]) + self._lines(self.context(split, rows[0]))
        sizes = [len(answer) for answer in targets]
        places = len(ids) - 1 + np.cumsum([0, *sizes[:-1]])
        # The last end token is predicted but never fed.
        prompt = np.concatenate([np.array(ids, np.int32), *targets])[:-1]
        self.encoded += 1
        answers = tuple(tuple(map(self.answer, listed)) for listed in items)
        return Example(prompt, tuple(map(int, places)), answers, continued=True)

    def head(self, split: str, row: int) -> list[int]:
        """Token ids of a history prompt before its titles."""
        return self._head(prompts.template_index(self.seed, split, row, len(self.templates)))

    def _head(self, template: int) -> list[int]:
        if template not in self._heads:
            text = prompts.head(self.templates[template])
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            self._heads[template] = self.bos + ids
        return self._heads[template]

    @functools.cached_property
    def room(self) -> int:
        """Most tokens that the titles of a history may have with the longest head."""
        heads = [prompts.head(template) for template in self.templates]
        longest = max(map(len, self.tokenizer(heads, add_special_tokens=False).input_ids))
        return self.max_length - len(self.bos) - longest

    def context(self, split: str, row: int) -> Sequence[int]:
        """The items before a segment's first target, in at most half of the room."""
        return self._fitting(self.before(self.window(split, row)), self.room // 2)

    def _history(self, split: str, row: int, answers: list[np.ndarray]) -> Example:
        index = prompts.template_index(self.seed, split, row, len(self.templates))
        return self.continuing(self.before(self.window(split, row)), answers, index)

    def continuing(
        self, items: Sequence[int], answers: Sequence[np.ndarray], template: int
    ) -> Example:
        """A history prompt of `items`, oldest first, with the given answers."""
        head = self._head(template)
        fitting = self._fitting(items, self.max_length - len(head) - max(map(len, answers)))
        self.encoded += 1
        self.truncated += len(fitting) < len(items)
        return Example.single(np.array(head + self._lines(fitting), np.int32), answers)

    def among(
        self, history: Sequence[int], candidates: Sequence[int], answers: Sequence[np.ndarray]
    ) -> Example:
        """A prompt that shows candidates, in the first wording, with the given answers."""
        shown, listed = ([self.dataset.titles[i] for i in part] for part in (history, candidates))
        text = prompts.render(self.templates[0], shown, listed)
        return self._example(self._ids([text])[0], [*answers])

    def _lines(self, items: Sequence[int]) -> list[int]:
        return [int(token) for item in items for token in self.answer(item)]

    def _fitting(self, items: Sequence[int], room: int) -> Sequence[int]:
        """The latest of `items` whose titles have at most `room` tokens in all."""
        sizes = np.cumsum([len(self.answer(item)) for item in reversed(items)])
        count = int(np.searchsorted(sizes, room, side="right"))
        if items and count == 0:
            raise self.no_room(len(self.answer(items[-1])))
        return items[len(items) - count :]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: marked numbers as vectors, the pieces between tokenized apart."""
        cut = [_MARKED.split(text) for text in texts]  # text, number, text, …, text
        pieces = [piece for parts in cut for piece in parts[::2]]
        encoded = iter(self.tokenizer(pieces, add_special_tokens=False).input_ids if pieces else [])
        found = []
        for parts in cut:
            ids = list(next(encoded))
            for number in parts[1::2]:
                assert self.first_vector is not None
                ids += [self.first_vector + int(number), *next(encoded)]
            found.append(ids)
        return found

    def _example(self, ids: list[int], answers: list[np.ndarray]) -> Example:
        room = self.max_length - max(map(len, answers)) - len(self.bos)
        if room < 1:
            raise self.no_room(max(map(len, answers)))
        self.encoded += 1
        self.truncated += len(ids) > room
        return Example.single(np.array(self.bos + ids[-room:], np.int32), answers)

    def no_room(self, tokens: int) -> InputError:
        """The error for titles that do not fit into a prompt."""
        return InputError(
            f"max_length={self.max_length} leaves no room for a prompt beside an answer of "
            f"{tokens} tokens: raise --config.max_length"
        )
