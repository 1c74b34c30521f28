"""Live against PyTorch: the networks of baselines/ beside twins written there from their papers,
and MoRec's encoder beside transformers' BertModel.

`make parity` runs this. A twin takes one history without padding and gives the scores of all items.
"""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from golden.make_golden import hidden_of, make_encoder
from tiny import GOLDEN
from torch import nn

from sdpo_jax.baselines.bert import read_bert
from sdpo_jax.baselines.caser import Caser
from sdpo_jax.baselines.gru4rec import GRU4Rec
from sdpo_jax.baselines.sasrec import SASRec
from sdpo_jax.data.sequences import MAX_HISTORY as T

ITEMS, D, SHORT = 50, 16, (1, 2, 3, 7)
SEED = 1000
COLUMNS = ("whole rows", "padded rows")
found: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints the largest differences of each network as Markdown."""
    yield
    lines = [f"| network | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, values in found.items():
        lines.append(f"| {name} | {' | '.join(f'{values[c]:.1e}' for c in COLUMNS)} |")
    print("\n\n" + "\n".join(lines))


def told(name: str, column: str, ours, theirs, limit: float = 1e-4) -> None:
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    found.setdefault(name, {})[column] = difference
    assert difference < limit


def tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


@torch.no_grad()
def put(module: nn.Module, **tensors) -> None:
    """Copies arrays into the parameters of these names; all others become zero."""
    for name, parameter in module.named_parameters():
        new = tensors.pop(name, None)
        parameter.copy_(torch.zeros_like(parameter) if new is None else tensor(new))
    assert not tensors


def put_linear(module: nn.Linear, ours) -> None:
    put(module, weight=ours.kernel[...].T, bias=ours.bias[...])


def put_norm(module: nn.LayerNorm, ours) -> None:
    put(module, weight=ours.scale[...], bias=ours.bias[...])


class GRUTwin(nn.Module):
    def __init__(self, ours: GRU4Rec):
        super().__init__()
        self.items = tensor(ours.items.vectors())
        self.gru, self.head = nn.GRU(D, D, batch_first=True), nn.Linear(D, ITEMS)
        cell = ours.gru.cell
        put(
            self.gru,
            weight_ih_l0=cell.dense_i.kernel[...].T,
            bias_ih_l0=cell.dense_i.bias[...],
            weight_hh_l0=cell.dense_h.kernel[...].T,
        )
        put_linear(self.head, ours.head)

    def forward(self, history: list[int]) -> torch.Tensor:
        states, _ = self.gru(self.items[None, history])
        return self.head(states[0, -1])


class CaserTwin(nn.Module):
    """Convolutions over the history as an image of one channel (section 3.2)."""

    def __init__(self, ours: Caser):
        super().__init__()
        self.items, H, V = tensor(ours.items.vectors()), 16, 4
        self.horizontal = nn.ModuleList(nn.Conv2d(1, H, (h, D)) for h in range(1, T + 1))
        self.vertical = nn.Conv2d(1, V, (T, 1))
        self.hidden, self.head = nn.Linear(H * T + V * D, D), nn.Linear(D, ITEMS)
        for conv, filters in zip(self.horizontal, ours.horizontal, strict=True):
            put(
                conv,
                weight=np.moveaxis(np.array(filters.kernel[...]), -1, 0)[:, None],
                bias=filters.bias[...],
            )
        put(
            self.vertical,
            weight=ours.vertical.kernel[...].T[:, None, :, None],
            bias=ours.vertical.bias[...],
        )
        # The paper lays one vertical filter's columns side by side, ours one column's filters.
        kernel = np.array(ours.hidden.kernel[...])
        columns = kernel[H * T :].reshape(D, V, D).swapaxes(0, 1).reshape(V * D, D)
        put(self.hidden, weight=np.r_[kernel[: H * T], columns].T, bias=ours.hidden.bias[...])
        put_linear(self.head, ours.head)

    def forward(self, history: list[int]) -> torch.Tensor:
        image = torch.zeros(1, 1, T, D)
        image[0, 0, T - len(history) :] = self.items[history]
        over_time = [torch.relu(conv(image)).amax((2, 3)) for conv in self.horizontal]
        o = torch.cat([*over_time, self.vertical(image).flatten(1)], 1)
        return self.head(torch.relu(self.hidden(o)))[0]


class SASRecTwin(nn.Module):
    def __init__(self, ours: SASRec):
        super().__init__()
        self.items, self.places = tensor(ours.items.vectors()), tensor(ours.places[...])
        self.blocks = nn.ModuleList(BlockTwin(block) for block in ours.blocks)
        self.norm = nn.LayerNorm(D, eps=1e-8)
        put_norm(self.norm, ours.norm)

    def forward(self, history: list[int]) -> torch.Tensor:
        x = (self.items[history] * D**0.5 + self.places[-len(history) :])[None]
        for block in self.blocks:
            x = block(x)
        return self.items @ self.norm(x[0, -1])


class BlockTwin(nn.Module):
    def __init__(self, ours):
        super().__init__()
        theirs = ours.attention
        self.attention = nn.MultiheadAttention(D, theirs.num_heads, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=1e-8) for _ in range(2))
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, D)
        parts = (theirs.query, theirs.key, theirs.value)
        put(
            self.attention,
            in_proj_weight=np.concatenate([p.kernel[...].reshape(D, D).T for p in parts]),
            in_proj_bias=np.concatenate([p.bias[...].reshape(D) for p in parts]),
        )
        put(
            self.attention.out_proj,
            weight=theirs.out.kernel[...].reshape(D, D).T,
            bias=theirs.out.bias[...],
        )
        for norm, our_norm in zip(self.norms, ours.norms, strict=True):
            put_norm(norm, our_norm)
        put_linear(self.inner, ours.inner)
        put_linear(self.outer, ours.outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=later, need_weights=False)[0]
        return x + self.outer(torch.relu(self.inner(self.norms[1](x))))


def noisy(network: nnx.Module) -> nnx.Module:
    """The same with noise on every parameter, since many start as zeros or ones."""
    graphdef, state = nnx.split(network)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, new))


def histories(lengths) -> tuple[list[list[int]], np.ndarray]:
    """Random histories, and the same padded on their left as the networks take them."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, ITEMS, length).tolist() for length in lengths]
    return rows, np.array([[ITEMS] * (T - len(row)) + row for row in rows], np.int32)


