"""The model card of an exported model: its training, data and results."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sdpo_jax.evaluation.results import read_results
from sdpo_jax.models.store import read_meta
from sdpo_jax.reports.markdown import fenced, plain
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.runs.workdir import Run, stage_result
from sdpo_jax.system.hub import is_hub_name, name_and_revision

# Per kind of prompt: what the model does, and how the prompt is filled in.
_ANSWERS = {
    "candidates": "answers with one of the titles in the prompt",
    "history": "continues a history of titles with the next one",
}
_PLACES = {
    "candidates": "Replace the brackets by history and candidates, one title per line. The answer "
    "is a title and EOS.",
    "history": "Replace the brackets by the titles of the history, oldest first, each followed by "
    "a line break. The answer is a title; a line break ends it. Each title and each line break is "
    "tokenized separately, without special tokens. Pass token ids where a tokenizer merges a line "
    "break with the character before it, as those of Llama 3 and Qwen merge `)` with it.",
}


def model_card(run: Run, data: Mapping[str, Any], stage: str, step: int, form: str) -> str:
    """Markdown with the Hub's header; `data`: dataset.json of the run, `form`: peft or merged."""
    c, meta = run.config, read_meta(Path(run.config.model))
    trained = _trained(stage, c.method)
    base, _ = name_and_revision(meta["source"])
    header = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        library_name="peft" if form == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=["recommendation", "S-DPO", "lora"],
    )
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# {plain(data.get('dataset', data['domain']))}: {trained}",
        f"A {plain(meta['family'])} model of {meta['parameters']:,} parameters that "
        f"{_ANSWERS[c.prompt]}. Its base: {plain(meta['source'])}.",
        "## Training",
        _table(
            ("stage", f"{trained}, step {step}{_examples(run, stage)}"),
            ("negatives, beta", _negatives(c) if stage == "sdpo" else "–"),
            ("started from", _start(c)),
            ("trained", _trained_weights(c)),
            ("global batch", c.batch_size),
            ("dtype of products, base", f"{c.dtype}, {c.base_dtype}"),
            ("seed", c.seed),
        ),
        "## Prompt",
        f"{_PLACES[c.prompt]}{_one_of(len(run.templates))}",
        fenced(run.templates[0]),
        "## Data",
        _table(
            ("domain", data["domain"]),
            ("protocol", data.get("protocol", "–")),
            ("candidates", data.get("candidates", "–")),
            ("fingerprint", run.fingerprints["dataset"]),
        ),
        "## Evaluation",
        _results(run, stage, step),
    ]
    return "\n\n".join(lines) + "\n"


def _negatives(config: RunConfig) -> str:
    redrawn = ", redrawn in each epoch" if config.redraw else ""
    return f"{config.num_negatives} {config.negatives}{redrawn}, {config.beta}"


def _start(config: RunConfig) -> str:
    if config.tune == "full":
        return "the base's weights"
    return config.lora.init_from or "a fresh adapter"


def _trained_weights(config: RunConfig) -> str:
    lora = config.lora
    if config.tune == "full":
        return "all weights"
    return f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}"


def _trained(stage: str, method: str) -> str:
    if stage == "base":
        return "the base model, not trained here"
    name = "S-DPO (softmax DPO, arXiv 2406.09215)" if method == "S-DPO" else method
    return f"{'SFT' if stage == 'sft' else name} with sdpo_jax"


def _one_of(count: int) -> str:
    return f" This is the first of {count} wordings, drawn per example." if count > 1 else ""


def _table(*rows: tuple[str, object]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {plain(value)} |" for name, value in rows)]
    )


def _examples(run: Run, stage: str) -> str:
    result = stage_result(run.path, stage)
    return f" of {result['steps']}, {result['examples']:,} examples" if result else ""


def _results(run: Run, stage: str, step: int) -> str:
    found = [
        summary
        for summary in read_results(run.path / "eval")
        if (summary["stage"], summary["step"]) == (stage, step)
    ]
    if not found:
        return "Not evaluated."
    lines = [
        "| split | ranked | decoder | HR@1 [95%] | HR@10 | NDCG@10 | valid | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary in found:
        low, high = summary.get("hit_ratio_at_1_ci95", (math.nan, math.nan))
        ranking = (
            f"{summary[key]:.4f}" if key in summary else "–"
            for key in ("hit_ratio_at_10", "ndcg_at_10")
        )
        lines.append(
            f"| {summary['split']} | {summary['rank']} | {summary['decoder']} | "
            f"{summary['hit_ratio_at_1']:.4f} [{low:.4f}, {high:.4f}] | {' | '.join(ranking)} | "
            f"{summary.get('valid_ratio', math.nan):.4f} | {summary['n']} |"
        )
    if any(summary["rank"] == "disliked" for summary in found):
        lines += ["", "`disliked`: the target against an item its user rated low; HR@1 is the AUC."]
    return "\n".join(lines)
