"""The cells of the study on histories: the paper's claims where a small model can learn.

Every title of a history is a target of SFT, and both ends are measured: HR@1 among a window's
candidates, and the ranking of the whole catalogue.
"""

import dataclasses

from sdpo_jax.evaluation.systems import NAMES, TRADITIONAL
from sdpo_jax.reproduction import cells
from sdpo_jax.reproduction.cells import BETA, Cell, Evaluations, K, Place, Row

CONFIG = "history"  # file of configs/
EVALUATIONS: Evaluations = {
    ("--decoder=score",): ("score",),
    ("--rank=catalogue", "--decoder=beam"): ("beam-catalogue",),
}
NEGATIVES = (1, 7, 15, 31, 63)  # beside K
MANY = 15  # negatives: as many as the paper's figure 3 goes to
BETAS = (0.1, 0.3, 3.0)  # beside BETA
DRAWN = ("popularity", "hard")  # beside uniform


def of_histories(place: Place) -> Place:
    """The same data set, with the cells in a folder of their own."""
    return dataclasses.replace(place, kind="history")


def trained(
    place: Place, name: str, stage: str, evaluated: tuple[str, ...], needs=(), **keys
) -> Cell:
    validation = place.split.replace("test", "val")
    return cells.trained(
        of_histories(place),
        name,
        stage,
        evaluated,
        needs,
        config=CONFIG,
        evaluations=EVALUATIONS,
        validation_split=validation,
        **keys,
    )


def sft(place: Place) -> Cell:
    return cells.with_adapter(trained(place, "sft", "sft", ("base", "sft")))


def tuned(
    place: Place, negatives: int = K, beta: float = BETA, objective="sdpo", drawn="uniform"
) -> Cell:
    """Preference tuning of the SFT stage with negatives that are `drawn` so."""
    first = sft(place)
    suffix = "" if drawn == "uniform" else f"-{drawn}"
    name = f"{objective}-k{negatives}-beta{beta:g}{suffix}"
    keys = {"num_negatives": negatives, "beta": beta, "objective": objective, "negatives": drawn}
    fewer = place.study.scale.segments * (K + 1) // (negatives + 1)  # for the memory that K takes
    defaults = {"microbatch": max(1, fewer)} if negatives > K else {}
    keys["lora.init_from"] = first.folder / "adapter"
    return trained(place, name, "sdpo", ("sdpo",), (first,), defaults=defaults, **keys)


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


def over_draws(place: Place) -> list[Row]:
    return [
        Row("sdpo", f"S-DPO, {drawn} negatives", tuned(place, drawn=drawn), "sdpo")
        for drawn in ("uniform", *DRAWN)
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


def rows(place: Place) -> list[Row]:
    """All, in the order in which they are run: the networks, which need no GPU, last."""
    of_networks = networks(place)
    tuned = [row for row in systems(place) if row not in of_networks]
    over = (*over_draws(place), *over_betas(place), *over_negatives(place))
    return [*tuned, *over, *of_networks]
