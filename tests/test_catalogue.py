"""Ranking the whole catalogue: the exact pass and the beam against each title scored alone."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, collate_padded, tiny_model

from sdpo_jax.data.tokens import Example
from sdpo_jax.evaluation import beam, catalogue, decode, title_trie

END = 2


def random_titles(rng, count: int, letters: int = 6, A: int = 5) -> list[list[int]]:
    """Distinct titles of few different tokens, so that many have a common beginning."""
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[(*map(int, rng.integers(3, 3 + letters, rng.integers(1, A))), END)] = None
    return list(map(list, found))


def case(count: int = 60, B: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    titles = random_titles(rng, count)
    prompts = [rng.integers(3, TINY.V, n).astype(np.int32) for n in rng.integers(4, 9, B)]
    answers = [np.array(t, np.int32) for t in titles]
    examples = [Example.single(prompt, answers) for prompt in prompts]
    return titles, examples


def ranked(
    model,
    titles,
    examples,
    width: int = 0,
    allowed=None,
    block: int = 8,
    size: int = 16,
    **settings,
):
    """Exact log-probs of all titles, or a beam's titles and log-probs; `settings`: of the beam."""
    trie = title_trie.build(titles)
    found = catalogue.to_devices(trie, title_trie.pieces(trie, block, size), jax.devices()[0])
    batch = collate_padded([Example.single(e.prompt, e.answers_MC[0][:1]) for e in examples])
    prefix = decode.prefill(model.decoder, batch)
    if not width:
        return np.asarray(jax.jit(catalogue.score_catalogue)(model.decoder, prefix, found))
    if allowed is None:
        allowed = np.ones((len(examples), len(titles)), bool)
    search = jax.jit(lambda *args: beam.beam_search(*args, width, **settings))  # traced anew
    out = search(model.decoder, prefix, found, allowed)
    return [np.asarray(x) for x in out]


@pytest.fixture(autouse=True)
def small_head_blocks(monkeypatch):
    monkeypatch.setattr(catalogue, "HEAD_BLOCK", 8)


@pytest.fixture(scope="module")
def alone():
    """Titles, examples, and each title's log-prob as an answer of its own."""
    titles, examples = case()
    model, batch = tiny_model(), collate_padded(examples)
    prefix = decode.prefill(model.decoder, batch)
    return titles, examples, np.asarray(decode.score(model.decoder, prefix, batch))[:, 0]


def test_a_trie_holds_every_title_once_and_common_beginnings_once():
    titles, _ = case()
    trie = title_trie.build(titles)
    assert trie.size == 1 + len({tuple(t[:n]) for t in titles for n in range(1, len(t) + 1)})
    for i, title in enumerate(titles):
        path = trie.path_YA[i][: len(title)]
        assert list(trie.token_X[path]) == title
        assert trie.leaf_X[path[-1]] == i
        assert list(trie.parent_X[path]) == [0, *path[:-1]]
        forced = [trie.end_X[x] == trie.end_X[x + 1] and trie.leaf_X[x + 1] < 0 for x in path[:-1]]
        for place, node in enumerate(path[:-1]):
            assert trie.forced_X[node] == [*forced, False][place:].index(False)
    for node in range(trie.size):
        of = trie.children[trie.first_X[node] : trie.first_X[node + 1]]
        assert (trie.parent_X[of] == node).all()
        inside = np.arange(node + 1, trie.end_X[node])
        assert set(of) <= set(inside) or not len(of)


def test_equal_titles_are_refused():
    with pytest.raises(ValueError, match="twice"):
        title_trie.build([[3, END], [3, END]])


