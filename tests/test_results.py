"""Files and summaries of evaluations, among a window's candidates and over the catalogue."""

import json

import pytest
import tiny_run

from sdpo_jax.evaluation import results
from sdpo_jax.runs.best_step import hit_ratios
from sdpo_jax.system.errors import InputError

RANKS = [1, 3, 12, None]  # of the target; None: a beam did not find it
TOPS = [[0, 1], [0, 2], [0, 1], []]


def of_catalogue(ranks=RANKS, tops=TOPS):
    return [
        {
            "row": row,
            "user": row // 2,
            "target": "heat",
            "ranked": [],
            "top": top,
            "rank": rank,
            "valid": True,
            "hit": rank == 1,
        }
        for row, (rank, top) in enumerate(zip(ranks, tops, strict=True))
    ]


def write(folder, stage, step, decoder, rank, split="test", ranks=RANKS):
    records = of_catalogue(ranks, [[0]] * len(ranks))
    summary = results.summarize(decoder, records, rank, (4, {0: 3})) | {
        "stage": stage,
        "step": step,
        "decoder": decoder,
        "split": split,
        "seconds": 1.0,
    }
    return results.write_result(folder, summary, records), summary


def test_a_summary_of_the_catalogue_by_hand():
    """Items 0 to 3 are recommended 3, 2, 1 and 0 times."""
    found = results.summarize("beam", of_catalogue(), "catalogue", (4, {0: 9, 1: 3}))
    assert (found["rank"], found["n"], found["users"], found["items"]) == ("catalogue", 4, 2, 4)
    assert [found[f"hit_ratio_at_{k}"] for k in (1, 5, 10, 20)] == [0.25, 0.5, 0.5, 0.75]
    # NDCG: 1, 1 / log2 4 and, within the first 20, 1 / log2 13.
    assert [found[f"ndcg_at_{k}"] for k in (5, 10)] == [0.375, 0.375]
    assert found["ndcg_at_20"] == pytest.approx((1.5 + 0.27024) / 4, abs=1e-5)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 12) / 4)
    assert found["coverage_at_10"] == 0.75
    assert found["gini_at_10"] == (-3 * 0 - 1 * 1 + 1 * 2 + 3 * 3) / (4 * 6)
    assert found["mean_popularity_at_10"] == (6 + 4.5 + 6) / 3
    for name in results.METRICS["catalogue"]:
        low, high = found[f"{name}_ci95"]
        assert 0 <= low < found[name] < high <= 1


def test_only_the_first_ten_items_count():
    records = of_catalogue([1], [list(range(12))])
    assert results.summarize("score", records, "catalogue", (20, {}))["coverage_at_10"] == 0.5
    assert "coverage_at_10" not in results.summarize("score", records, "catalogue")


@pytest.mark.parametrize(
    ("decoder", "ranking"), [("greedy", False), ("trie", False), ("score", True), ("beam", True)]
)
def test_among_candidates_only_decoders_that_rank_have_ranking_metrics(decoder, ranking):
    found = results.summarize(decoder, of_catalogue(), exposure=(4, {}))
    of_rank = {"hit_ratio_at_5", "hit_ratio_at_10", "ndcg_at_5", "ndcg_at_10", "mrr"}
    of_rank |= {f"{name}_ci95" for name in of_rank}
    assert found.keys() - of_rank == {
        "rank",
        "n",
        "users",
        "hit_ratio_at_1",
        "hit_ratio_at_1_ci95",
        "valid_ratio",
        "valid_ratio_ci95",
    }
    assert (of_rank <= found.keys()) == ranking and found["rank"] == "candidates"
    for name in of_rank & found.keys() - {n for n in of_rank if n.endswith("_ci95")}:
        low, high = found[f"{name}_ci95"]
        assert 0 <= low <= found[name] <= high <= 1


