"""An endpoint in this process that answers as a test wants, and what the tests ask it about."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import read_dataset

KEY = "sk-do-not-tell-anyone"


def completion(text: str) -> tuple[int, dict, str]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})


class Server(ThreadingHTTPServer):
    """Answers `reply(user's message)`: status, headers and body; keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent, self.keys, self.times = [], [], []
        self.reply = lambda text: completion("nothing of the list")
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    timeout = 10
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append(body | {"path": self.path})
        self.server.keys.append(self.headers["Authorization"])
        self.server.times.append(time.monotonic())
        status, headers, text = self.server.reply(body["messages"][-1]["content"])
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def windows_of(folder: Path) -> dict[str, tuple[int, str, list[str]]]:
    """Row, target and candidates by the prompt that shows them."""
    data, shown = read_dataset(folder), {}
    for row, window in enumerate(data.splits["test"]):
        templates = prompts.TEMPLATES["movie"]
        template = templates[prompts.template_index(0, "test", row, len(templates))]
        history, candidates = (
            [data.titles[item] for item in items] for items in (window.history, window.candidates)
        )
        text = prompts.render(template, history, candidates)
        shown[text] = row, data.titles[window.target], candidates
    return shown


def told(status: int, text: str, **headers):
    return lambda _: (status, {"Retry-After-Ms": "1"} | headers, text)
