"""The cells of the paper's tables: a cell is one workdir and the shell commands that fill it.

A table is a list of rows; a row names the cell of its figures. Tables share cells: all preference
tuning on a data set starts from one SFT stage.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sdpo_jax.evaluation.systems import NAMES, TRADITIONAL

DATASETS = {
    "movielens": "MovieLens",
    "lastfm": "LastFM",
    "goodreads": "Goodreads",
    "amazon": "Amazon Industrial",
}
DOMAIN = {"movielens": "movie", "lastfm": "music", "goodreads": "book", "amazon": "product"}
# Data sets whose `test` has the windows of several users' whole histories; others have test_all.
WHOLE = ("lastfm", "amazon")
BACKBONES = {"llama1": "LLaMA1-7B", "mistral": "Mistral-7B", "pythia": "Pythia-2.8B"}
K, BETA = 3, 1.0  # [paper]
# Config keys that define a row's training, so that --options may not set them.
KEYS = (
    "dataset",
    "model",
    "stages",
    "num_negatives",
    "beta",
    "objective",
    "negatives",
    "validation_split",
    "lora.init_from",
    "prompt_file",
    "item_vectors",
)
DECODERS = ("greedy", "score")  # the paper's metric, and the ranking of all candidates
# Options of sdpo_jax.evaluate -> the endings of its files.
Evaluations = Mapping[tuple[str, ...], tuple[str, ...]]
OF_CANDIDATES: Evaluations = {(f"--decoder={','.join(DECODERS)}",): DECODERS}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run."""

    about: str
    variant: str  # of configs/<data set>.py
    split: str  # where the data set has it, else `test`
    limit: int  # windows of it; 0: all
    history_limit: int  # the same for prompts of histories
    segments: int = 8  # of histories at once: the microbatch of configs/history.py
    negatives: tuple[int, ...] = (1, 3, 5, 8, 10, 15)
    betas: tuple[float, ...] = (0.1, 0.5, 1.0, 3.0, 5.0)
    network: tuple[str, ...] = ()  # options of sdpo_jax.baselines
    further: bool = True  # histories: also other seeds, whole epochs, settings of SFT


