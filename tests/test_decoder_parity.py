"""Our decoder gives the logits of transformers, whose numbers are in golden/."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAMILIES, GOLDEN, hf_folder

from sdpo_jax.convert import DEFAULT_MODEL, convert
from sdpo_jax.models.attention import attend, causal_mask
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.gguf import open_gguf
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.models.weights import read_base
from sdpo_jax.objectives.logprobs import prompt_positions
from sdpo_jax.system.wheels import cache_folder

TEXT = "This person has listened to Madonna"


def all_logits(decoder: Decoder, tokens_BT, mask_BT) -> np.ndarray:
    return np.asarray(traced_logits(decoder, tokens_BT, mask_BT))


def traced_logits(decoder: Decoder, tokens_BT, mask_BT):
    causal_BTT = causal_mask(jnp.asarray(mask_BT), decoder.config.window)

    def attention(q, k, v, cache):
        return attend(q, [(k, v, causal_BTT)], decoder.dtype), None

    positions_BT = prompt_positions(jnp.asarray(mask_BT))
    hidden_BTD, _ = decoder(jnp.asarray(tokens_BT), positions_BT, attention)
    return decoder.logits(hidden_BTD)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_padded_and_not(name, tmp_path):
    convert(str(hf_folder(tmp_path / "hf", name)), str(tmp_path / "model"))
    model = load_model(tmp_path / "model", LoraConfig(), dtype=jnp.float32)
    decoder = nnx.merge(model.graphdef, model.lora, model.base)
    golden = np.load(GOLDEN / name / "logits.npz")
    tokens, mask = golden["tokens"], golden["mask"]
    unpadded = all_logits(decoder, tokens, np.ones_like(mask))
    np.testing.assert_allclose(unpadded, golden["unpadded"], atol=1e-4, rtol=0)
    padded = all_logits(decoder, tokens, mask)
    np.testing.assert_allclose(padded[mask], golden["padded"][mask], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2():
    package, version, _, member = DEFAULT_MODEL
    path = cache_folder() / f"{package}-{version}" / member.split("/")[-1]
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the cache: `make setup` fetches it")
    return open_gguf(path)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2.write_tokenizer(folder)
    return load_tokenizer(folder)


def test_smollm2_gives_the_logits_of_transformers(smollm2, smollm2_tokenizer):
    config = DecoderConfig.from_hf(smollm2.config, smollm2.where)
    assert (config.V, config.L, config.D, config.N, config.G, config.H, config.F, config.tied) == (
        49152,
        30,
        576,
        9,
        3,
        64,
        1536,
        True,
    )
    decoder = nnx.eval_shape(lambda: Decoder(config, LoraConfig(targets=()), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    nnx.replace_by_pure_dict(state, read_base(smollm2, config)[0])
    tokens = np.array([smollm2_tokenizer(TEXT).input_ids])
    logits = all_logits(nnx.merge(graphdef, state), tokens, np.ones(tokens.shape, bool))[0, -1]
    top = np.argsort(-logits)[:5]
    assert top.tolist() == [506, 417, 28, 327, 284]
    expected = [23.1010, 20.9537, 20.8026, 20.7443, 20.0581]
    np.testing.assert_allclose(logits[top], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("text", [TEXT, "Amélie (2001), 10,000 Maniacs & AC/DC\n", "  two  spaces"])
def test_smollm2_tokenizer_gives_text_back_and_adds_nothing(smollm2_tokenizer, text):
    ids = smollm2_tokenizer(text).input_ids
    assert smollm2_tokenizer.decode(ids) == text
    assert ids == smollm2_tokenizer(text, add_special_tokens=False).input_ids


def test_smollm2_tokenizer_splits_digits_and_keeps_special_tokens_whole(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer(TEXT).input_ids == [1348, 1055, 553, 17443, 288, 7473, 30472]
    assert tokenizer.tokenize("in 1999") == ["in", "Ġ", "1", "9", "9", "9"]
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    assert tokenizer.decode([40, 2], skip_special_tokens=True) == tokenizer.decode([40])
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
