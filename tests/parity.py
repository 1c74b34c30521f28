"""Live against PyTorch: transformers' logits, PEFT's adapters, and models that go back to them.

`make parity` runs this, with the extra `parity`; the tests have golden files instead.
"""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_run
import torch
from conftest import random_examples, random_segments
from flax import nnx
from golden.make_golden import MODELS, logits_of, make_model, save_model
from test_decoder_parity import all_logits
from test_families import noisy
from tiny import GOLDEN, write_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.torch_sides import OfficialSide, padded_rows
from sdpo_jax.convert import convert
from sdpo_jax.data.loader import choose_shapes, collate
from sdpo_jax.export import export, write_merged
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import adapted_modules, read_adapter, write_adapter
from sdpo_jax.models.store import load_model
from sdpo_jax.objectives.logprobs import shared_prefix_logp
from sdpo_jax.objectives.losses import sdpo_loss
from sdpo_jax.serving.recommender import Recommender

ROOT = Path(__file__).parents[1]
LORA = LoraConfig(rank=2, alpha=4.0)
SEED, C = 1000, 4
# `dynamic` stretches with the longest text fed, and the official rows feed EOS as well.
SAME_ALONE = [name for name in MODELS if name != "dynamic"]
COLUMNS = (
    "logits",
    "padded",
    "adapter out",
    "loss out",
    "loss out, histories",
    "loss in",
    "merged",
)
found: dict[str, dict[str, float]] = {name: {} for name in MODELS}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints the largest differences of each family as Markdown."""
    yield
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, values in found.items():
        cells = [f"{values[c]:.1e}" if c in values else "–" for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Name -> a random model of transformers and the same one here, with its folders."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        save_model(make_model(name, SEED), name, folder / "hf")
        write_tokenizer(folder / "hf")
        convert(str(folder / "hf"), str(folder / "model"))
        return folder, load_model(folder / "model", LORA, dtype=jnp.float32)

    return get


def told(name: str, column: str, ours, theirs, limit: float = 1e-4) -> None:
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    found[name][column] = difference
    assert difference < limit


def decoder_of(model, lora=None):
    return nnx.merge(model.graphdef, model.lora if lora is None else lora, model.base)


def loss_here(model, lora, examples) -> np.ndarray:
    """S-DPO's loss of an adapter whose reference is the base, for each target of all examples."""
    batch = collate(examples, choose_shapes([examples])[0])
    policy, reference = (
        shared_prefix_logp(decoder_of(model, adapter), batch) for adapter in (lora, model.lora)
    )
    return np.asarray(sdpo_loss(policy, reference, 1.0))[batch["place_BM"] >= 0]


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_files_are_what_transformers_computes_today(name):
    golden = np.load(GOLDEN / name / "logits.npz")
    again = logits_of(make_model(name, seed=len(name)), seed=len(name))
    for key, array in again.items():
        np.testing.assert_allclose(golden[key], array, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_new_random_model(pairs, name):
    folder, model = pairs(name)
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(folder / "hf").eval(), SEED)
    tokens, mask = theirs["tokens"], theirs["mask"]
    ours = all_logits(decoder_of(model), tokens, np.ones_like(mask))
    told(name, "logits", ours, theirs["unpadded"])
    padded = all_logits(decoder_of(model), tokens, mask)
    told(name, "padded", padded[mask], theirs["padded"][mask])


