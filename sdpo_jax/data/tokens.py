"""From windows to token ids: prompt and answers are tokenised apart, so sharing is always legal."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sdpo_jax.data import prompts
from sdpo_jax.data.draws import generator
from sdpo_jax.data.prepared import Dataset, Window
from sdpo_jax.errors import InputError


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
    """

    def __init__(self, dataset: Dataset, tokenizer, templates: Sequence[str], seed: int,
                 max_length: int):  # fmt: skip
        self.dataset, self.tokenizer, self.templates = dataset, tokenizer, templates
        self.seed, self.max_length = seed, max_length
        self.encoded = self.truncated = 0
        start = tokenizer("", add_special_tokens=True).input_ids[:1]
        self.bos = start if start == [tokenizer.bos_token_id] else []
        self._answers: dict[int, np.ndarray] = {}

    def window(self, split: str, row: int) -> Window:
        return self.dataset.splits[split][row]

    def prompt_text(self, split: str, row: int) -> str:
        """The prompt of a row; its template is a pure function of (seed, split, row)."""
        window, titles = self.window(split, row), self.dataset.titles
        index = prompts.template_index(self.seed, split, row, len(self.templates))
        return prompts.render(
            self.templates[index],
            [titles[item] for item in window.history],
            [titles[item] for item in window.candidates],
        )

    def answer(self, item: int) -> np.ndarray:
        """`title_ids` of an item, computed once."""
        if item not in self._answers:
            self._answers[item] = title_ids(item, self.dataset.titles[item], self.tokenizer)
        return self._answers[item]

    def examples(self, split: str, rows: Sequence[int], items: Sequence[Sequence[int]]):
        """Examples of `rows`, the answers of each being the titles of `items[i]`, in that order."""
        texts = [self.prompt_text(split, row) for row in rows]
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [
            self._example(ids, [self.answer(item) for item in of_row])
            for ids, of_row in zip(encoded, items, strict=True)
        ]

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
