"""Model folders of the golden models and a data set, small enough to train on in a test."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sdpo_jax.data.prepared import Dataset, UserSequence, Window

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npz"))
SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;'\"()-&!?/#*_+"


def hf_folder(path: Path, name: str = "llama-new") -> Path:
    """A Hugging Face folder: golden weights and a tokenizer of one token a lower-case letter."""
    path.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    vocab = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    config = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def window(history, target: int, candidates=()) -> Window:
    """A window that shows all that its user did before; `dataset_of` names the user."""
    return Window(0, len(history), tuple(history), tuple(candidates), target)


def dataset_of(
    splits: dict[str, list[Window]], titles: dict[int, str], domain: str = "movie", **meta
) -> Dataset:
    """A data set of windows that are each a user's whole sequence; users are 0, 1, 2, …"""
    users, sequences = itertools.count(), {}
    named = {
        name: [dataclasses.replace(w, user=next(users)) for w in rows]
        for name, rows in splits.items()
    }
    for w in itertools.chain.from_iterable(named.values()):
        sequences[w.user] = UserSequence(w.user, (*w.history, w.target))
    longest = max(len(sequence.items) - 1 for sequence in sequences.values())
    meta = {"protocol": "drawn for a test", "seed": 0, "history": longest} | meta
    return Dataset(domain, titles, named, meta, sequences, {item: {} for item in titles})


def history_dataset(users: int = 24, seed: int = 0) -> Dataset:
    """The titles and tastes of `tiny_dataset`; users with 6 to 11 items and three dislikes.

    Of the first two thirds of the users every window with an item before it is for training, of
    the others the last one for val and test in turn.
    """
    rng = np.random.default_rng(seed)
    tiny = tiny_dataset()
    splits: dict[str, list[Window]] = {"train": [], "val": [], "test": []}
    sequences = {}
    for user in range(users):
        taste = np.arange(48) % 4 == user % 4
        items = rng.permutation(np.flatnonzero(taste))[: rng.integers(6, 12)].tolist()
        places = np.sort(rng.integers(0, len(items), 3)).tolist()
        others = rng.permutation(np.flatnonzero(~taste)).tolist()
        disliked = tuple(zip(places, others[-3:], strict=True))
        sequences[user] = sequence = UserSequence(user, tuple(items), disliked)
        name = "train" if user < users * 2 // 3 else ("val", "test")[user % 2]
        last = len(items) - 1
        for place in range(1, last + 1) if name == "train" else [last]:
            shown = rng.permutation([items[place], *others[:19]]).tolist()
            splits[name].append(sequence.window(place, 10, tuple(shown)))
    meta = {"protocol": "drawn for a test", "seed": 0, "history": 10}
    return Dataset("movie", tiny.titles, splits, meta, sequences, tiny.attributes)


def tiny_dataset() -> Dataset:
    """48 titles; a user's taste is a residue modulo 4, so there is something to learn."""
    rng = np.random.default_rng(0)
    titles = {i: f"{'abcdefghijklmnop'[i // 3]}{i % 3}" for i in range(48)}

    def draw(user):
        liked = [i for i in titles if i % 4 == user % 4]
        *history, target = (int(i) for i in rng.choice(liked, 4, replace=False))
        rest = [i for i in titles if i % 4 != user % 4]
        candidates = [target, *(int(i) for i in rng.choice(rest, 19, replace=False))]
        shown = tuple(candidates[i] for i in rng.permutation(20))
        return window(history, target, shown)

    sizes = {"train": 64, "val": 12, "test": 12}
    splits = {name: [draw(u) for u in range(n)] for name, n in sizes.items()}
    return dataset_of(splits, titles, protocol="tiny")
