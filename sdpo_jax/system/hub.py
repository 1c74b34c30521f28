"""Models by their name on the Hugging Face Hub: fetched into its own cache, and sent to it."""

import os
import re
from pathlib import Path

from sdpo_jax.system.errors import InputError, first_line

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
        raise InputError(
            f"{option}={model}: found no such folder here, and the Hub cannot be reached "
            f"({first_line(error)}): download it where there is a network and give its folder"
        ) from error


def check_push(name: str) -> None:
    """Raises InputError for a name that no repository can have, and where there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push: found {name!r}, expected user/name ({error})") from error
    if "/" not in name:
        raise InputError(f"--push: found {name!r}, expected user/name")
    if get_token() is None:
        raise InputError(
            "--push: found no token, expected one that may write: `hf auth login`, or HF_TOKEN in "
            "the environment"
        )


def push(folder: Path, name: str) -> str:
    """Sends a folder to the repository `name`, made private where it is new; returns its address.

    Raises InputError where the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="sdpo_jax export")
    except Exception as error:  # of the Hub, its HTTP client and its transfer library
        raise InputError(
            f"--push={name}: not sent ({first_line(error)}): {folder} is complete: send it with "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(address)
