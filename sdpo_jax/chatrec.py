"""ChatRec: a chat model recommends without training, as in the paper's Table 1.

    python -m sdpo_jax.chatrec --dataset=runs/movielens/data --workdir=runs/movielens/run \\
        --endpoint=http://localhost:8000/v1 --model=NAME --limit=200

The model reads a window's history and candidates and answers with a title, scored as `greedy` of
sdpo_jax.evaluate. Any endpoint with OpenAI's chat completions works; its key, if it needs one, is
read from the environment variable OPENAI_API_KEY only.

Writes eval/chatrec-greedy.json and, beside it, the predictions as .jsonl. Each answer is saved in
chatrec/answers.jsonl on arrival, and the same request to a model of the same name is never sent
again: the same command resumes after a stop. In the workdir of a training run, the data must be
that run's; `report` then shows ChatRec beside its stages.
"""

import collections
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from sdpo_jax.baselines import chat_client
from sdpo_jax.baselines.chat_answers import Answer, Request, appending, key_of, read_answers
from sdpo_jax.data import prompts, thoughts
from sdpo_jax.data.prepared import SPLITS, Dataset, read_split
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.evaluation import metrics, predictions, results
from sdpo_jax.runs.workdir import run_on
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import parse_json

PARAMETERS = '{"temperature": 0, "max_tokens": 64}'
Prices = tuple[float | None, float | None]
OURS = ("model", "messages", "stream", "n")  # not allowed in --parameters


def chatrec(
    dataset: str | Path,
    workdir: str | Path,
    endpoint: str,
    model: str,
    split: str = "test",
    limit: int = 0,
    requests_per_minute: int = 0,
    parallel: int = 4,
    prices: Prices = (None, None),
    parameters: str = PARAMETERS,
) -> dict[str, Any]:
    """Sends a request for each window without an answer; returns the written summary.

    `prices` are dollars per million tokens in and out, `parameters` a JSON object that is part of
    each request. Raises InputError before anything is written for data that are missing or not
    those of the run in `workdir`, and for an endpoint that does not answer the first request;
    later, with all answers saved, for one that stops answering.
    """
    chat_client.check_url(endpoint)
    given = _parameters(parameters)
    _check(model, prices)
    data = read_split(Path(dataset), split)
    run = run_on(Path(workdir), dataset, data.meta["fingerprint"])
    seed = run.config.seed if run else 0  # of the templates
    rows = evenly_spaced(len(data.splits[split]), limit)
    own = {"model": model} | given
    requests = [own | {"messages": _messages(data, seed, split, row)} for row in rows]
    keys = [key_of(request) for request in requests]
    path = Path(workdir) / "chatrec" / "answers.jsonl"
    wanted = dict(zip(keys, requests, strict=True))
    used, asked = _answers(wanted, path, endpoint, requests_per_minute, parallel, prices)
    answers = {answer["key"]: answer for answer in used}
    made = [
        _prediction(data, split, row, answers[key]) for row, key in zip(rows, keys, strict=True)
    ]
    head = results.header(
        data,
        dataset,
        split,
        stage="chatrec",
        step=0,
        decoder="greedy",
        limit=limit,
        seed=seed,
        # `fsum` is the same in any order: answers arrive and are read back in different ones.
        seconds=math.fsum(answer["seconds"] for answer in used),
    )
    summary = results.summarize("greedy", made) | head | _cost(used, prices)
    summary |= {
        "model": model,
        "endpoint": ", ".join(sorted({answer["endpoint"] for answer in used})),
        "parameters": given,
        "finishes": dict(collections.Counter(answers[key]["finish"] for key in keys)),
        "prompts_fingerprint": prompts.fingerprint(_templates(data)),
    }
    written = results.write_result(Path(workdir) / "eval", summary, made)
    print(results.line(summary, written))
    print(_end(summary, used, asked, prices), path, sep="; ")
    return summary


def _end(summary: dict[str, Any], used: list[Answer], asked: int, prices: Prices) -> str:
    ends = ", ".join(f"{n} {name}" for name, n in summary["finishes"].items())
    spent = _spent(used, prices)
    return f"requests now: {asked}, in total: {len(used)} ({spent}), finish reasons: {ends}"


def _parameters(text: str) -> dict[str, Any]:
    expected = "expected a JSON object without " + ", ".join(OURS)
    try:
        parameters = parse_json(text)
        json.dumps(parameters, allow_nan=False)
    except ValueError as error:
        raise InputError(f"--parameters: found no valid JSON ({error}), {expected}") from error
    if not isinstance(parameters, dict) or set(OURS) & set(parameters):
        raise InputError(f"--parameters: found {brief(parameters)}, {expected}")
    return parameters


def _check(model: str, prices: Prices) -> None:
    if not model or not model.isprintable():
        raise InputError(f"--model: found {brief(model)}, expected a model name at the endpoint")
    for flag, price in zip(("price_in", "price_out"), prices, strict=True):
        if price is not None and not 0 <= price <= 1e9:  # nor NaN
            raise InputError(f"--{flag}: found {price}, expected dollars per million tokens")


