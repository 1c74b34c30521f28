"""What a recommender is made of, from a run, a converted model or a bundle."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import Dataset, read_items, read_meta
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import lora_of, read_adapter
from sdpo_jax.models.store import Model, load_model, with_adapter
from sdpo_jax.runs.inputs import inputs_of
from sdpo_jax.runs.steps import adapter, choose_step, steps
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system import files, sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax

BUNDLE = "bundle.json"
FORMAT = 1
_KEYS = {
    "format": files.COUNT,
    "domain": files.TEXT,
    "stage": files.TEXT,
    "dtype": files.TEXT,
    "base_dtype": files.TEXT,
    "settings": files.OBJECT,
    "model_sha256": files.TEXT,
    "files": files.OBJECT,
}
_RESTORE = "export the bundle again"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How prompts are made: what a run's config says of them."""

    templates: tuple[str, ...]
    prompt: str = "history"
    history: int = 10
    max_length: int = 512
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, its adapters by stage, a catalogue, and how prompts are made."""

    model: Model
    adapters: dict[str, nnx.State]
    dataset: Dataset
    settings: Settings
    mesh: jax.sharding.Mesh


def of_workdir(workdir: str | Path, stages: tuple[str, ...], step: int | None = None) -> Source:
    """A run at the best step of each stage, or at `step`; without stages, all that it has."""
    run = read_run(Path(workdir))
    c = run.config
    known = ("base", *c.stages)
    if wrong := [stage for stage in stages if stage not in known]:
        raise InputError(f"--stage: found {wrong[0]!r}, expected {', '.join(known)}")
    if c.item_vectors:
        raise InputError(
            f"{workdir}: found a run whose prompts hold item vectors (config.item_vectors), "
            "expected one whose prompts are text"
        )
    if not stages:
        stages = tuple(stage for stage in known if steps(run, stage))
    chosen = {stage: choose_step(run, stage, step) for stage in stages}
    set_up_jax(c.dtype)
    inputs = inputs_of(run, c.validation_split)
    mesh = sharding.make_mesh()
    model = inputs.model(mesh)
    adapters = {stage: adapter(run, stage, step, model.lora) for stage, step in chosen.items()}
    settings = Settings(run.templates, c.prompt, c.history, c.max_length, c.seed)
    return Source(model, adapters, inputs.dataset, settings, mesh)


def of_flags(
    workdir: str,
    bundle: str,
    model: str,
    adapter: str,
    catalogue: str,
    stages: tuple[str, ...] | None = None,
) -> Source:
    """What the flags of these names say: a run, a bundle, or a converted model with a catalogue.

    `stages`: None where --stage was not given. Raises InputError for flags that do not go together.
    """
    if bool(workdir) + bool(bundle) + bool(model and not bundle) != 1:
        raise InputError(
            "found none or several of --workdir, --bundle and --model, expected one of them; only "
            "--bundle may have --model beside it, as the base of its adapter"
        )
    if stages and not workdir:
        raise InputError("--stage: found it without --workdir: leave it out")
    if (workdir or bundle) and (adapter or catalogue):
        raise InputError("--adapter, --catalogue: found one without --model alone: leave it out")
    if workdir:
        return of_workdir(workdir, stages or ())
    if bundle:
        return of_bundle(bundle, model or None)
    if not catalogue:
        raise InputError(
            "--catalogue: found nothing beside --model, expected a folder of prepare, or a file "
            "like its items.jsonl"
        )
    return of_model(model, adapter or None, catalogue)


def of_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    catalogue: str | Path | None = None,
    settings: Settings | None = None,
    *,
    domain: str = "",
    dtype: str = "float32",
    base_dtype: str = "same",
) -> Source:
    """A converted model, with an adapter in PEFT's format if given, beside which its base stays.

    `catalogue`: a prepared folder, or a file like its items.jsonl; without one only given titles
    are ranked. `domain`: of the prompt's wording; "": that of the prepared folder, or `movie`.
    Raises InputError.
    """
    set_up_jax(dtype)
    folder, mesh = Path(folder), sharding.make_mesh()
    config = DecoderConfig.read(folder)
    lora, tree = LoraConfig(targets=()), None
    if adapter is not None:
        lora = lora_of(Path(adapter), config)
        tree = read_adapter(Path(adapter), lora, config)
    place = sharding.placement(mesh)
    model = load_model(folder, lora, dtype=dtype, base_dtype=base_dtype, shardings=place)
    adapters = {"base": model.lora}
    if tree is not None:
        adapters["adapter"] = with_adapter(model, tree)
    dataset = read_catalogue(catalogue, domain)
    domain = dataset.domain
    settings = settings or Settings(prompts.templates_of(domain, prompt="history"))
    return Source(model, adapters, dataset, settings, mesh)


def read_catalogue(path: str | Path | None, domain: str) -> Dataset:
    """The titles and attributes of items.jsonl, as a data set without windows."""
    titles: dict[int, str] = {}
    attributes: dict[int, dict[str, Any]] = {}
    if path is not None:
        file = Path(path)
        if not domain and (file / "dataset.json").exists():
            domain = read_meta(file)["domain"]
        titles, attributes = read_items(file / "items.jsonl" if file.is_dir() else file)
    return Dataset(domain or "movie", titles, {}, {}, {}, attributes)


def of_bundle(folder: str | Path, model: str | Path | None = None) -> Source:
    """What `sdpo export --format=bundle` wrote; every file is compared with its hash.

    `model`: the converted base of a bundle that has an adapter alone. Raises InputError.
    """
    folder = Path(folder)
    meta = files.read_object(folder / BUNDLE, "expected a bundle of export --format=bundle")
    files.check_keys(folder / BUNDLE, meta, _KEYS, _RESTORE)
    if meta["format"] != FORMAT:
        raise InputError(
            f"{folder}/{BUNDLE}: found format {meta['format']}, expected {FORMAT}: {_RESTORE}"
        )
    _verify(folder, meta["files"])
    whole = (folder / "model").is_dir()
    if not whole and model is None:
        raise InputError(
            f"{folder}: found an adapter alone, expected the converted base beside it: give --model"
        )
    base = folder / "model" if whole else Path(str(model))
    found = files.read_object(base / "model.json", "expected a converted model")
    if found.get("sha256") != meta["model_sha256"]:
        raise InputError(
            f"{base}: found another model than the one that {folder} was made with: give the same"
        )
    content = dict(meta["settings"])
    try:
        settings = Settings(tuple(content.pop("templates")), **content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/{BUNDLE}: settings: found {error}: {_RESTORE}") from error
    source = of_model(
        base,
        None if whole else folder / "adapter",
        folder,
        settings,
        domain=meta["domain"],
        dtype=meta["dtype"],
        base_dtype=meta["base_dtype"],
    )
    trained = list(source.adapters.values())[-1]
    return dataclasses.replace(source, adapters={meta["stage"]: trained})


def write_bundle(
    folder: Path, dataset: Dataset, settings: Settings, stage: str, model: str, **dtypes: str
) -> None:
    """Writes items.jsonl and, last, bundle.json with the hashes of all files in `folder`.

    `model`: SHA-256 of the base; `dtypes`: dtype and base_dtype.
    """
    rows = ({"id": i, "title": t} | dataset.attributes[i] for i, t in dataset.titles.items())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "items.jsonl").write_text(text, encoding="utf-8")
    meta = {
        "format": FORMAT,
        "domain": dataset.domain,
        "stage": stage,
        **dtypes,
        "settings": dataclasses.asdict(settings),
        "model_sha256": model,
        "files": _hashes(folder),
    }
    files.write_json(folder / BUNDLE, meta)


def _hashes(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below `folder` but bundle.json."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != BUNDLE
    }


def _verify(folder: Path, expected: dict[str, str]) -> None:
    found = _hashes(folder)
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            there = "missing" if name not in found else "changed" if name in expected else "added"
            raise InputError(
                f"{folder}/{name}: found the file {there}, expected it as export wrote it: "
                f"{_RESTORE}"
            )
