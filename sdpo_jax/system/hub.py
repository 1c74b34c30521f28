"""Models by their name on the Hugging Face Hub, stored in the Hub's own cache."""

import os
import re
from pathlib import Path

from sdpo_jax.system.errors import InputError

NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in other layouts


def is_hub_name(model: str | Path) -> bool:
    """`org/name` or `org/name@revision`, where no such path is here."""
    return NAME.fullmatch(str(model)) is not None and not os.path.exists(model)


def name_and_revision(source: str) -> tuple[str, str | None]:
    """The parts of `org/name@revision`; a path is itself, without a revision."""
    if not NAME.fullmatch(source):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def hub_folder(model: str, option: str = "--model") -> Path:
    """The folder of `org/name[@revision]`, downloaded unless it is in the cache.

    Raises InputError, which names `option`, where it is not there, needs a token, or cannot be
    reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name, revision = name_and_revision(model)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"{option}={model}: its terms must be accepted on its page first, then give a token: "
            "`hf auth login`, or HF_TOKEN in the environment"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{option}={model}: found no such folder here and no such model on the Hub (a private "
            "one needs a token: `hf auth login`)"
        ) from error
    except Exception as error:  # of the Hub, its HTTP client and its transfer library
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(
            f"{option}={model}: found no such folder here, and the Hub cannot be reached "
            f"({reason}): download it where there is a network and give its folder"
        ) from error
