"""Ten minutes of a server's life: good requests checked among wrong, huge, slow and broken ones.

    python tests/load.py --minutes=10

Then SIGTERM while requests are in flight: what was accepted must be answered. Prints what was seen
as JSON; the exit status is 1 where an answer was wrong or missing, or a refusal no clear 4xx.
Where schemathesis is installed, it tests the server by its own OpenAPI description meanwhile.
`make load`.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import servers
import tiny_run
from tiny_run import TITLES

from sdpo_jax.serving.recommender import Recommender
from sdpo_jax.serving.sources import of_workdir

TOLERANCE = 1e-3  # nats: people are computed together or alone, which rounds differently
REFUSED = {400, 401, 404, 405, 411, 413, 422, 429}
HUGE = 100 * 2**20  # bytes
CONNECTIONS = 500
HANGING = 50
SAMPLES = 10  # of the server's memory


class Life:
    """What the threads have seen of one server."""

    def __init__(self, address: str, expected: dict[tuple[int, ...], list[tuple[str, float]]]):
        self.address, self.expected = address, expected
        self.port = int(address.rpartition(":")[2])
        self.seconds: list[float] = []
        self.counts: collections.Counter = collections.Counter()
        self.faults: list[str] = []
        self.over = threading.Event()

    def good(self, rng: random.Random, client: httpx.Client) -> None:
        """One request whose answer is known."""
        history = rng.choice(list(self.expected))
        started = time.perf_counter()
        answer = client.post("/recommend", json={"history": list(history), "k": 5})
        self.seconds.append(time.perf_counter() - started)
        self.counts[f"good {answer.status_code}"] += 1
        if answer.status_code in (429, 503):  # told to come again
            if "retry-after" not in answer.headers and answer.status_code == 429:
                self.faults.append("429 without Retry-After")
            time.sleep(0.2)
        elif answer.status_code != 200:
            self.faults.append(f"{answer.status_code} for {history}: {answer.text[:200]}")
        else:
            self._compare(history, answer.json()["items"])

    def _compare(self, history: tuple[int, ...], items: list[dict[str, Any]]) -> None:
        expected = self.expected[history]
        found = [(one["title"], one["score"]) for one in items]
        titles = [sorted(title for title, _ in listed) for listed in (found, expected)]
        scores = zip(found, expected, strict=False)
        near = all(abs(a - b) < TOLERANCE for (_, a), (_, b) in scores)
        if titles[0] != titles[1] or not near:
            self.faults.append(f"wrong answer for {history}: {found}, expected {expected}")

    def wrong(self, rng: random.Random, client: httpx.Client) -> None:
        """One request that must be refused with a 4xx that says why."""
        content = json.dumps(broken(rng)).encode()
        if rng.random() < 0.3:  # no JSON any more
            place = rng.randrange(len(content))
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 2 :]
        path = rng.choice(("/recommend", "/recommend", "/score", "/why"))
        headers = {"Content-Type": "application/json"}
        answer = client.post(path, content=content, headers=headers)
        self.counts[f"wrong {answer.status_code}"] += 1
        if answer.status_code not in REFUSED | {200} or not answer.content:
            self.faults.append(f"{answer.status_code} for {path} {content[:100]!r}")

    def huge(self, rng: random.Random, client: httpx.Client) -> None:
        """A body of 100 MB, announced or in pieces without a length."""
        head = "POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        announced = rng.random() < 0.5
        length = f"Content-Length: {HUGE}" if announced else "Transfer-Encoding: chunked"
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n".encode())
            piece = b"x" * 2**16 if announced else b"10000\r\n" + b"x" * 2**16 + b"\r\n"
            sent = 0
            try:
                while sent < HUGE and not self.over.is_set():
                    connection.sendall(piece)
                    sent += 2**16
                answer = connection.recv(4096)
            except TimeoutError:
                self.faults.append(f"huge body, {length}: no answer in 30 seconds")
                return
            except OSError:  # the server has closed the connection
                answer = b""
        status = answer.split(b" ")[1].decode() if answer else "closed"
        self.counts[f"huge {status}"] += 1
        if answer and int(status) not in (411, 413):
            self.faults.append(f"huge body: {answer[:100]!r}")
        time.sleep(1)

    def hanging(self, rng: random.Random, client: httpx.Client) -> None:
        """Connections that send half a request and then nothing, for ten seconds."""
        found = []
        for _ in range(HANGING):
            try:
                found.append(socket.create_connection(("127.0.0.1", self.port), timeout=5))
                found[-1].sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Le")
            except OSError:
                break
        self.counts["hanging"] += len(found)
        self.over.wait(10)
        for connection in found:
            connection.close()

    def many(self, rng: random.Random, client: httpx.Client) -> None:
        """500 connections at once, each with one request."""

        def one(_) -> str:
            try:
                body = {"history": [rng.randrange(len(TITLES))], "k": 3}
                return str(
                    httpx.post(f"{self.address}/recommend", json=body, timeout=60).status_code
                )
            except httpx.HTTPError as error:
                return type(error).__name__

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = collections.Counter(pool.map(one, range(CONNECTIONS)))
        for status, count in found.items():
            self.counts[f"many {status}"] += count
            if status not in ("200", "429", "503"):
                self.faults.append(f"{count} of {CONNECTIONS} connections: {status}")
        self.over.wait(15)

    def repeat(self, act: Callable[[random.Random, httpx.Client], None], seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self.over.is_set():
                try:
                    act(rng, client)
                except Exception as error:  # whatever it is, the others go on
                    self.faults.append(f"{act.__name__}: {error!r}")
                    time.sleep(1)


def broken(rng: random.Random) -> Any:
    """A question with something wrong in it, mostly."""
    odd = [
        None,
        -1,
        2**70,
        1e308,
        "",
        "x" * 600,
        [],
        {},
        True,
        "heat\x00",
        "\ud800",
        ["heat"] * 1001,
    ]
    question: dict[str, Any] = {"history": ["heat", 1], "k": 3}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(("history", "k", "items", "where", "stage", "exclude_seen", "extra"))
        question[name] = rng.choice(odd)
    return rng.choice((question, question, question, rng.choice(odd)))


def memory(process: subprocess.Popen) -> int:
    """Resident bytes."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def stop_in_flight(life: Life, process: subprocess.Popen) -> dict[str, int]:
    """SIGTERM while requests wait; counts their answers."""

    def one(_) -> str:
        try:
            body = {"history": [1, 2], "k": 3}
            return str(httpx.post(f"{life.address}/recommend", json=body, timeout=60).status_code)
        except httpx.ConnectError:
            return "not accepted"
        except httpx.HTTPError as error:
            return type(error).__name__

    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(one, n) for n in range(40)]
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        found = collections.Counter(future.result() for future in asked)
    if lost := set(found) - {"200", "429", "not accepted"}:
        life.faults.append(f"after SIGTERM: {lost}")
    process.wait(60)
    return dict(found)


