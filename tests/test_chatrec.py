"""ChatRec against an endpoint in this process: what it sends, keeps, writes and tells."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_run
from chat_endpoint import KEY, completion, told, windows_of

from sdpo_jax.baselines import chat_answers
from sdpo_jax.report import report
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


def test_known_answers_give_known_metrics(server, ask, dataset_folder, tmp_path, capfd):
    windows = windows_of(dataset_folder)

    def reply(text):
        row, target, candidates = windows[text]
        other = next(title for title in candidates if title != target)
        said = [f"It is {target}."] * 3 + [other] * 2 + [f"{target} or {other}"]
        return completion(said[row] if row < 6 else "no idea")

    server.reply = reply
    summary = ask(prices=(2.0, 30.0))
    assert summary["hit_ratio_at_1"] == 3 / 12 and summary["valid_ratio"] == 5 / 12
    assert summary["n"] == 12 and summary["candidates"] == 20 and summary["protocol"] == "tiny"
    assert (summary["tokens_in"], summary["tokens_out"]) == (1200, 120)
    assert summary["cost_dollars"] == pytest.approx(1200 * 2e-6 + 120 * 30e-6)
    assert summary["model"] == "m" and summary["seed"] == 0 and summary["seconds"] > 0
    files = tmp_path / "new" / "eval" / "chatrec-greedy.json"
    assert json.loads(files.read_text()) == summary
    lines = [*map(json.loads, files.with_suffix(".jsonl").read_text().splitlines())]
    assert [line["row"] for line in lines] == [*range(12)]
    assert [line["hit"] for line in lines] == 3 * [True] + 9 * [False]
    assert [line["valid"] for line in lines] == 5 * [True] + 7 * [False]
    out, err = capfd.readouterr()
    assert "chatrec step 0, greedy, test: HR@1 0.2500 [" in out and "requests now: 12" in out
    assert "12/12" in err and "tokens in, 120 out, $0.0060" in err  # beside the bar


def test_a_request_holds_two_messages_and_the_parameters(server, ask):
    ask(limit=3)
    for sent in server.sent:
        assert sent["path"] == "/v1/chat/completions" and sent["model"] == "m"
        assert sent["temperature"] == 0 and sent["max_tokens"] == 64
        assert [message["role"] for message in sent["messages"]] == ["system", "user"]
        assert "exactly one title" in sent["messages"][0]["content"]
    server.sent.clear()
    ask(limit=2, parameters='{"max_completion_tokens": 9}')
    assert server.sent[0]["max_completion_tokens"] == 9 and "temperature" not in server.sent[0]


def test_the_key_goes_to_the_endpoint_and_nowhere_else(server, ask, tmp_path, capfd, monkeypatch):
    ask(limit=2)
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.reply = lambda text: (401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}}))
    with pytest.raises(InputError, match=r"status 401 \(wrong key \[key\]\)") as error:
        ask(limit=3)
    assert KEY not in str(error.value) + "".join(capfd.readouterr())
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="expected a key: set OPENAI_API_KEY"):
        ask(limit=3)


def test_what_was_answered_is_never_asked_again(server, ask):
    first = ask(limit=5)
    assert len(server.sent) == 5
    assert ask(limit=5) == first and len(server.sent) == 5
    assert ask(limit=5, endpoint="http://127.0.0.1:9/v1")["endpoint"] == server.url
    with pytest.raises(InputError, match="more than host and path"):
        ask(limit=5, endpoint="http://x/v1?key=secret")
    assert ask()["n"] == 12 and len(server.sent) == 12  # what is missing
    ask(limit=5, model="other")
    assert len(server.sent) == 17


def test_a_kill_in_the_middle_of_a_line_loses_that_answer_alone(server, ask, tmp_path):
    whole = ask(limit=5)
    path = tmp_path / "new" / "chatrec" / "answers.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-20])
    again = ask(limit=5)
    assert len(server.sent) == 6 and again | {"seconds": 0} == whole | {"seconds": 0}
    assert path.read_bytes().startswith(text[: text.rstrip(b"\n").rfind(b"\n") + 1])
    assert len(chat_answers.read_answers(path)) == 5


def test_a_server_that_is_busy_is_asked_again_at_the_pace(server, ask):
    refusals = iter([429, 429, 503])

    def reply(text):
        status = next(refusals, 200)
        busy = status, {"Retry-After-Ms": "1"}, json.dumps({"error": {"message": "slowly"}})
        return completion("a0") if status == 200 else busy

    server.reply = reply
    assert ask(limit=4, requests_per_minute=1200)["n"] == 4
    assert len(server.times) == 7
    assert server.times[-1] - server.times[0] >= 0.95 * 6 * 60 / 1200


def test_a_window_that_is_refused_is_invalid_and_stops_nothing(server, ask, dataset_folder, capfd):
    """As by a content filter, or for a prompt beyond the context."""
    refused = list(windows_of(dataset_folder))[3]

    def reply(text):
        return (
            (400, {}, '{"error": {"message": "filtered"}}') if text == refused else completion("")
        )

    server.reply = reply
    summary = ask()
    assert summary["n"] == 12 and summary["finishes"] == {"stop": 11, "refused": 1}
    assert "finish reasons: 11 stop, 1 refused" in capfd.readouterr().out
    assert ask() == summary and len(server.sent) == 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(endpoint="http://127.0.0.1:9/v1"), "127.0.0.1:9/v1: found no answer .*refused"),
        (dict(endpoint="localhost:8000"), "--endpoint: found 'localhost:8000'"),
        (dict(endpoint="http://x:99999/v1"), "--endpoint: found 'http://x:99999/v1'"),
        (dict(endpoint="http://me:secret@x/v1"), "--endpoint: found more than host and path"),
        (dict(endpoint="http://a..b/v1"), "--endpoint: found .*expected http://host:port/v1"),
        (dict(model=""), "--model: found ''"),
        (dict(model="\udcff"), "--model: found"),
        (dict(prices=(float("nan"), 1.0)), "--price_in: found nan"),
        (dict(parameters="{"), "--parameters: found no valid JSON"),
        (dict(parameters='{"n": 2}'), "--parameters: found {'n': 2}"),
        (dict(parameters='{"x": NaN}'), "--parameters: found no valid JSON"),
        (dict(split="test_all"), "--split: found test_all, expected one that .* has: .*test"),
        (dict(dataset="nowhere"), "nowhere/dataset.json: found No such file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_written(
    server, ask, tmp_path, arguments, message
):
    with pytest.raises(InputError, match=message) as error:
        ask(**arguments)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert not (tmp_path / "new").exists() and not server.sent


def test_without_the_package_or_with_a_key_that_is_none(server, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(InputError, match="OPENAI_API_KEY: found characters that no key has"):
        ask()
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'sdpo_jax\[chat\]'"):
        ask()
    assert not (tmp_path / "new").exists()


def test_answers_before_an_error_are_kept(server, ask, tmp_path):
    def reply(text):
        return completion("a0") if len(server.sent) < 6 else told(403, "")(text)

    server.reply = reply
    with pytest.raises(InputError, match="403"):
        ask(parallel=2)
    kept = len(chat_answers.read_answers(tmp_path / "new" / "chatrec" / "answers.jsonl"))
    assert kept == 5 and not (tmp_path / "new" / "eval").exists()
    server.reply = lambda text: completion("a0")
    sent = len(server.sent)
    assert ask()["n"] == 12 and len(server.sent) - sent == 12 - kept


def test_a_file_of_answers_that_is_damaged_or_in_use_is_one_line(ask, tmp_path):
    ask(limit=2)
    path = tmp_path / "new" / "chatrec" / "answers.jsonl"
    with (
        chat_answers.appending(path, 0.0),
        pytest.raises(InputError, match="another process is writing"),
    ):
        ask()
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(InputError, match=r"answers.jsonl:1: key: found nothing, .* remove this"):
        ask()
    path.write_text("x\n")
    with pytest.raises(InputError, match=r"answers.jsonl:1: found no valid JSON"):
        ask()


def test_beside_a_run_it_is_in_the_report_and_on_the_same_data(server, ask, tmp_path):
    run = tiny_run.make_run(tmp_path / "tiny")
    with pytest.raises(InputError, match="put back the dataset that the run was trained with"):
        ask(run)
    assert not server.sent and not (run / "chatrec").exists()
    summary = ask(run, run.parent / "data", limit=5)
    lines = (run / "eval" / "chatrec-greedy.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 2, 5, 8, 10]
    assert summary["seed"] == 0 and "ChatRec" in report(run)


def command(server, dataset_folder, workdir, *more) -> list[str]:
    return [
        sys.executable,
        "-W",
        "error",
        "-m",
        "sdpo_jax.chatrec",
        f"--dataset={dataset_folder}",
        f"--workdir={workdir}",
        f"--endpoint={server.url}",
        "--model=m",
        *more,
    ]


def test_ctrl_c_keeps_what_is_under_way_and_the_command_goes_on(
    server, ask, dataset_folder, tmp_path
):
    many, gate = threading.Event(), threading.Event()

    def reply(text):
        if len(server.sent) > 4:  # the fifth and sixth wait
            many.set()
            assert gate.wait(30)
        return completion("a0")

    server.reply = reply
    code = command(server, dataset_folder, tmp_path / "run", "--parallel=2")
    with subprocess.Popen(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert many.wait(60)
        os.kill(process.pid, signal.SIGINT)
        assert "answers under way" in process.stdout.readline() + process.stdout.readline()
        gate.set()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "the same command resumes" in out and len(server.sent) in (5, 6)
    kept = chat_answers.read_answers(tmp_path / "run" / "chatrec" / "answers.jsonl")
    assert len(kept) == len(server.sent) and not (tmp_path / "run" / "eval").exists()
    server.sent.clear()
    server.reply = lambda text: completion("a0")
    assert ask(tmp_path / "run")["n"] == 12 and len(server.sent) == 12 - len(kept)


def test_an_error_of_the_command_is_one_line_and_status_2(server, dataset_folder, tmp_path):
    server.reply = told(404, "")
    code = command(server, dataset_folder, tmp_path / "run")
    done = subprocess.run(code, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "404" in done.stderr and not (tmp_path / "run").exists()
