"""The cells of the study on histories: the paper's claims where a small model can learn.

Every title of a history is a target of SFT, and both ends are measured: HR@1 among a window's
candidates, and the ranking of the whole catalogue.
"""

import dataclasses

from sdpo_jax.data.paper import SIZES
from sdpo_jax.evaluation.systems import NAMES, TRADITIONAL
from sdpo_jax.reproduction import cells
from sdpo_jax.reproduction.cells import BETA, Cell, Evaluations, K, Place, Row

CONFIG = "history"  # file of configs/
EVALUATIONS: Evaluations = {
    ("--decoder=score",): ("score",),
    ("--rank=catalogue", "--decoder=beam"): ("beam-catalogue",),
}
ON_CANDIDATES: Evaluations = {("--decoder=score",): ("score",)}
NEGATIVES = (1, 7, 15, 31, 63)  # beside K
MANY = 15  # negatives: as many as the paper's figure 3 goes to
BETAS = (0.1, 0.3, 3.0)  # beside BETA
RATES = (1e-5, 3e-5)  # learning rates of S-DPO, beside the config's
DRAWN = ("popularity", "hard")  # beside uniform
SEEDS = (1, 2)  # beside the config's
LENGTHS = (3, 30)  # titles per history, beside the config's
RANKS = (4, 64)  # of the adapter, beside the config's
RANK, SCALE = 16, 4  # the config's, and its alpha / rank
FULL_RATE = 2e-4  # learning rate for all weights: docs/notes/2026-11-26-histories.md


def of_histories(place: Place) -> Place:
    """The same data set, with the cells in a folder of their own."""
    return dataclasses.replace(place, kind="history")


def trained(
    place: Place, name: str, stage: str, evaluated: tuple[str, ...], needs=(), **keys
) -> Cell:
    options: dict = {"config": CONFIG, "evaluations": EVALUATIONS} | keys
    validation = place.split.replace("test", "val")
    place = of_histories(place)
    return cells.trained(
        place, name, stage, evaluated, needs, validation_split=validation, **options
    )


def sft(place: Place, seed: int = 0) -> Cell:
    if not seed:
        return cells.with_adapter(trained(place, "sft", "sft", ("base", "sft")))
    return cells.with_adapter(trained(place, f"sft-seed{seed}", "sft", ("sft",), seed=seed))


def other_sft(place: Place, name: str, **keys: object) -> Cell:
    """SFT with other keys, from which nothing starts."""
    return trained(place, f"sft-{name}", "sft", ("sft",), **keys)


def tuned(
    place: Place,
    negatives: int = K,
    beta: float = BETA,
    objective="sdpo",
    drawn="uniform",
    suffix="",
    **keys: object,
) -> Cell:
    """Preference tuning of the SFT stage with negatives that are `drawn` so.

    `suffix`: of the cell's name, for further `keys`. One of them, `seed`, is of the SFT stage too.
    """
    seed = keys.get("seed", 0)
    assert isinstance(seed, int)
    first = sft(place, seed)
    suffix = ("" if drawn == "uniform" else f"-{drawn}") + suffix
    name = f"{objective}-k{negatives}-beta{beta:g}{suffix}"
    keys |= {"num_negatives": negatives, "beta": beta, "objective": objective, "negatives": drawn}
    fewer = place.study.scale.segments * (K + 1) // (negatives + 1)  # for the memory that K takes
    defaults = {"microbatch": max(1, fewer)} if negatives > K else {}
    keys["lora.init_from"] = first.folder / "adapter"
    return trained(place, name, "sdpo", ("sdpo",), (first,), defaults=defaults, **keys)


def on_paper_prompts(place: Place, stage: str, from_histories: bool) -> Cell:
    """A stage on the paper's prompts, of whose SFT the adapter is fresh or that of the histories.

    S-DPO starts from the SFT on the same prompts.
    """
    name = "paper-prompts" + "-from-histories" * from_histories
    keys: dict[str, object] = {"lora.rank": RANK, "lora.alpha": float(SCALE * RANK)}
    needs = (sft(place),) if from_histories else ()
    if stage == "sdpo":
        name += "-sdpo"
        keys |= {"num_negatives": K, "beta": BETA}
        needs = (on_paper_prompts(place, "sft", from_histories),)
    if needs:
        keys["lora.init_from"] = needs[0].folder / "adapter"
    options = {"config": place.dataset, "evaluations": ON_CANDIDATES}
    cell = trained(place, name, stage, (stage,), needs, **options, **keys)
    return cells.with_adapter(cell) if stage == "sft" else cell


def network(place: Place, name: str) -> Cell:
    return cells.network(of_histories(place), name, candidates_only=False)


def over_negatives(place: Place) -> list[Row]:
    return [
        Row("sdpo", f"S-DPO, K = {n}", tuned(place, negatives=n), "sdpo", at=n)
        for n in sorted((*NEGATIVES, K))
    ]