def test_a_node_of_a_piece_sees_its_beginnings_and_itself():
    titles, _ = case(count=200)
    trie = title_trie.build(titles)
    pieces = title_trie.pieces(trie, block=8, size=32)
    assert len(pieces.node_ZS) > 1
    nodes = pieces.node_ZS[pieces.node_ZS > 0]
    assert sorted(nodes) == [x for x in range(1, trie.size) if trie.leaf_X[x] < 0]
    for node_S, seen_WT, mask_WQT in zip(
        pieces.node_ZS, pieces.seen_ZWT, pieces.mask_ZWQT, strict=True
    ):
        for n, (seen_T, mask_QT) in enumerate(zip(seen_WT, mask_WQT, strict=True)):
            for q, mask_T in enumerate(mask_QT):
                node, expected = int(node_S[n * 8 + q]), set()
                while node:
                    expected.add(node)
                    node = int(trie.parent_X[node])
                found = node_S[seen_T[mask_T]].tolist()
                assert len(found) == len(set(found))
                assert set(found) == expected


@pytest.mark.parametrize(("block", "size"), [(8, 16), (64, 64)])
def test_the_exact_pass_gives_each_title_the_log_prob_it_has_alone(alone, block, size):
    titles, examples, expected_BY = alone
    found_BY = ranked(tiny_model(), titles, examples, block=block, size=size)
    np.testing.assert_allclose(found_BY, expected_BY, atol=1e-4)


def test_a_beam_as_wide_as_the_catalogue_is_exact(alone):
    titles, examples, expected_BY = alone
    title_BC, logp_BC = ranked(tiny_model(), titles, examples, width=len(titles))
    np.testing.assert_allclose(np.take_along_axis(expected_BY, title_BC, 1), logp_BC, atol=1e-4)
    assert all(sorted(row) == list(range(len(titles))) for row in title_BC)
    assert (np.diff(logp_BC, axis=1) <= 0).all()


def test_a_narrow_beam_gives_titles_with_the_log_probs_they_have(alone):
    titles, examples, expected_BY = alone
    title_BC, logp_BC = ranked(tiny_model(), titles, examples, width=5)
    assert (title_BC >= 0).all()
    np.testing.assert_allclose(np.take_along_axis(expected_BY, title_BC, 1), logp_BC, atol=1e-4)


def token_by_token(titles, logp_of, width: int) -> list[int]:
    """Beam search as the textbook has it; `logp_of`: of the beginnings of titles."""
    ends, found = {tuple(t): i for i, t in enumerate(titles)}, [()]
    while any(part not in ends for part in found):
        longer = [b for b in logp_of if b[:-1] in set(found) - set(ends)]
        longer += [part for part in found if part in ends]
        found = sorted(longer, key=lambda part: -logp_of[part])[:width]
    return [ends[part] for part in found]


def with_long_ends(rng, titles: list[list[int]]) -> list[list[int]]:
    """The same titles with up to 9 tokens more, which no other title has there."""
    return [[*t[:-1], *map(int, rng.integers(3, 60, rng.integers(0, 10))), END] for t in titles]


@pytest.fixture(scope="module")
def long_ended():
    """Titles with long ends, examples, and for each the log-prob of every beginning of a title."""
    titles, examples = case(count=30, seed=3)
    titles = with_long_ends(np.random.default_rng(3), titles)
    beginnings = sorted({tuple(t[:n]) for t in titles for n in range(1, len(t) + 1)})
    answers = [np.array(b, np.int32) for b in beginnings]
    model = tiny_model()
    batch = collate_padded([Example.single(e.prompt, answers) for e in examples])
    logp_BX = decode.score(model.decoder, decode.prefill(model.decoder, batch), batch)[:, 0]
    return titles, examples, [dict(zip(beginnings, x, strict=True)) for x in np.asarray(logp_BX)]


@pytest.mark.parametrize("width", [1, 5, 40])
def test_the_beams_are_those_of_a_search_token_by_token(long_ended, width):
    titles, examples, logp_of = long_ended
    title_BC, _ = ranked(tiny_model(), titles, examples, width=width)
    for title_C, logp in zip(title_BC, logp_of, strict=True):
        expected = token_by_token(titles, logp, width)
        assert title_C[: len(expected)].tolist() == expected
        assert (title_C[len(expected) :] == -1).all()