@pytest.mark.parametrize(
    ("stage", "decoder", "rank", "name"),
    [
        ("sft", "greedy", "candidates", "sft-20-greedy"),
        ("sft", "score", "candidates", "sft-20-score"),
        ("sft", "score", "catalogue", "sft-20-score-catalogue"),
        ("base", "beam", "catalogue", "base-20-beam-catalogue"),
        ("sasrec", "score", "candidates", "sasrec-candidates"),
        ("sasrec", "score", "catalogue", "sasrec-catalogue"),
        ("chatrec", "greedy", "candidates", "chatrec-greedy"),
    ],
)
def test_a_file_says_what_was_ranked_and_how(stage, decoder, rank, name, tmp_path):
    _, summary = write(tmp_path, stage, 20, decoder, rank)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json", f"{name}.jsonl"}
    (read,) = results.read_results(tmp_path)
    assert summary.items() <= read.items() and len(results.read_predictions(read)) == 4
    assert results.find(tmp_path, stage, 20, decoder, "test", rank) == summary
    other = next(r for r in results.RANKS if r != rank)
    if stage != "chatrec":
        assert results.find(tmp_path, stage, 20, decoder, "test", other) is None


def test_candidates_and_catalogue_of_several_splits_lie_beside_each_other(tmp_path):
    for rank in results.RANKS:
        for split in ("val", "test"):
            write(tmp_path, "sft", 20, "score", rank, split)
    assert {p.stem for p in tmp_path.iterdir()} == {
        "sft-20-score",
        "sft-20-score-val",
        "sft-20-score-catalogue",
        "sft-20-score-catalogue-val",
        "sft-20-score-disliked",
        "sft-20-score-disliked-val",
    }
    for rank in results.RANKS:
        for split in ("val", "test"):
            found = results.find(tmp_path, "sft", 20, "score", split, rank)
            assert (found["rank"], found["split"]) == (rank, split)


def test_a_file_that_does_not_say_what_was_ranked_is_one_line(tmp_path):
    path, summary = write(tmp_path, "sft", 20, "score", "catalogue")
    for wrong in ({}, {"rank": "items"}):
        path.write_text(json.dumps({k: v for k, v in summary.items() if k != "rank"} | wrong))
        with pytest.raises(InputError, match=r"rank: found .*, expected one of candidates, cat"):
            results.read_results(tmp_path)
    path.write_text(json.dumps(summary | {"gini_at_10": 1.5}))
    with pytest.raises(InputError, match=r"gini_at_10: found 1\.5, expected a number from 0 to 1"):
        results.read_results(tmp_path)


def test_the_line_of_a_ranking_names_its_metrics(tmp_path):
    path, summary = write(tmp_path, "sft", 20, "beam", "catalogue")
    said = results.line(summary, path)
    assert said.startswith("sft step 20, beam over the catalogue, test: HR@10 0.5000 [")
    assert "], NDCG@10 0.3750, MRR 0.3542, coverage@10 0.2500, n 4, 1.0 s, /" in said
    path, summary = write(tmp_path, "sft", 20, "score", "candidates", ranks=[1, 1, 2])
    said = results.line(summary, path)
    assert said.startswith("sft step 20, score, test: HR@1 0.6667 [")
    assert "], valid 1.0000, HR@5 1.0000, NDCG@10 0.8770, MRR 0.8333, n 3, 1.0 s, /" in said


def test_the_best_step_is_chosen_among_the_candidates(tmp_path):
    folder = tmp_path / "eval"
    write(folder, "sft", 2, "score", "candidates", ranks=[1, 2])
    write(folder, "sft", 2, "score", "catalogue", ranks=[3, 4])
    write(folder, "sft", 4, "score", "catalogue", ranks=[1, 1])
    assert hit_ratios(tmp_path, "sft", "score", "test") == {2: 0.5}


def test_items_are_compared_with_the_targets_of_training():
    data = tiny_run.dataset()
    items, counts = results.exposure_of(data)
    assert items == len(data.titles) and sum(counts.values()) == len(data.splits["train"])
    assert counts[0] == sum(window.target == 0 for window in data.splits["train"])
