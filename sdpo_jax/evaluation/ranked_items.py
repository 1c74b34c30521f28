"""From log-probs of titles to ranked items: two items may have one title, some are left out."""

from collections.abc import Sequence

import numpy as np

from sdpo_jax.data.prepared import Dataset, Window
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.evaluation import metrics, predictions, title_trie
from sdpo_jax.evaluation.predictions import Prediction


class CatalogueTitles:
    """The I items of a data set and their Y distinct titles.

    Attributes:
      items: [I], item ids in the order of items.jsonl.
      place: item -> its index in `items`.
      title_I: the title of each item, an index into the trie's titles.
      trie: of the titles' tokens.
      longest: an item with the longest title, for which a prompt must leave room.
    """

    def __init__(self, dataset: Dataset, encoder: Encoder):
        self.items = np.array(list(dataset.titles))
        self.place = {item: place for place, item in enumerate(dataset.titles)}
        by_ids: dict[tuple[int, ...], int] = {}
        self.title_I = np.array(
            [
                by_ids.setdefault(tuple(encoder.answer(item).tolist()), len(by_ids))
                for item in dataset.titles
            ]
        )
        self.trie = title_trie.build(list(by_ids))
        self.longest = max(dataset.titles, key=lambda item: len(encoder.answer(item)))

    def titles_of(self, allowed_BI: np.ndarray) -> np.ndarray:
        """[B, Y]: the titles that allowed items have."""
        out_BY = np.zeros((len(allowed_BI), self.trie.path_YA.shape[0]), bool)
        for allowed_I, out_Y in zip(allowed_BI, out_BY, strict=True):
            out_Y[self.title_I[allowed_I]] = True
        return out_BY

    def with_titles(
        self, title_C: np.ndarray, logp_C: np.ndarray, allowed_I: np.ndarray
    ) -> tuple[list[int], list[float]]:
        """Places and log-probs of the allowed items with these titles; a title of -1 is none."""
        places: list[int] = []
        logp: list[float] = []
        for title, value in zip(title_C.tolist(), logp_C.tolist(), strict=True):
            of_title = np.flatnonzero((self.title_I == title) & allowed_I).tolist()
            places += of_title
            logp += [value] * len(of_title)
        return places, logp


class RankedItems(CatalogueTitles):
    """Predictions among the items of a data set.

    A window's own history is not recommended, unless users of the split have items repeatedly. Then
    every item is ranked, as leaving out a history but its target would reveal the target. The same
    items are ranked for every system. Items of one title share the title's rank, the target last.
    """

    def __init__(self, dataset: Dataset, split: str, encoder: Encoder):
        super().__init__(dataset, encoder)
        self.dataset, self._repeats = dataset, dataset.repeats(split)

    def allowed_items(self, window: Window) -> np.ndarray:
        """[I]: what may be recommended in this window."""
        allowed_I = np.ones(len(self.items), bool)
        if not self._repeats:
            allowed_I[[self.place[item] for item in window.history]] = False
        return allowed_I

    def allowed_titles(self, windows: Sequence[Window]) -> np.ndarray:
        """[B, Y]: the titles of those items."""
        return self.titles_of(np.array([self.allowed_items(window) for window in windows]))

    def by_score(self, window: Window, logp_Y: np.ndarray) -> Prediction:
        """A prediction from the log-probs of all titles."""
        among = np.flatnonzero(self.allowed_items(window))
        logp = logp_Y[self.title_I[among]]
        target = int(np.flatnonzero(among == self.place[window.target])[0])
        rank = metrics.target_rank(logp.tolist(), target)
        first = np.argsort(-logp, kind="stable")[: predictions.LISTED]
        return self._prediction(among[first].tolist(), logp[first].tolist(), rank)

    def by_beam(self, window: Window, title_C: np.ndarray, logp_C: np.ndarray) -> Prediction:
        """A prediction from the titles that beam search found, -1 where it found fewer.

        The rank is None where the target is not among them.
        """
        places, logp = self.with_titles(title_C, logp_C, self.allowed_items(window))
        rank, target = None, self.place[window.target]
        if target in places:  # below all items of its title
            rank = int(np.flatnonzero(self.title_I[places] == self.title_I[target])[-1]) + 1
        listed = predictions.LISTED
        return self._prediction(places[:listed], logp[:listed], rank)

    def _prediction(
        self, places: Sequence[int], logp: Sequence[float], rank: int | None
    ) -> Prediction:
        items = self.items[np.array(places, int)].tolist()
        return predictions.ranked(items, logp, self.dataset.titles, rank, catalogue=True)
