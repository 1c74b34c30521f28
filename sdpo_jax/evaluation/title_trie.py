"""The titles of a catalogue as a trie of tokens: common beginnings are stored once.

Nodes are numbered in preorder: the descendants of a node follow it without a gap. Letters beside
those of `sdpo_jax.system.sharding`: Y distinct titles, X nodes (0 is the root), Z pieces of S
nodes; A is the length of the longest title. A piece's attention runs in W rows, each of Q queries
over T = A + Q keys.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TitleTrie:
    """Every node but the root is a token after its parent; a leaf ends a title.

    Attributes:
      token_X: int32, of the root 0.
      parent_X: int32, of the root 0.
      depth_X: int32, tokens from the root: the root has 0.
      leaf_X: int32, the title that ends here, -1 at inner nodes.
      end_X: int32, the first node after the descendants of this one.
      forced_X: int32, how many inner nodes follow this one without a choice.
      first_X, children: CSR: the children of node x are `children[first_X[x] : first_X[x + 1]]`.
      path_YA: int32, the nodes of each title, its leaf last, 0 where it has fewer.
    """

    token_X: np.ndarray
    parent_X: np.ndarray
    depth_X: np.ndarray
    leaf_X: np.ndarray
    end_X: np.ndarray
    forced_X: np.ndarray
    first_X: np.ndarray
    children: np.ndarray
    path_YA: np.ndarray

    @property
    def size(self) -> int:
        return len(self.token_X)

    @property
    def A(self) -> int:
        return self.path_YA.shape[1]


def build(titles: Sequence[Sequence[int]]) -> TitleTrie:
    """The trie of token ids, each title ending in a token that occurs nowhere else.

    Raises ValueError for two equal titles.
    """
    order = sorted(range(len(titles)), key=lambda i: tuple(titles[i]))
    token, parent, depth, leaf = [0], [0], [0], [-1]
    path_YA = np.zeros((len(titles), max(map(len, titles))), np.int32)
    open_nodes: list[int] = []  # of the title before, by depth
    before: Sequence[int] = ()
    for title in order:
        ids = titles[title]
        if tuple(ids) == tuple(before):
            raise ValueError(f"title {title} occurs twice")
        common = 0
        while common < min(len(ids), len(before)) and ids[common] == before[common]:
            common += 1
        del open_nodes[common:]
        for place in range(common, len(ids)):
            token.append(int(ids[place]))
            parent.append(open_nodes[-1] if open_nodes else 0)
            depth.append(place + 1)
            leaf.append(-1)
            open_nodes.append(len(token) - 1)
        leaf[-1] = title
        path_YA[title, : len(ids)] = open_nodes
        before = ids
    parent_X, depth_X = np.array(parent, np.int32), np.array(depth, np.int32)
    children = 1 + np.argsort(parent_X[1:], kind="stable")
    first_X = np.concatenate([[0], np.cumsum(np.bincount(parent_X[1:], minlength=len(token)))])
    leaf_X = np.array(leaf, np.int32)
    return TitleTrie(
        np.array(token, np.int32),
        parent_X,
        depth_X,
        leaf_X,
        _ends(parent_X),
        _forced(leaf_X, np.diff(first_X)),
        first_X.astype(np.int32),
        children.astype(np.int32),
        path_YA,
    )


def _ends(parent_X: np.ndarray) -> np.ndarray:
    sizes = np.ones(len(parent_X), np.int32)
    for node in range(len(parent_X) - 1, 0, -1):
        sizes[parent_X[node]] += sizes[node]
    return np.arange(len(parent_X), dtype=np.int32) + sizes


def _forced(leaf_X: np.ndarray, children_X: np.ndarray) -> np.ndarray:
    counts = np.zeros(len(leaf_X), np.int32)
    for node in range(len(leaf_X) - 2, -1, -1):  # an only child comes next
        if children_X[node] == 1 and leaf_X[node + 1] < 0:
            counts[node] = counts[node + 1] + 1
    return counts


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The trie's inner nodes in Z pieces of S nodes, each computed in one pass.

    A piece consists of whole branches of the root, so it needs nothing of another piece. Within
    it attention runs in blocks of Q nodes. In preorder, the ancestors of a block's nodes lie in the
    block or are ancestors of its first node.

    Attributes:
      node_ZS: int32, the nodes, 0 where a piece has fewer.
      seen_ZWT: int32, for each of W = S/Q blocks the places in the piece of T = A + Q keys.
      mask_ZWQT: bool, which of them a node sees: its ancestors and itself.
    """

    node_ZS: np.ndarray
    seen_ZWT: np.ndarray
    mask_ZWQT: np.ndarray


def pieces(trie: TitleTrie, block: int = 128, size: int = 2048) -> Pieces:
    """`size`: nodes of a piece at least; more where one branch of the root has more."""
    inner = trie.leaf_X < 0
    branches = [
        np.flatnonzero(inner[a:b]) + a
        for a, b in ((int(x), int(trie.end_X[x])) for x in trie.children[: trie.first_X[1]])
    ]
    groups: list[list[np.ndarray]] = []
    room = max([size, *map(len, branches)])
    for branch in branches:
        if not groups or sum(map(len, groups[-1])) + len(branch) > room:
            groups.append([])
        groups[-1].append(branch)
    nodes = [np.concatenate(group) for group in groups]
    S = -(-max(map(len, nodes)) // block) * block
    node_ZS = np.zeros((len(nodes), S), np.int32)
    seen_ZWT = np.zeros((len(nodes), S // block, trie.A + block), np.int32)
    mask_ZWQT = np.zeros((len(nodes), S // block, block, trie.A + block), bool)
    for z, of_piece in enumerate(nodes):
        node_ZS[z, : len(of_piece)] = of_piece
        for n in range(S // block):
            part = of_piece[n * block : (n + 1) * block]
            if len(part):
                seen_ZWT[z, n], mask_ZWQT[z, n] = _seen(trie, of_piece, part, n * block, block)
    return Pieces(node_ZS, seen_ZWT, mask_ZWQT)


def _seen(trie: TitleTrie, of_piece: np.ndarray, part: np.ndarray, start: int, block: int):
    """Keys of one block, and the mask of its queries."""
    ancestors: list[int] = []
    node = int(trie.parent_X[part[0]])
    while node:
        ancestors.append(node)
        node = int(trie.parent_X[node])
    keys = np.zeros(trie.A + block, np.int32)
    places = np.searchsorted(of_piece, ancestors)
    keys[: len(ancestors)] = places
    keys[trie.A : trie.A + len(part)] = start + np.arange(len(part))
    there = np.zeros(trie.A + block, bool)
    there[: len(ancestors)] = there[trie.A : trie.A + len(part)] = True
    # A node descends from another that comes before it and whose descendants end after it.
    key_nodes = np.where(there, of_piece[keys], trie.size)
    last = np.where(there, trie.end_X[np.where(there, key_nodes, 0)], 0)
    mask = np.zeros((block, trie.A + block), bool)
    mask[: len(part)] = (key_nodes <= part[:, None]) & (part[:, None] < last)
    return keys, mask
