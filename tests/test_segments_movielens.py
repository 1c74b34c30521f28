"""What the segments of a real data set feed to the model, counted with a real tokenizer."""

from types import SimpleNamespace

import pytest

from configs import quickstart
from sdpo_jax.convert import DEFAULT_MODEL
from sdpo_jax.data import loader, prompts
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.models.gguf import open_gguf
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.prepare import prepare
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.system.wheels import RECBOLE, cache_folder
from sdpo_jax.training.stage import Stage


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    """Histories of MovieLens-100K as SmolLM2 reads them."""
    package, version, _, member = DEFAULT_MODEL
    path = cache_folder() / f"{package}-{version}" / member.split("/")[-1]
    wheel = cache_folder() / f"{RECBOLE[0]}-{RECBOLE[1]}"
    if not path.is_file() or not wheel.is_dir():
        pytest.skip(f"{path.name} or MovieLens-100K is not in the cache: `make setup` fetches them")
    folder = tmp_path_factory.mktemp("movielens")
    (folder / "model").mkdir()
    open_gguf(path).write_tokenizer(folder / "model")
    prepare("movielens", None, str(folder / "data"))
    dataset = read_dataset(folder / "data")
    templates = prompts.templates_of("movie", prompt="history")
    config = quickstart.get_config()
    return Encoder(
        dataset,
        load_tokenizer(folder / "model"),
        templates,
        config.seed,
        config.max_length,
        prompt=config.prompt,
        history=config.history,
    )


@pytest.mark.parametrize(("stage", "most"), [("sft", 7), ("sdpo", 6.5 * (3 + 1))])
def test_a_target_takes_few_tokens_of_which_nearly_all_are_real(encoder, stage, most, tmp_path):
    config = quickstart.get_config()
    config.batch_size, config.microbatch = 32, 4
    config[stage].epochs, config[stage].max_steps = 1, 0
    rows = SimpleNamespace(batch_size=config.microbatch, rows=1)
    made = Stage(stage, RunConfig.of(config.to_dict()), tmp_path, None, encoder, None, rows, None)
    count = config.batch_size // config.microbatch
    examples = [[made.train_examples[key] for key in part] for part in made.train_batches]
    shapes = loader.choose_shapes(examples, count)
    fed = sum(shape.T * count for shape in shapes)
    real = sum(example.tokens for part in examples for example in part)
    targets = sum(example.M for part in examples for example in part)
    assert targets > 0.95 * len(encoder.dataset.splits["train"])
    assert fed / targets <= most and real / fed >= 0.9 and len(set(shapes)) <= 4
