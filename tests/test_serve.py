"""The server: answers, refusals, the queue, and the page."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import servers
import tiny_run
import uvicorn
from fastapi.testclient import TestClient

from sdpo_jax.serving import connection, server
from sdpo_jax.serving.batcher import Batcher, Busy
from sdpo_jax.serving.listener import check, check_free, is_loopback
from sdpo_jax.serving.recommender import Recommender
from sdpo_jax.serving.sources import of_workdir
from sdpo_jax.system.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.history_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender(of_workdir(run, ()))


@pytest.fixture(scope="module")
def client(recommender):
    with TestClient(server.make_app(recommender)) as client:
        yield client


def test_recommendations_are_those_of_python_at_every_stage(client, recommender):
    health = client.get("/healthz").json()
    assert health == {"status": "ok", "stages": ["base", "sft"], "stage": "sft", "items": 10}
    for stage in health["stages"]:
        asked = {"history": ["heat", 1], "k": 3, "stage": stage}
        found = client.post("/recommend", json=asked).json()["items"]
        expected = recommender.at_stage(stage).recommend(["heat", 1], k=3)
        assert [(one["title"], one["score"]) for one in found] == expected
    default = client.post("/recommend", json={"history": ["heat"], "k": 2, "items": [4, 5, 0]})
    assert {one["id"] for one in default.json()["items"]} == {4, 5}


def test_other_paths_answer_what_they_say(client, recommender):
    found = client.get("/items", params={"q": "ALIEN", "limit": 5}).json()["items"]
    assert [item["title"] for item in found] == ["alien", "aliens"]
    scores = client.post("/score", json={"prompt": "heat\n", "answers": ["up"]}).json()["scores"]
    assert scores == pytest.approx(recommender.score("heat\n", ["up"]))
    why = client.post("/why", json={"history": ["heat", "up"], "item": "jaws"}).json()["titles"]
    expected = recommender.why(["heat", "up"], "jaws")
    assert {title for title, _ in expected} == {"heat", "up"}
    assert [(one["title"], one["change"]) for one in why] == expected
    assert why[0]["change"] >= why[1]["change"]
    described = client.get("/openapi.json")
    assert "/recommend" in described.json()["paths"]
    assert "prefixItems" not in described.text  # generated clients and checkers misread tuples
    meters = client.get("/metrics").text
    assert 'sdpo_requests_total{path="/items",status="200"} 1.0' in meters


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/recommend", {}, 422, "history"),
        ("/recommend", {"history": []}, 422, "at least 1"),
        ("/recommend", {"history": "heat"}, 422, "list"),
        ("/recommend", {"history": ["haet"]}, 422, "did you mean 'heat'"),
        ("/recommend", {"history": [99]}, 422, "found id 99"),
        ("/recommend", {"history": [True]}, 422, "history"),
        ("/recommend", {"history": [1e300]}, 422, "history"),
        ("/recommend", {"history": ["heat"] * 1001}, 422, "at most 1000"),
        ("/recommend", {"history": ["x" * 501]}, 422, "500"),
        ("/recommend", {"history": ["heat"], "k": 0}, 422, "greater than or equal to 1"),
        ("/recommend", {"history": ["heat"], "k": 101}, 422, "less than or equal to 100"),
        ("/recommend", {"history": ["heat"], "K": 3}, 422, "Extra inputs"),
        ("/recommend", {"history": ["heat"], "stage": "best"}, 422, "expected one of base, sft"),
        ("/recommend", {"history": ["heat"], "where": {"genre": "x"}}, 422, "attribute"),
        ("/recommend", {"history": ["heat"], "items": [77]}, 422, "found 77"),
        ("/why", {"history": ["heat"], "item": 1}, 422, "two or more"),
        ("/score", {"prompt": "x", "answers": []}, 422, "at least 1"),
        ("/nothing", {}, 404, "Not Found"),
        ("/recommend", {"history": ["x" * 400] * 700}, 413, "bytes"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(client, path, body, status, words):
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert words in json.dumps(answer.json())


def test_bodies_without_a_length_or_json_are_refused(client):
    assert client.post("/recommend", content=b"{").status_code == 422
    assert client.post("/recommend", content=iter([b"{}"])).status_code == 411
    assert client.get("/recommend").status_code == 405


def test_a_key_is_asked_for_where_one_is_set(recommender):
    with TestClient(server.make_app(recommender, "secret")) as client:
        asked = {"json": {"history": ["heat"], "k": 1}}
        assert client.post("/recommend", **asked).status_code == 401
        assert client.get("/items", headers={"X-API-Key": b"s\xe9cret"}).status_code == 401
        assert client.post("/recommend", **asked, headers={"X-API-Key": "secret"}).is_success
        assert client.get("/healthz").is_success
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "x")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_queries_that_wait_are_answered_together_and_a_full_queue_refuses():
    calls: list[list[int]] = []

    def slow(key: str, queries: list[int]) -> list[int]:
        calls.append(queries)
        time.sleep(0.05)
        if key == "wrong":
            raise ValueError(key)
        return [query + 1 for query in queries]

    async def ask() -> list:
        batcher = Batcher(slow, at_once=4, places=8)
        batcher.start()
        first = [asyncio.create_task(batcher.ask("a", n)) for n in range(6)]
        wrong = asyncio.create_task(batcher.ask("wrong", 0))
        await asyncio.sleep(0.001)
        more = await asyncio.gather(
            *(batcher.ask("a", n) for n in range(9)), return_exceptions=True
        )
        found = await asyncio.gather(*first, wrong, return_exceptions=True)
        await batcher.stop()
        return [found, more]

    found, more = asyncio.run(ask())
    assert found[:6] == [1, 2, 3, 4, 5, 6] and isinstance(found[6], ValueError)
    assert len(calls[0]) == 4 and max(map(len, calls)) == 4
    assert [type(x) for x in more].count(Busy) > 0


def test_a_stopped_server_answers_what_it_has_accepted(run):
    with servers.served(run) as (base, process):

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=base, timeout=60) as client:
                for _ in range(100):
                    with contextlib.suppress(httpx.ConnectError):
                        await client.get("/healthz")
                        break
                    await asyncio.sleep(0.1)
                # More answers than before, so that a program is compiled while all others wait.
                body = {"prompt": "heat\n", "answers": ["up", "big", "alien"] * 20}
                tasks = [asyncio.create_task(client.post("/score", json=body)) for _ in range(20)]
                await asyncio.sleep(0.7)
                assert not any(task.done() for task in tasks)
                os.kill(process.pid, signal.SIGTERM)
                return await asyncio.gather(*tasks)

        answers = asyncio.run(ask())
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) <= 2  # alone or together: rounding
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_a_wrong_query_spoils_no_other(recommender):
    service = server.Service(recommender)
    found = service._run(("score", "sft"), [("heat\n", ["up"]), ("heat\n", ["\x00"])])
    assert found[0] == pytest.approx(recommender.score("heat\n", ["up"]))
    assert isinstance(found[1], InputError)


def test_an_address_that_is_taken_is_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port}: found .* in use"):
            check_free("127.0.0.1", port)
    with pytest.raises(InputError, match=r"--host=no\.such\.host"):
        check_free("no.such.host", 1)


def test_the_page_needs_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = answer.text
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert "innerHTML" not in text  # titles are text, whatever they contain


@contextlib.asynccontextmanager
async def listening(run: Path) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server in this process, and its port."""
    config = uvicorn.Config(server.make_app(Recommender(of_workdir(run, ()))), port=0)
    config.http = connection.Connection
    config.log_level = "error"
    serving = uvicorn.Server(config)
    task = asyncio.create_task(serving.serve())
    while not serving.started:
        await asyncio.sleep(0.01)
    yield serving, serving.servers[0].sockets[0].getsockname()[1]
    serving.should_exit = True
    await task


