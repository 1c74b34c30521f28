"""Model folders of the golden models, small enough to train in a test."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npz"))
SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;'\"()-&!?/#*_+"


def hf_folder(path: Path, name: str = "llama-new") -> Path:
    """A Hugging Face folder: golden weights and a tokenizer of one token a lower-case letter."""
    path.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    vocab = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    config = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