def over_betas(place: Place) -> list[Row]:
    return [
        Row("sdpo", f"S-DPO, beta = {beta:g}", tuned(place, beta=beta), "sdpo", at=beta)
        for beta in sorted((*BETAS, BETA))
    ]


def over_rates(place: Place) -> list[Row]:
    """Learning rates, and the settings of the figures published for Amazon's windows."""

    def at(rate: float, label: str = "", beta: float = BETA) -> Row:
        key: dict = {"sdpo.learning_rate": rate}
        cell = tuned(place, beta=beta, suffix=f"-rate{rate:g}", **key)
        return Row("sdpo", f"S-DPO, learning rate {rate:g}{label}", cell, "sdpo")

    return [*map(at, RATES), at(RATES[0], ", beta = 0.1", beta=0.1)]


def over_draws(place: Place) -> list[Row]:
    return [
        Row("sdpo", f"S-DPO, {drawn} negatives", tuned(place, drawn=drawn), "sdpo")
        for drawn in ("uniform", *DRAWN)
    ]


def over_redraws(place: Place) -> list[Row]:
    """Two epochs, with the same negatives or with others in the second."""
    twice: dict = {"sdpo.epochs": 2, "sdpo.max_steps": 0}
    same = tuned(place, suffix="-twice", **twice)
    other = tuned(place, suffix="-redrawn", redraw=True, **twice)
    return [
        Row("sdpo", "S-DPO, 2 epochs", same, "sdpo"),
        Row("sdpo", "S-DPO, 2 epochs, redrawn negatives", other, "sdpo"),
    ]


def over_seeds(place: Place) -> list[Row]:
    """SFT and the S-DPO that starts from it, with other seeds."""
    return [
        row
        for seed in SEEDS
        for row in (
            Row("sft", f"SFT, seed {seed}", sft(place, seed), "sft"),
            Row(
                "sdpo",
                f"S-DPO, seed {seed}",
                tuned(place, suffix=f"-seed{seed}", seed=seed),
                "sdpo",
            ),
        )
    ]


def over_sft(place: Place) -> list[Row]:
    """What else SFT depends on: epochs, length of the histories, rank of the adapter."""
    changed: dict[str, tuple[str, dict[str, object]]] = {
        "1 epoch": ("epochs1", {"sft.epochs": 1, "sft.max_steps": 0}),
        "2 epochs": ("epochs2", {"sft.epochs": 2, "sft.max_steps": 0}),
        **{f"{n} titles": (f"history{n}", {"history": n}) for n in LENGTHS},
        **{
            f"rank {n}": (f"rank{n}", {"lora.rank": n, "lora.alpha": float(SCALE * n)})
            for n in RANKS
        },
        "all weights": ("full", {"tune": "full", "sft.learning_rate": FULL_RATE}),
    }
    return [
        Row("sft", f"SFT, {label}", other_sft(place, name, **keys), "sft")
        for label, (name, keys) in changed.items()
    ]


def over_prompts(place: Place) -> list[Row]:
    """The paper's prompts, where the paper has the data set: learnt from nothing, or after SFT."""
    if place.dataset not in SIZES:
        return []
    return [
        Row(
            stage,
            f"{label}, the paper's prompts{after}",
            on_paper_prompts(place, stage, begins),
            stage,
        )
        for after, begins in (("", False), (" after histories", True))
        for stage, label in (("sft", "SFT"), ("sdpo", "S-DPO"))
    ]


def networks(place: Place) -> list[Row]:
    return [Row(name, NAMES[name], network(place, name), name) for name in TRADITIONAL]


def systems(place: Place) -> list[Row]:
    """The paper's order: base, SFT, DPO, S-DPO; after the networks."""
    pairs = tuned(place, objective="dpo_pairwise")
    return [
        *networks(place),
        Row("base", "base model, zero-shot", sft(place), "base"),
        Row("sft", "SFT", sft(place), "sft"),
        Row("sdpo", f"S-DPO, K = {K}", tuned(place), "sdpo"),
        Row("dpo", "DPO", tuned(place, negatives=1), "sdpo"),
        Row("sdpo", f"S-DPO, K = {MANY}", tuned(place, negatives=MANY), "sdpo"),
        Row("pairs", f"DPO, {K} pairs", pairs, "sdpo"),
    ]


def groups(place: Place) -> dict[str, list[Row]]:
    """Title -> rows of each table, in the order in which they are run."""
    found = {
        "Systems": systems(place),
        "Number of negatives": over_negatives(place),
        "Beta": over_betas(place),
        "Learning rate of S-DPO": over_rates(place),
        "Kinds of negatives": over_draws(place),
    }
    if not place.study.scale.further:
        return found
    return found | {
        "Other seeds": over_seeds(place),
        "Redrawn negatives": over_redraws(place),
        "Settings of SFT": over_sft(place),
        "The paper's prompts": over_prompts(place),
    }


def rows(place: Place) -> list[Row]:
    """All, in the order in which they are run: the networks, which need no GPU, last."""
    of_networks = networks(place)
    every = [row for group in groups(place).values() for row in group if row not in of_networks]
    return [*every, *of_networks]