def test_a_request_whose_head_does_not_come_is_closed_and_others_are_answered(run, monkeypatch):
    async def ask() -> tuple[bytes, int, float]:
        async with listening(run) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            started = time.monotonic()
            writer.write(b"GET /healthz HTTP/1.1\r\nHo")
            async with httpx.AsyncClient() as client:
                found = await client.get(f"http://127.0.0.1:{port}/healthz")
            rest = await reader.read()
            waited = time.monotonic() - started
            writer.close()
            return rest, found.status_code, waited

    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    rest, status, waited = asyncio.run(ask())
    assert (rest, status) == (b"", 200) and 0.4 < waited < 10


def test_a_request_that_is_on_its_way_when_the_server_ends_is_answered(run, monkeypatch):
    async def ask() -> tuple[bytes, bytes]:
        async with listening(run) as (serving, port):
            on_its_way = await asyncio.open_connection("127.0.0.1", port)
            idle = await asyncio.open_connection("127.0.0.1", port)
            serving.should_exit = True
            while serving.servers[0].is_serving():
                await asyncio.sleep(0.01)
            on_its_way[1].write(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
            found = [await reader.read() for reader, _ in (on_its_way, idle)]
            for _, writer in (on_its_way, idle):
                writer.close()
            return found[0], found[1]

    monkeypatch.setattr(connection, "LAST_SECONDS", 3.0)
    answered, nothing = asyncio.run(ask())
    assert answered.startswith(b"HTTP/1.1 200") and nothing == b""


def test_a_connection_that_waits_to_be_accepted_when_the_server_ends_is_answered(run):
    async def ask() -> bytes:
        async with listening(run) as (serving, port):
            waits = socket.create_connection(("127.0.0.1", port))  # the loop does not run yet
            waits.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            await connection.accept_the_last(serving)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with waits:
                return await asyncio.to_thread(waits.recv, 1000)

    assert asyncio.run(ask()).startswith(b"HTTP/1.1 200")


def test_a_refusal_does_not_repeat_what_is_no_text(client):
    content = b'{"history": ["\\ud800"], "k": "\\ud800"}'
    headers = {"Content-Type": "application/json"}
    answer = client.post("/recommend", content=content, headers=headers)
    assert answer.status_code == 422
    assert all(set(one) == {"loc", "msg", "type"} for one in answer.json()["detail"])
    unknown = client.post("/recommend", json={"history": ["haet"]}).json()["detail"][0]
    assert set(unknown) == {"loc", "msg", "type"}


def test_ctrl_c_ends_the_server_without_a_traceback(run):
    with servers.served(run, stderr=subprocess.PIPE) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_an_open_address_needs_a_key(monkeypatch):
    monkeypatch.delenv("SDPO_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"--host: found 0\.0\.0\.0, which others can reach"):
        check("0.0.0.0", 8000)