def _templates(data: Dataset) -> tuple[str, ...]:
    """The system message, then the templates of the user message."""
    named = "name" if data.domain == "music" else "title"
    line = f"Answer with exactly one {named} of the list you choose from, and nothing else."
    return (line, *prompts.TEMPLATES[data.domain])


def _messages(data: Dataset, seed: int, split: str, row: int) -> list[dict[str, str]]:
    window = data.splits[split][row]
    system, *templates = _templates(data)
    user = prompts.render(
        templates[prompts.template_index(seed, split, row, len(templates))],
        [data.titles[item] for item in window.history],
        [data.titles[item] for item in window.candidates],
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _answers(
    wanted: dict[str, Request],
    path: Path,
    endpoint: str,
    requests_per_minute: int,
    parallel: int,
    prices: Prices,
) -> tuple[list[Answer], int]:
    """The answers to `wanted` (key -> request), and the number of requests sent now."""
    before = read_answers(path)
    used = [before[key] for key in wanted if key in before]
    todo = [request for key, request in wanted.items() if key not in before]
    if todo:
        with chat_client.Endpoint(endpoint, requests_per_minute, answered=bool(used)) as server:
            _ask(server, path, todo, used, parallel, prices)
    return used, len(todo)


def _ask(
    server: chat_client.Endpoint,
    path: Path,
    todo: Sequence[Request],
    used: list[Answer],
    parallel: int,
    prices: Prices,
) -> None:
    """Adds the answers to `todo` to `used` and to the file, each on arrival."""
    started = time.monotonic()
    first = server.ask_first(todo[0])  # before anything is written
    rest = chat_client.ask_all(server.ask, todo[1:], parallel)
    with (
        appending(path, started) as append,
        tqdm(
            total=len(used) + len(todo),
            initial=len(used),
            desc="chatrec",
            unit="window",
            mininterval=1,
        ) as bar,
    ):
        for answer in itertools.chain([first], rest):
            append(answer)
            used.append(answer)
            bar.set_postfix_str(_spent(used, prices), refresh=False)
            bar.update()


def _prediction(data: Dataset, split: str, row: int, answer: Answer) -> predictions.Prediction:
    window = data.splits[split][row]
    titles = [data.titles[item] for item in window.candidates]
    target = window.candidates.index(window.target)
    said = thoughts.after(answer["text"])
    chosen = metrics.recommended(said, titles)
    record = predictions.about(row, window, data.titles)
    return record | predictions.generated(said, chosen, target) | {"finish": answer["finish"]}


def _cost(used: Sequence[Answer], prices: Prices) -> dict[str, Any]:
    """Tokens and dollars of the answers; None if a count or price is missing."""
    kinds = ("tokens_in", "tokens_out")
    counts: list[list[Any]] = [[answer.get(kind) for answer in used] for kind in kinds]
    tokens = [None if None in count else sum(count) for count in counts]
    both = zip(tokens, prices, strict=True)
    paid = [t * price for t, price in both if t is not None and price is not None]
    return {
        **dict(zip(kinds, tokens, strict=True)),
        "price_in": prices[0],
        "price_out": prices[1],
        "cost_dollars": sum(paid) / 1e6 if len(paid) == len(kinds) else None,
    }


def _spent(used: Sequence[Answer], prices: Prices) -> str:
    cost = _cost(used, prices)
    if None in (cost["tokens_in"], cost["tokens_out"]):
        return "tokens not reported"
    dollars = "" if cost["cost_dollars"] is None else f", ${cost['cost_dollars']:.4f}"
    return f"{cost['tokens_in']:,} tokens in, {cost['tokens_out']:,} out{dollars}"


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    try:
        chatrec(
            args.dataset,
            args.workdir,
            args.endpoint,
            args.model,
            args.split,
            args.limit or 0,
            args.requests_per_minute or 0,
            args.parallel,
            (args.price_in, args.price_out),
            args.parameters,
        )
    except KeyboardInterrupt:
        print(f"stopped: the same command resumes from {args.workdir}/chatrec/answers.jsonl")
        sys.exit(130)
    if os.path.lexists(Path(args.workdir) / "config.json"):
        print(f"next: python -m sdpo_jax.report --workdir={args.workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "prepared folder", required=True)
    flags.DEFINE_string("workdir", None, "of a run on these data, or any folder", required=True)
    flags.DEFINE_string("endpoint", None, "http://host:port/v1; key: OPENAI_API_KEY", required=True)
    flags.DEFINE_string("model", None, "model name at the endpoint", required=True)
    flags.DEFINE_enum("split", "test", SPLITS[1:], "windows to evaluate on")
    flags.DEFINE_integer("limit", None, "evenly spaced windows; default: all", lower_bound=1)
    flags.DEFINE_integer("requests_per_minute", None, "maximum; default: no limit", lower_bound=1)
    flags.DEFINE_integer("parallel", 4, "concurrent requests", lower_bound=1, upper_bound=256)
    flags.DEFINE_float("price_in", None, "dollars per million input tokens")
    flags.DEFINE_float("price_out", None, "dollars per million output tokens")
    flags.DEFINE_string("parameters", PARAMETERS, "JSON object, part of each request")
    run_command(main)
