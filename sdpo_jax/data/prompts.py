"""Prompt templates, the official template file format, and the per-example template draw."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.data.randomness import generator
from sdpo_jax.system.errors import InputError, first_line
from sdpo_jax.system.files import read_text

DOMAINS = ("movie", "music", "book", "product")
PROMPTS = ("candidates", "history")
# The placeholders of each kind of prompt.
PLACEHOLDERS = {"candidates": ("[HistoryHere]", "[CansHere]"), "history": ("[HistoryHere]",)}
_PLACEHOLDER = re.compile(r"\[(HistoryHere|CansHere)\]")
_WORDINGS = Path(__file__).parent / "wordings"


def templates_of(domain: str, prompt_file: str = "", prompt: str = "candidates") -> tuple[str, ...]:
    """The built-in templates of a domain, or those of `prompt_file`, for one of PROMPTS.

    Raises InputError.
    """
    if prompt_file:
        return read_templates(prompt_file, prompt)
    return TEMPLATES[domain] if prompt == "candidates" else HISTORY_TEMPLATES[domain]


def in_chat(template: str, tokenizer: Any, options: str = "{}") -> str:
    """The template as a user's message in the chat format, up to the start of the answer.

    A leading BOS is removed if the encoder puts one before every prompt. `options`: a JSON object
    of further variables of the format. Raises InputError if the tokenizer has no chat format, or
    one that changes the placeholders.
    """
    message = [{"role": "user", "content": template.strip()}]
    try:
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, **json.loads(options)
        )
    except Exception as error:  # the format is a program of the model's authors
        reason = first_line(error)
        raise InputError(
            f"config.chat_template: found a model without a chat format that works ({reason}), "
            "expected one: set it to False"
        ) from error
    if any(text.count(name) != template.count(name) for name in PLACEHOLDERS["candidates"]):
        raise InputError(
            "config.chat_template: found a chat format that changes the placeholders, expected "
            "one that keeps them: set it to False"
        )
    return text.removeprefix(tokenizer.bos_token) if bos(tokenizer) else text


def bos(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it before every text (Llama's does), else [].

    SmolLM2's BOS, `<|im_start|>`, begins each turn of its chat format instead.
    """
    first = tokenizer("", add_special_tokens=True).input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def fingerprint(templates: Sequence[str]) -> str:
    """SHA-256 of the wording, so that a run is resumed and evaluated with the same one only."""
    return hashlib.sha256(json.dumps(list(templates)).encode()).hexdigest()


def answer_end(tokenizer: Any, prompt: str) -> int:
    """The token that ends an answer: EOS, or in a history the line break after each title.

    Raises InputError if the tokenizer has no token for a line break alone.
    """
    if prompt != "history":
        return tokenizer.eos_token_id
    ids = tokenizer("\n", add_special_tokens=False).input_ids[-1:]
    if not ids or tokenizer.decode(ids) != "\n" or ids[0] == tokenizer.unk_token_id:
        raise InputError(
            "config.prompt is 'history': found a tokenizer without a token for a line break alone, "
            "which ends each title: use another model, or --config.prompt=candidates"
        )
    return ids[0]


def head(template: str) -> str:
    """The text of a history's template before the titles."""
    return template.removesuffix("\n").removesuffix("[HistoryHere]")


def render(template: str, history_titles: Sequence[str], candidate_titles: Sequence[str]) -> str:
    """The prompt text: a placeholder alone on its line becomes one title per line, else ", "."""
    titles = {"HistoryHere": history_titles, "CansHere": candidate_titles}

    def fill(match: re.Match) -> str:
        before, after = template[: match.start()], template[match.end() :]
        alone = before[-1:] in ("", "\n") and after[:1] in ("", "\n")
        return ("\n" if alone else ", ").join(titles[match[1]])

    # One pass, so that a title that contains a placeholder's text is left alone.
    return _PLACEHOLDER.sub(fill, template)


def template_index(seed: int, split: str, row: int, n: int) -> int:
    """Which of n templates row `row` of `split` uses: a pure function of its arguments."""
    return int(generator(seed, "template", split, row).integers(n))


def read_templates(prompt_file: str | Path, prompt: str = "candidates") -> tuple[str, ...]:
    r"""Templates of a file in the authors' format: one per line, with [HistoryHere] and [CansHere].

    The two characters \n stand for a line break (the authors' files have none). A template that
    does not end in one gets a single space at its end, as in the authors' Prompt.py. Templates of
    `prompt` history have [HistoryHere] only, at the end, as the titles follow line by line.
    Raises InputError naming file and line.
    """
    path, names = Path(prompt_file), PLACEHOLDERS[prompt]
    text = _read(path)
    templates = []
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()):
            continue
        for name in names:
            if name not in line:
                raise InputError(
                    f"{path}:{number}: found {line[:40]!r} without {name}, expected a prompt "
                    f"template with {' and '.join(names)}: add it, or give a file with "
                    "one template per line"
                )
        template = line.replace("\\n", "\n")
        if prompt == "history":
            templates.append(_history_template(f"{path}:{number}", template))
        else:
            templates.append(template if template.endswith("\n") else template + " ")
    if not templates:
        raise InputError(
            f"{path}: found no template, expected at least one line with "
            f"{' and '.join(names)}: give another prompt file"
        )
    return tuple(templates)


def _history_template(where: str, template: str) -> str:
    template = template.removesuffix("\n") + "\n"
    if not template.endswith("[HistoryHere]\n") or template.count("[HistoryHere]") > 1:
        raise InputError(
            f"{where}: found text after [HistoryHere], expected the template of a history to end "
            "with it, since the titles follow line by line: move the text before it"
        )
    if "[CansHere]" in template:
        raise InputError(
            f"{where}: found [CansHere], expected a history's template without it: remove it, or "
            "set --config.prompt=candidates"
        )
    return template


def _read(path: Path) -> str:
    expected = "expected a UTF-8 text file of prompt templates: correct the path or the file"
    text = read_text(path, expected)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    raise InputError(
        f"{path}:1: found JSON, expected text with one prompt template per line: give a prompt "
        "file, not a data file"
    )


# Domain -> built-in templates, whose files are in the format of `read_templates`.
TEMPLATES = {domain: read_templates(_WORDINGS / f"{domain}.txt") for domain in DOMAINS}
# The same wordings up to the history.
HISTORY_TEMPLATES = {
    domain: tuple(text.partition("[HistoryHere]")[0] + "[HistoryHere]\n" for text in templates)
    for domain, templates in TEMPLATES.items()
}
