"""A model folder's tokenizer, and the tokens that end a generation."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from sdpo_jax.system.errors import InputError, brief, first_line
from sdpo_jax.system.files import COUNT, read_object

# Else transformers prints that it found no PyTorch, which is not needed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load_tokenizer(path: Path, where: str | None = None) -> Any:
    """The folder's tokenizer; never reaches the network. Raises InputError naming `where`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds
        if _lacks_sentencepiece(path):
            raise InputError(
                f"{where or path}: found tokenizer.model and no tokenizer.json, which needs the "
                "package sentencepiece: pip install 'sdpo_jax[sentencepiece]'"
            ) from error
        reason = first_line(error)
        raise InputError(
            f"{where or path}: found no tokenizer that transformers can read ({reason}), expected "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def _lacks_sentencepiece(path: Path) -> bool:
    here = [name for name in ("tokenizer.json", "tokenizer.model") if os.path.exists(path / name)]
    return here == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None


def check_vocabulary(tokenizer: Any, V: int, where: str) -> None:
    """Raises InputError where the tokenizer has a token beyond the model's `V`."""
    # Not their number: a vocabulary may have gaps, and JAX clamps an index beyond a table silently.
    beyond = {name: i for name, i in tokenizer.get_vocab().items() if i >= V}
    if beyond:
        name = max(beyond, key=beyond.__getitem__)
        raise InputError(
            f"{where}: the tokenizer's largest token is {beyond[name]} ({brief(name)}), the model "
            f"has {V} of them: these files do not belong together"
        )


def ends_of(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a generation; the tokenizer's EOS, which is trained, is first.

    The others are those of config.json and generation_config.json, such as the end of a turn of a
    model whose EOS ends a document. Raises InputError where a file names anything but tokens.
    """
    ends = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        if not os.path.exists(path / name):
            continue
        found = read_object(path / name, "expected JSON: give the folder of a whole model").get(
            "eos_token_id"
        )
        for token in found if isinstance(found, list) else [] if found is None else [found]:
            if not COUNT.right(token):
                raise InputError(
                    f"{path / name}: eos_token_id: found {brief(found)}, expected tokens' numbers: "
                    "correct it"
                )
            ends.append(token)
    return tuple(dict.fromkeys(ends))
