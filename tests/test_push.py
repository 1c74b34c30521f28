"""An exported folder is sent to the Hub: here to an endpoint on this machine that speaks for it."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
import tiny_run
import uvicorn
from fastapi import FastAPI, Request
from trainers import ROOT, environment

TOKEN = "hf_of_a_test"


class Endpoint:
    """The calls of the Hub that an upload makes, and what came with them."""

    def __init__(self):
        self.app, self.files, self.made = FastAPI(), {}, {}
        self._objects: dict[str, bytes] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._add()
        port = int(self.address.rpartition(":")[2])
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=port, log_level="error"))
        threading.Thread(target=self._server.run, daemon=True).start()
        started = time.monotonic()
        while not self._server.started:
            assert time.monotonic() - started < 20
            time.sleep(0.05)

    def _add(self) -> None:
        @self.app.post("/api/repos/create")
        async def create(request: Request):
            assert request.headers["authorization"] == f"Bearer {TOKEN}"
            self.made = await request.json()
            return {"url": f"{self.address}/{self.made['organization']}/{self.made['name']}"}

        @self.app.post("/api/validate-yaml")
        def card():
            return {"errors": [], "warnings": []}

        @self.app.post("/api/models/{user}/{name}/preupload/{revision}")
        async def before(request: Request):
            listed = [one["path"] for one in (await request.json())["files"]]
            large = ".safetensors"
            modes = {path: "lfs" if path.endswith(large) else "regular" for path in listed}
            return {
                "files": [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    for path, mode in modes.items()
                ]
            }

        @self.app.post("/{user}/{name}.git/info/lfs/objects/batch")
        async def large(request: Request):
            objects = (await request.json())["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.address}/objects/{one['oid']}"}}
            return {"objects": objects, "transfer": "basic"}

        @self.app.put("/objects/{oid}")
        async def keep(oid: str, request: Request):
            self._objects[oid] = await request.body()
            assert hashlib.sha256(self._objects[oid]).hexdigest() == oid
            return {}

        @self.app.post("/api/models/{user}/{name}/commit/{revision}")
        async def commit(user: str, name: str, request: Request):
            for line in (await request.body()).splitlines():
                one = json.loads(line)
                if one["key"] != "header":
                    self.files[one["value"]["path"]] = one["value"]
            url = f"{self.address}/{user}/{name}/commit/{'1' * 40}"
            return {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}

    def stop(self) -> None:
        self._server.should_exit = True


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.history_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def endpoint():
    found = Endpoint()
    yield found
    found.stop()


def export(run, output, address: str, *flags: str, token: str = TOKEN):
    command = ["-m", "sdpo_jax.export", f"--workdir={run}", "--stage=sft", f"--output={output}"]
    found = environment() | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    found |= {"HF_TOKEN": token, "HF_HOME": str(output.parent / "hub")}
    return subprocess.run(
        [sys.executable, *command, *flags],
        cwd=ROOT,
        env=found,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_folder_is_sent_whole_to_a_private_repository(run, endpoint, tmp_path):
    output = tmp_path / "adapter"
    done = export(run, output, endpoint.address, "--push=someone/taste")
    assert done.returncode == 0, done.stderr
    assert "sent to" in done.stdout and "someone/taste" in done.stdout
    assert "private" in (endpoint.made.get("visibility"), *endpoint.made)
    assert set(endpoint.files) == {p.name for p in output.iterdir()}
    assert {"README.md", "adapter_config.json"} < set(endpoint.files)


def test_nothing_is_sent_without_a_token_and_nothing_written(run, tmp_path):
    for name, token, words in (
        ("a/b/c", TOKEN, "--push: found 'a/b/c', expected user/name"),
        ("taste", TOKEN, "--push: found 'taste', expected user/name"),
        ("someone/taste", "", "--push: found no token"),
    ):
        done = export(run, tmp_path / "out", "http://127.0.0.1:9", f"--push={name}", token=token)
        assert done.returncode == 2 and words in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_leaves_the_folder_and_says_how_to_go_on(run, tmp_path):
    output = tmp_path / "adapter"
    done = export(run, output, "http://127.0.0.1:9", "--push=someone/taste")
    assert done.returncode == 2 and "hf upload someone/taste" in done.stderr
    assert (output / "adapter_model.safetensors").exists()