@pytest.fixture
def passes(monkeypatch) -> Callable[[], int]:
    """How many passes of the model the searches since the last call took."""
    counted, forward = [], beam._forward

    def counting(*args):
        jax.debug.callback(lambda: counted.append(1))
        return forward(*args)

    def number() -> int:
        jax.effects_barrier()
        found = len(counted)
        counted.clear()
        return found

    monkeypatch.setattr(beam, "_forward", counting)
    return number


def test_tokens_without_a_choice_are_computed_together(passes):
    _, examples = case()
    titles = [[token] * 7 + [END] for token in (3, 4, 5)]  # 21 inner nodes
    title_BC, _ = ranked(tiny_model(), titles, examples, width=8)
    assert passes() == 3
    assert all(sorted(row) == [-1] * 5 + [0, 1, 2] for row in title_BC)


def test_a_beam_of_one_has_room_for_the_longest_title(passes):
    _, examples = case()
    titles = [[*range(3, 10), END], [3, END], [*range(20, 24), END]]
    expected_BY = ranked(tiny_model(), titles, examples)
    found = ranked(tiny_model(), titles, examples, width=1, allowed=np.eye(3, dtype=bool))
    np.testing.assert_array_equal(found[0][:, 0], [0, 1, 2])
    np.testing.assert_allclose(found[1][:, 0], np.diag(expected_BY), atol=1e-4)
    assert passes() == 7


def test_more_beams_than_nodes_of_a_pass_are_computed_in_parts(alone, passes, monkeypatch):
    titles, examples, _ = alone
    expected = ranked(tiny_model(), titles, examples, width=12)
    whole = passes()
    monkeypatch.setattr(beam, "MOST_NODES", 5)
    found = ranked(tiny_model(), titles, examples, width=12)
    assert passes() > whole
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("needed", [1, 3])
def test_a_beam_that_ends_early_has_the_same_best_titles(alone, needed, passes):
    short, examples, _ = alone
    titles = [*short[:10], *([token] * 30 + [END] for token in range(20, 28))]
    expected = ranked(tiny_model(), titles, examples, width=18)
    whole = passes()
    found = ranked(tiny_model(), titles, examples, width=18, needed=needed)
    assert passes() < whole
    for one, other in zip(found, expected, strict=True):  # bit for bit
        np.testing.assert_array_equal(one[:, :needed], other[:, :needed])


def test_a_beam_finds_only_what_is_allowed_however_little_it_is(alone):
    titles, examples, expected_BY = alone
    rng = np.random.default_rng(5)
    allowed_BY = rng.random(expected_BY.shape) < 0.3
    allowed_BY[1] = False
    allowed_BY[1, 7] = True
    title_BC, _ = ranked(tiny_model(), titles, examples, width=len(titles), allowed=allowed_BY)
    for title_C, allowed_Y, expected_Y in zip(title_BC, allowed_BY, expected_BY, strict=True):
        among = np.flatnonzero(allowed_Y)
        best = among[np.argsort(-expected_Y[among], kind="stable")]
        assert title_C[: len(best)].tolist() == best.tolist()
        assert (title_C[len(best) :] == -1).all()


def test_an_attention_window_is_kept():
    config = dataclasses.replace(TINY, window=3)
    model = tiny_model(config)
    titles, examples = case(count=20)
    titles = with_long_ends(np.random.default_rng(1), titles)
    answers = [np.array(t, np.int32) for t in titles]
    batch = collate_padded([Example.single(e.prompt, answers) for e in examples])
    expected_BY = decode.score(model.decoder, decode.prefill(model.decoder, batch), batch)[:, 0]
    np.testing.assert_allclose(ranked(model, titles, examples), expected_BY, atol=1e-4)
    title_BC, logp_BC = ranked(model, titles, examples, width=20)
    np.testing.assert_allclose(jnp.take_along_axis(expected_BY, title_BC, 1), logp_BC, atol=1e-4)