@pytest.mark.parametrize("name", MODELS)
def test_our_adapter_loads_in_peft_and_in_transformers(pairs, name, tmp_path):
    folder, model = pairs(name)
    lora = noisy(model.lora)
    write_adapter(tmp_path, nnx.to_pure_dict(lora), LORA, model.config, str(folder / "hf"))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9))
    ours = all_logits(decoder_of(model, lora), tokens, np.ones(tokens.shape, bool))
    base = AutoModelForCausalLM.from_pretrained(folder / "hf")
    loaded = [
        peft.PeftModel.from_pretrained(base, tmp_path).eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    ]
    for theirs in loaded:
        with torch.no_grad():
            told(name, "adapter out", ours, theirs(torch.from_numpy(tokens)).logits)
    plain = all_logits(decoder_of(model), tokens, np.ones(tokens.shape, bool))
    assert np.abs(plain - ours).max() > 1e-2, "the adapter changes nothing"
    if name in SAME_ALONE:
        side, rng = OfficialSide(loaded[0], checkpointing=False), np.random.default_rng(4)
        for column, examples in (
            ("loss out", random_examples(rng, 3, C, P=20, A=7, V=64)),
            ("loss out, histories", random_segments(rng, 3, C, V=64)),
        ):
            with torch.no_grad():
                theirs = side.loss(padded_rows(examples)).numpy()
            ours = loss_here(model, lora, examples)
            assert ours.shape == theirs.shape
            told(name, column, ours, theirs)


@pytest.mark.parametrize("name", SAME_ALONE)
def test_an_adapter_trained_by_peft_gives_the_same_loss_here(pairs, name, tmp_path):
    folder, model = pairs(name)
    base = AutoModelForCausalLM.from_pretrained(folder / "hf")
    targets = [module.rsplit(".", 1)[1] for module in adapted_modules(model.config).values()]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    side = OfficialSide(peft.get_peft_model(base, config), checkpointing=False)
    examples = random_examples(np.random.default_rng(3), 3, C, P=20, A=7, V=64)
    rows = padded_rows(examples)
    optimizer = torch.optim.AdamW(side.parameters, lr=0.002)
    for _ in range(5):
        loss_B = side.loss(rows)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
    side.model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = side.loss(rows).numpy()
    assert 0.1 < theirs.mean() < np.log(C) - 0.01, "the adapter has learnt too little or all"

    tree = read_adapter(tmp_path, LORA, model.config)
    lora = jax.tree.map(lambda leaf: leaf, model.lora)
    nnx.replace_by_pure_dict(lora, jax.tree.map(jnp.asarray, tree))
    told(name, "loss in", loss_here(model, lora, examples), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_from_the_merged_model(pairs, name, tmp_path):
    folder, model = pairs(name)
    lora = noisy(model.lora)
    write_merged(tmp_path, folder / "model", nnx.to_pure_dict(lora), LORA, model.config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, 64, (1, 9))
    ours = all_logits(decoder_of(model, lora), tokens, np.ones(tokens.shape, bool))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
        new = theirs.generate(torch.from_numpy(tokens), max_new_tokens=4, do_sample=False)
    # Weights in bfloat16 have 8 bits.
    told(name, "merged", ours, logits, limit=0.1 * np.abs(logits).max())
    assert new.shape[1] > tokens.shape[1]


def test_the_code_that_the_docs_have_for_transformers_lists_the_same_titles(tmp_path, monkeypatch):
    run = tiny_run.history_run(tmp_path)
    ours = Recommender.from_bundle(export(run, "sft", "bundle", tmp_path / "bundle"))
    export(run, "sft", "merged", tmp_path / "merged")
    history = [ours.index.item(title) for title in ("heat", "alien", "up")]
    prompt = ours._continuing(history, [ours.encoder.answer(0)]).prompt
    text = ours.source.model.tokenizer.decode(prompt)
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    page = (ROOT / "docs" / "recommend.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json, torch.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["prompt"][0].tolist() == prompt.tolist()
    found, listed = names["found"], []
    for ids, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        answer = tuple(ids[len(prompt) :])
        (title,) = (
            title
            for title, tokens in zip(names["titles"], names["tokens"], strict=True)
            if answer[: len(tokens)] == tokens
        )
        listed.append((title, score))
    expected = ours.recommend(history, k=10, exclude_seen=False)
    assert [title for title, _ in listed] == [title for title, _ in expected]
    np.testing.assert_allclose([s for _, s in listed], [s for _, s in expected], atol=1e-3)