SCALES = {
    "smoke": Scale(
        "A few steps, to test the setup: these figures say nothing about any system.",
        ":smoke",
        "test_all",
        16,
        16,
        segments=2,
        negatives=(1, 3, 5),
        betas=(0.1, 1.0),
        network=("--epochs=1", "--l2=1e-4"),
        further=False,
    ),
    "small": Scale(
        "Not the paper's setting: a small language model trained on a few hundred windows per "
        "stage; the networks train on all. Prompts of the default model are in its chat format, "
        "except TALLRec's.",
        ":small",
        "test_all",
        200,
        500,
        segments=2,
        network=("--l2=1e-6",),
        further=False,
    ),
    "medium": Scale(
        "Not the paper's setting: a small model that sees each training window once per stage.",
        ":medium",
        "test_all",
        1000,
        2000,
    ),
    "paper": Scale("The paper's setting.", "", "test", 0, 0),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A command (a module and its options), and the files it writes into its cell's folder."""

    command: tuple[str, ...]
    leaves: tuple[str, ...]  # glob patterns, as names contain checkpoint steps


@dataclasses.dataclass(frozen=True)
class Cell:
    """A folder, the steps that fill it, and the cells that it needs.

    `shared`: of how many steps others need the files; None: of all.
    """

    folder: Path
    steps: tuple[Step, ...]
    needs: tuple["Cell", ...] = ()
    shared: int | None = None

    def left(self) -> list[Step]:
        """The steps still to be run: those with files missing."""
        return [
            step
            for step in self.steps
            if not all(any(self.folder.glob(pattern)) for pattern in step.leaves)
        ]

    def usable(self, left: Sequence[Step]) -> bool:
        """Whether the cells that need it can start while these steps are left."""
        return not set(left) & set(self.steps[: self.shared])


@dataclasses.dataclass(frozen=True)
class Study:
    """The scale, models and data of a reproduction."""

    root: Path
    scale: Scale
    model: str = ""  # a converted model; "": the small one, converted into root/model
    options: tuple[str, ...] = ()  # for every sdpo_jax.train
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # data set -> raw files
    backbones: Mapping[str, str] = dataclasses.field(default_factory=dict)  # -> converted model
    endpoint: str = ""
    chat_model: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
    """One data set and one language model; `backbone` is "" for the study's own."""

    study: Study
    dataset: str
    backbone: str = ""
    kind: str = ""  # folder of the cells of another kind of prompt

    @property
    def folder(self) -> Path:
        return self.study.root / self.dataset / self.backbone / self.kind

    @property
    def data(self) -> Path:
        return self.study.root / self.dataset / "data"

    @property
    def model(self) -> str:
        if self.backbone:
            return self.study.backbones[self.backbone]
        return self.study.model or str(self.study.root / "model")

    @property
    def split(self) -> str:
        return "test" if self.dataset in WHOLE else self.study.scale.split

    @property
    def of_the_paper(self) -> bool:
        """Whether the paper's figures are of these data: MovieLens may be of another size."""
        return not (self.dataset == "movielens" and self.study.sources.get("movielens"))

    @property
    def windows(self) -> tuple[str, ...]:
        """Options of the evaluating commands."""
        scale = self.study.scale
        limit = scale.history_limit if self.kind else scale.limit
        if self.dataset == "amazon" and limit > 1000:
            limit = 0  # all, as the published figures are of all
        return (f"--split={self.split}", *([f"--limit={limit}"] if limit else []))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: the cell and stage of its figures, or why it has none."""

    system: str
    label: str
    cell: Cell | None = None
    stage: str = ""
    missing: str = ""
    at: float = 0.0  # position on the axis of a figure

    @property
    def decoder(self) -> str:
        """Of the paper's metric: a model's generation, or the candidate a network ranks first."""
        return "score" if self.stage in TRADITIONAL else "greedy"


def prepared(place: Place) -> Cell:
    source = place.study.sources.get(place.dataset)
    command = (
        "sdpo_jax.prepare",
        f"--dataset={place.dataset}",
        *([f"--source={source}"] if source else []),
        f"--output={place.data}",
    )
    return Cell(place.data, (Step(command, ("dataset.json",)),))


def left_out(study: Study, dataset: str) -> str:
    """Why a data set cannot be run; "" if it can."""
    place = Place(study, dataset)
    if dataset == "movielens" or study.sources.get(dataset) or not prepared(place).left():
        return ""
    return f"left out: needs --{dataset}=PATH, the raw files that sdpo_jax.prepare reads"


def converted(place: Place) -> tuple[Cell, ...]:
    """The conversion of the default model; empty if a model is given."""
    if place.backbone or place.study.model:
        return ()
    folder = place.study.root / "model"
    return (Cell(folder, (Step(("sdpo_jax.convert", f"--output={folder}"), ("model.json",)),)),)


def trained(
    place: Place,
    name: str,
    stage: str,
    evaluated: Iterable[str],
    needs: tuple[Cell, ...] = (),
    config: str = "",
    evaluations: Evaluations = OF_CANDIDATES,
    defaults: Mapping[str, object] = {},
    **keys: object,
) -> Cell:
    """A run of one stage with config `keys`, and its evaluations.

    `config`: a file of configs/, by default that of the data set. `defaults`: keys that the study's
    options may change.
    """
    folder, study = place.folder / name, place.study
    own = {} if converted(place) or config else {"chat_template": False}  # not every model has one
    own = {"dataset": place.data, "model": place.model, "stages": f'("{stage}",)'} | own
    own |= defaults

    def flags(keys: Mapping[str, object]) -> list[str]:
        return [f"--config.{key}={value}" for key, value in keys.items()]

    train = (
        "sdpo_jax.train",
        f"--config=configs/{config or place.dataset}.py{study.scale.variant}",
        f"--workdir={folder}",
        *flags(own),
        *study.options,
        *flags(keys),  # last, as they make the cell what it is
    )
    steps = [Step(train, (f"stages/{stage}.json",))]
    for options, endings in evaluations.items():
        stages = ",".join(evaluated)
        evaluate = ("sdpo_jax.evaluate", f"--workdir={folder}", f"--stage={stages}", *options)
        leaves = tuple(f"eval/{s}-*-{ending}.json" for s in evaluated for ending in endings)
        steps.append(Step((*evaluate, *place.windows), leaves))
    return Cell(folder, tuple(steps), (prepared(place), *converted(place), *needs))


def with_adapter(cell: Cell) -> Cell:
    """An SFT cell that also exports its adapter, from which preference tuning starts."""
    adapter = cell.folder / "adapter"
    export = ("sdpo_jax.export", f"--workdir={cell.folder}", "--stage=sft", f"--output={adapter}")
    train, *evaluations = cell.steps
    step = Step(export, ("adapter/adapter_config.json",))
    return dataclasses.replace(cell, steps=(train, step, *evaluations), shared=2)


def sft(place: Place) -> Cell:
    """The SFT stage that preference tuning starts from, its adapter exported, and the base."""
    return with_adapter(trained(place, "sft", "sft", ("base", "sft")))


def tuned(place: Place, negatives: int = K, beta: float = BETA, objective: str = "sdpo") -> Cell:
    """Preference tuning of the SFT stage; with one negative it is DPO."""
    first = sft(place)
    name = f"{objective}-k{negatives}-beta{beta:g}"
    keys = {
        "lora.init_from": first.folder / "adapter",
        "num_negatives": negatives,
        "beta": beta,
        "objective": objective,
    }
    return trained(place, name, "sdpo", ("sdpo",), (first,), **keys)


def network(place: Place, name: str, candidates_only: bool = True) -> Cell:
    folder = place.folder / name
    command = (
        "sdpo_jax.baselines",
        f"--model={name}",
        f"--dataset={place.data}",
        f"--workdir={folder}",
        *(["--candidates_only"] if candidates_only else []),
        *place.windows,
        *place.study.scale.network,
    )
    ranks = ("candidates",) if candidates_only else ("candidates", "catalogue")
    leaves = tuple(f"eval/{name}-{rank}.json" for rank in ranks)
    return Cell(folder, (Step(command, leaves),), (prepared(place),))


def chatrec(place: Place) -> Cell:
    folder, study = place.folder / "chatrec", place.study
    command = (
        "sdpo_jax.chatrec",
        f"--dataset={place.data}",
        f"--workdir={folder}",
        f"--endpoint={study.endpoint}",
        f"--model={study.chat_model}",
        *place.windows,
    )
    return Cell(folder, (Step(command, ("eval/chatrec-greedy.json",)),), (prepared(place),))


def tallrec(place: Place) -> Cell:
    file = f"configs/prompts/{DOMAIN[place.dataset]}-tallrec.txt"
    keys = {"prompt_file": file, "chat_template": False}  # the format is part of the system
    return trained(place, "tallrec", "sft", ("sft",), **keys)


def llara(place: Place) -> Cell:
    items = network(place, "sasrec")
    vectors = items.folder / "baselines" / "sasrec.safetensors"
    return trained(place, "llara", "sft", ("sft",), (items,), item_vectors=vectors)


LABELS = {"morec": "MoRec, frozen encoder"}
# System -> (label, stage of its figures, cell).
ROWS: dict[str, tuple[str, str, Callable[[Place], Cell]]] = {
    **{
        name: (LABELS.get(name, NAMES[name]), name, lambda place, name=name: network(place, name))
        for name in TRADITIONAL
    },
    "base": ("base model, zero-shot", "base", sft),
    "chatrec": ("ChatRec", "chatrec", chatrec),
    "tallrec": ("TALLRec", "sft", tallrec),
    "llara": ("LLaRA", "sft", llara),
    "sft": ("SFT", "sft", sft),
    "dpo": ("DPO", "sdpo", lambda place: tuned(place, negatives=1)),
    "pairs": (f"DPO, {K} pairs", "sdpo", lambda place: tuned(place, objective="dpo_pairwise")),
    "sdpo": ("S-DPO", "sdpo", tuned),
}


def row(place: Place, system: str) -> Row:
    label, stage, cell = ROWS[system]
    if system == "chatrec" and not (place.study.endpoint and place.study.chat_model):
        return Row(system, label, missing="needs --endpoint=URL and --chat_model=NAME")
    return Row(system, label, cell(place), stage)


def rows_of(*systems: str) -> Callable[[Place], list[Row]]:
    return lambda place: [row(place, system) for system in systems]


table1 = rows_of(*(system for system in ROWS if system != "pairs"))
table2 = rows_of("dpo", "pairs", "sdpo")
figure2 = rows_of("sft", "dpo", "sdpo")


def backbones(place: Place) -> dict[str, list[Row]]:
    """Table 4: the rows of each given backbone."""
    return {
        name: [
            row(dataclasses.replace(place, backbone=name), system)
            for system in ("base", "sft", "dpo", "sdpo")
        ]
        for name in BACKBONES
        if place.study.backbones.get(name)
    }


def table4(place: Place) -> list[Row]:
    return list(itertools.chain(*backbones(place).values()))


def over_negatives(place: Place) -> list[Row]:
    """Figure 3 (a)."""
    numbers = place.study.scale.negatives
    return [Row("sdpo", f"K = {n}", tuned(place, negatives=n), "sdpo", at=n) for n in numbers]


def over_betas(place: Place) -> list[Row]:
    """Figure 3 (b) and (c)."""
    betas = place.study.scale.betas
    return [Row("sdpo", f"beta = {b:g}", tuned(place, beta=b), "sdpo", at=b) for b in betas]