PAIRS = {
    "gru4rec": (GRU4Rec, GRUTwin, {}),
    "caser": (Caser, CaserTwin, {}),
    "sasrec": (SASRec, SASRecTwin, {}),
    "sasrec, 4 heads": (SASRec, SASRecTwin, {"heads": 4}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_scores_of_a_random_network(name):
    network, twin, keys = PAIRS[name]
    ours = noisy(network(ITEMS, D, **keys, rngs=nnx.Rngs(0)))
    theirs = twin(ours).eval()
    for column, lengths in zip(COLUMNS, ([T] * 8, SHORT), strict=True):
        rows, padded = histories(lengths)
        with torch.no_grad():
            expected = np.stack([theirs(row).numpy() for row in rows])
        told(name, column, ours(padded), expected)
        assert expected.std(0).max() > 0.1, "the history changes nothing"


def test_hidden_states_of_a_new_random_encoder(tmp_path):
    theirs = make_encoder(SEED)
    theirs.save_pretrained(tmp_path)
    ours, theirs = read_bert(tmp_path), hidden_of(theirs, SEED)
    tokens, length = theirs["tokens"], theirs["lengths"][:, None]
    there = np.arange(tokens.shape[1]) < length
    hidden = np.asarray(ours(np.where(there, tokens, ours.config.V)))
    whole = there & (length == tokens.shape[1])
    for column, rows in zip(COLUMNS, (whole, there & ~whole), strict=True):
        told("morec's encoder", column, hidden[rows], theirs["hidden"][rows])


def test_the_golden_encoder_is_what_transformers_computes_today():
    golden = np.load(GOLDEN / "bert" / "hidden.npz")
    for key, array in hidden_of(make_encoder(0), 0).items():
        np.testing.assert_allclose(golden[key], array, atol=1e-5, err_msg=key)