def fuzz(address: str, minutes: float, folder: Path) -> str:
    """The last lines of schemathesis; "" where it is not installed."""
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if not command:
        return ""
    checks = "not_a_server_error,response_schema_conformance,status_code_conformance"
    done = subprocess.run(
        [
            *(command, "run", f"{address}/openapi.json", f"--checks={checks}"),
            *(f"--max-time={int(60 * minutes)}", "--workers=2", "--no-color"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * minutes + 120,
        cwd=folder,
    )
    return f"exit {done.returncode}\n" + "\n".join(done.stdout.strip().splitlines()[-40:])


def live(run: Path, minutes: float) -> tuple[dict[str, Any], list[str]]:
    """Serves the run, makes its life hard, and returns what was seen and the faults."""
    recommender = Recommender(of_workdir(run, ()))
    rng = random.Random(0)
    histories = {tuple(rng.sample(range(len(TITLES)), rng.randint(1, 4))) for _ in range(60)}
    expected = {history: recommender.recommend(list(history), k=5) for history in histories}
    with servers.served(run) as (address, process):
        life = Life(address, expected)
        acts = [life.good, life.good, life.good, life.wrong, life.huge, life.hanging, life.many]
        with ThreadPoolExecutor(len(acts) + 1) as pool:
            for seed, act in enumerate(acts):
                pool.submit(life.repeat, act, seed)
            fuzzing = pool.submit(fuzz, address, 0.7 * minutes, run.parent)
            sizes = []
            for _ in range(SAMPLES):
                time.sleep(60 * minutes / SAMPLES)
                sizes.append(memory(process))
            life.over.set()
        stopped = stop_in_flight(life, process)
        if process.returncode not in (0, -signal.SIGTERM):
            life.faults.append(f"exit status {process.returncode}")
    if fuzzing.result() and not fuzzing.result().startswith("exit 0"):
        life.faults.append("schemathesis has found a fault")
    ordered = sorted(life.seconds)
    seen = {
        "answers": dict(sorted(life.counts.items())),
        "p50_seconds": round(ordered[len(ordered) // 2], 3),
        "p99_seconds": round(ordered[int(0.99 * len(ordered))], 3),
        "memory_mib": [round(size / 2**20) for size in sizes],
        "after_sigterm": stopped,
        "schemathesis": fuzzing.result(),
    }
    return seen, life.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        seen, faults = live(tiny_run.history_run(Path(folder)), minutes)
    print(json.dumps(seen | {"faults": faults[:20]}, indent=2))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
