"""Names say shapes: `x_BTD` has three axes, and a letter is one size within a function."""

import ast
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import (
    TINY,
    collate_padded,
    random_batch,
    random_examples,
    random_segments,
    tiny_model,
)
from test_catalogue import case
from trainers import ROOT

from sdpo_jax.data.tokens import Example
from sdpo_jax.evaluation import catalogue, decode, title_trie
from sdpo_jax.evaluation.beam import beam_search
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.system import sharding
from sdpo_jax.training.optimizer import paper_optimizer
from sdpo_jax.training.step import build_step, make_logp, make_objective

SUFFIX = re.compile(r"[a-z]\w*_([A-Z1][A-Z1n]*)")
# These take arrays with any further axes: losses before the named ones, rows behind them.
FREE = ("objectives/losses.py", "_pick", "_pick_forward", "_pick_backward", "pack", "unpack")
NEOX = DecoderConfig(
    V=97, L=2, D=16, N=4, G=4, H=4, F=24, family="gpt_neox", qkv_bias=True, o_bias=True
)


class Watch:
    """Compares names with shapes wherever a function of the package returns."""

    def __init__(self):
        self.wrong: set[str] = set()
        self.names: set[str] = set()

    def __enter__(self):
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def profile(self, frame, event, arg):
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if event != "return" or "/sdpo_jax/" not in file or file.endswith(FREE):
            return
        if function in FREE:
            return
        sizes: dict[str, set[int]] = {}
        for name, value in frame.f_locals.items():
            match, shape = SUFFIX.fullmatch(name), getattr(value, "shape", None)
            if match and isinstance(shape, tuple):
                self.names.add(name)
                if len(match[1]) != len(shape):
                    self.wrong.add(f"{function}: {name} has shape {shape}")
                for letter, size in zip(match[1], shape, strict=False):
                    sizes.setdefault(letter, set()).add(size)
            elif re.fullmatch("[A-Z]", name) and isinstance(value, int):
                sizes.setdefault(name, set()).add(value)
        for letter, found in sizes.items():
            if len(found) > 1 or (letter == "1" and found != {1}):
                self.wrong.add(f"{function}: {letter} is {sorted(found)}")


@pytest.mark.parametrize("config", [TINY, NEOX])
@pytest.mark.parametrize("make", [random_examples, random_segments])
def test_every_array_of_a_step_has_the_axes_that_its_name_says(config, make):
    model, mesh = (
        tiny_model(config, dropout=0.1, remat="least"),
        sharding.make_mesh(devices=jax.devices()[:1]),
    )
    batch = {k: x[None] for k, x in random_batch(B=4, C=3, rows=2, make=make).items()}
    with Watch() as watch:
        for layout in ("shared_prefix", "padded"):
            step, state = build_step(
                make_logp(model.graphdef, layout),
                make_objective("sdpo"),
                paper_optimizer(),
                model.lora,
                mesh,
                dropout_key=jax.random.key(0),
            )
            step.trace(state, model.base, batch)
    assert watch.wrong == set()
    assert {"logp_BMC", "hidden_WTD", "q_BGXH", "answers_ZA", "head_BQ", "kept_WTJ"} <= watch.names


def test_every_array_of_a_decoder_has_the_axes_that_its_name_says():
    titles, examples = case()
    model, trie = tiny_model(), title_trie.build(titles)
    batch = collate_padded([Example.single(e.prompt, e.answers_MC[0][:3]) for e in examples])
    with Watch() as watch:
        found = catalogue.to_devices(trie, title_trie.pieces(trie, 128, 128), jax.devices()[0])
        allowed = jnp.ones((len(examples), len(titles)), bool)

        def everything(batch):
            prefix = decode.prefill(model.decoder, batch)
            return (
                decode.score(model.decoder, prefix, batch),
                decode.greedy(model.decoder, prefix, (2,), 4),
                decode.trie(model.decoder, prefix, batch["answers_BMCA"][:, 0]),
                catalogue.score_catalogue(model.decoder, prefix, found),
                beam_search(model.decoder, prefix, found, allowed, 5),
            )

        jax.eval_shape(everything, batch)
    assert watch.wrong == set()
    assert {"mask_ZWQT", "node_BC", "alive_BC", "keys_BAGH", "logp_BX"} <= watch.names


def test_every_letter_is_declared_and_the_free_ones_in_their_file():
    declared = set(re.findall(r"\b[A-Z]\b", sharding.__doc__)) - set("XYZ")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file in sorted((ROOT / "sdpo_jax").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
        own = set("XYZ") & set(re.findall(r"\b[A-Z]\b", " ".join(texts)))
        names = {getattr(node, "id", None) or getattr(node, "arg", None) for node in nodes}
        for name in filter(None, names):
            if (match := SUFFIX.fullmatch(name)) and not name.isupper():
                assert set(match[1]) <= declared | own | set("1n"), (file.name, name)
