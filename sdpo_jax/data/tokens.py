"""From windows to token ids: prompt and answers are tokenised apart, so sharing is always legal."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sdpo_jax.data import prompts
from sdpo_jax.data.draws import generator
from sdpo_jax.data.prepared import Dataset, Window
from sdpo_jax.errors import InputError

MARK = "\ue000"  # around an item's number in the text of a prompt; for private use in Unicode
_MARKED = re.compile(f"{MARK}(\\d+){MARK}")


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one prompt and of C answers, each ending in EOS; all int32."""

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]

    @property
    def packed(self) -> int:
        """How many answer tokens are fed: all but each answer's last."""
        return sum(len(answer) - 1 for answer in self.answers)

    @property
    def tokens(self) -> int:
        """How many tokens are fed in all."""
        return len(self.prompt) + self.packed


def title_ids(item: int, title: str, tokenizer) -> np.ndarray:
    """Token ids of a title, no special tokens, then EOS.

    Raises InputError when the title encodes to nothing or to special tokens.
    """
    ids = tokenizer(title, add_special_tokens=False).input_ids
    if not ids or set(ids) & set(tokenizer.all_special_ids):
        raise InputError(
            f"item {item}: title {title!r} encodes to {ids}, expected one or more ordinary "
            "tokens: correct the title in items.jsonl"
        )
    return np.array([*ids, tokenizer.eos_token_id], np.int32)


def check_titles(titles: Mapping[int, str], tokenizer) -> None:
    """Raises InputError unless every title gives tokens, and they the title back.

    A title that comes back changed could never be found in what the model generates.
    """
    changed = []
    for item, title in titles.items():
        ids = title_ids(item, title, tokenizer)[:-1]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.strip() != title.strip():
            changed.append(f"item {item}: {title!r} comes back as {back!r}")
    if changed:
        raise InputError(
            f"{len(changed)} titles are changed by the model's tokenizer ({changed[0]}): "
            "correct them in items.jsonl, or use another model"
        )


class Encoder:
    """Renders and tokenises the windows of a data set.

    Every prompt begins with BOS if the tokenizer puts one there (Llama's does), in both stages.
    `max_length` bounds prompt plus longest answer: a longer prompt keeps its end, as in the
    official recipe, and is counted in `truncated`, of `encoded` in all.

    With `first_vector`, the size of the model's vocabulary, a title in a prompt can be followed by
    its item's vector (`sdpo_jax.models.item_vectors`): as the token id `first_vector` plus the
    item's place in items.jsonl.
    """

    def __init__(self, dataset: Dataset, tokenizer, templates: Sequence[str], seed: int,
                 max_length: int, first_vector: int | None = None):  # fmt: skip
        self.dataset, self.tokenizer, self.templates = dataset, tokenizer, templates
        self.seed, self.max_length = seed, max_length
        self.encoded = self.truncated = 0
        self.bos = prompts.bos(tokenizer)
        self._answers: dict[int, np.ndarray] = {}
        self.first_vector = first_vector
        self._place = {item: n for n, item in enumerate(dataset.titles)}
        if any(MARK in text for text in (*templates, *dataset.titles.values())):
            raise InputError(f"found the character {MARK!r} in a title or prompt: remove it")

    def window(self, split: str, row: int) -> Window:
        return self.dataset.splits[split][row]

    def prompt_text(self, split: str, row: int, vectors: bool = False) -> str:
        """The prompt of a row; its template is a pure function of (seed, split, row).

        With `vectors`, each title is followed by its item's number between marks.
        """
        window, titles = self.window(split, row), self.dataset.titles
        index = prompts.template_index(self.seed, split, row, len(self.templates))

        def title(item: int) -> str:
            return titles[item] + (f"{MARK}{self._place[item]}{MARK}" if vectors else "")

        return prompts.render(
            self.templates[index], [*map(title, window.history)], [*map(title, window.candidates)]
        )

    def answer(self, item: int) -> np.ndarray:
        """`title_ids` of an item, computed once."""
        if item not in self._answers:
            self._answers[item] = title_ids(item, self.dataset.titles[item], self.tokenizer)
        return self._answers[item]

    def examples(self, split: str, rows: Sequence[int], items: Sequence[Sequence[int]],
                 vectors: Sequence[bool] | None = None):  # fmt: skip
        """Examples of `rows`, the answers of each being the titles of `items[i]`, in that order.

        `vectors`: whether item vectors stand in each prompt; by default where there are any.
        """
        vectors = vectors or [self.first_vector is not None] * len(rows)
        texts = [
            self.prompt_text(split, row, shown) for row, shown in zip(rows, vectors, strict=True)
        ]
        return [
            self._example(ids, [self.answer(item) for item in of_row])
            for ids, of_row in zip(self._ids(texts), items, strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, what lies between marks tokenised apart."""
        cut = [_MARKED.split(text) for text in texts]  # text, number, text, …, text
        pieces = [piece for parts in cut for piece in parts[::2]]
        encoded = iter(self.tokenizer(pieces, add_special_tokens=False).input_ids if pieces else [])
        found = []
        for parts in cut:
            ids = list(next(encoded))
            for number in parts[1::2]:
                ids += [self.first_vector + int(number), *next(encoded)]
            found.append(ids)
        return found

    def _example(self, ids: list[int], answers: list[np.ndarray]) -> Example:
        room = self.max_length - max(map(len, answers)) - len(self.bos)
        if room < 1:
            raise InputError(
                f"max_length={self.max_length} leaves no room for a prompt beside an answer of "
                f"{max(map(len, answers))} tokens: raise --config.max_length"
            )
        self.encoded += 1
        self.truncated += len(ids) > room
        return Example(np.array(self.bos + ids[-room:], np.int32), tuple(answers))


def training_items(encoder: Encoder, split: str, row: int, num_negatives: int) -> list[int]:
    """The target and `num_negatives` of the other candidates shown, drawn once per example."""
    window = encoder.window(split, row)
    others = [item for item in window.candidates if item != window.target]
    draw = generator(encoder.seed, "negatives", split, row)
    chosen = draw.choice(len(others), num_negatives, replace=False)
    return [window.target, *(others[i] for i in chosen)]
