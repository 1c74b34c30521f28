"""A client of chat models behind an OpenAI-compatible endpoint, which also reads their answers."""

import collections
import contextlib
import json
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from sdpo_jax.baselines.chat_answers import Answer, Request, key_of
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import COUNT

# After 0.5, 1, 2, 4, 8, 8, … seconds, or the server's Retry-After up to two minutes: in total more
# than the minute over which most servers count requests.
RETRIES = 12
TIMEOUT = 300.0  # seconds for one answer: a large model on a small machine reads slowly
UNFIT = (400, 413, 422)  # statuses of a request that the server does not take
REFUSED = (401, 403, 404)  # statuses of a wrong key, model or path
# How servers say that they refuse a window's content, not the request's form.
_FILTERED = re.compile(
    r"content.?(filter|management policy|policy)|moderation"
    r"|(input|prompt|content|request|response)\b.{0,40}\bflagged",
    re.IGNORECASE,
)


class Busy(InputError):
    """The server cannot answer now."""


class _Passing(Busy):
    """`Busy` inside a 200, which the openai client does not retry; `after`: seconds to wait."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class Endpoint:
    """Client of one model server, closed at the end of its context; `ask` is thread-safe.

    The openai client retries temporary failures (status 408, 409, 429, 5xx, a broken connection).
    Every request sent counts towards `requests_per_minute` (0: no limit), retries too. The key is
    read from OPENAI_API_KEY and appears in no message. A window that the server filters or answers
    with nothing has an empty answer, and `finish` gives the reason. So has a window refused
    otherwise, such as too long a prompt, once another was answered (`answered`: by an earlier run).

    Raises InputError for an invalid key, and without the package openai.
    """

    def __init__(self, url: str, requests_per_minute: int = 0, answered: bool = False):
        self._url, self._key, self._answered = url, _key(), answered
        try:
            import openai
        except ImportError as error:
            raise InputError(
                f"the package openai is missing ({error}): pip install 'sdpo_jax[chat]'"
            ) from error
        self._openai = openai
        try:
            http = openai.DefaultHttpxClient(event_hooks={"request": [Pace(requests_per_minute)]})
            self._client = openai.OpenAI(
                base_url=url, api_key=self._key or "none", timeout=TIMEOUT, http_client=http
            )
        except Exception as error:  # an invalid host name or proxy setting
            raise InputError(
                f"--endpoint: found {self._plain(error)}, expected http://host:port/v1"
            ) from error

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask_first(self, request: Request) -> Answer:
        """`ask`, but an unreachable server raises InputError at once."""
        try:
            return self.ask(request, retries=0)
        except Busy:
            return self.ask(request)

    def ask(self, request: Request, retries: int = RETRIES) -> Answer:
        """The answer, without `seconds`. Raises InputError where there is none."""
        for again in range(retries):
            try:
                return self._ask_once(request, retries)
            except _Passing as error:
                time.sleep(min(0.5 * 2**again, 8) if error.after is None else error.after)
        return self._ask_once(request, retries)

    def _ask_once(self, request: Request, retries: int) -> Answer:
        client = self._client.with_options(max_retries=retries)
        extra = {key: request[key] for key in request if key not in ("model", "messages")}
        try:
            # Raw, as the client accepts JSON of any shape.
            response = client.chat.completions.with_raw_response.create(
                model=request["model"], messages=request["messages"], extra_body=extra
            )
        except self._openai.APIStatusError as error:
            if finish := self._unfit(error.status_code, error.body):
                return self._answer(request, {"text": "", "finish": finish})
            raise self._refused(error) from error
        except self._openai.OpenAIError as error:
            raise InputError(
                f"{self._url}: found no answer ({self._plain(error.__cause__ or error)}), expected "
                "an OpenAI-compatible server: start it or correct --endpoint, then run this again"
            ) from error
        answer = self._answer(request, self._parse(response.http_response))
        self._answered = True
        return answer

    def _unfit(self, status: object, fault: object) -> str:
        """The `finish` of a window that the server refuses; "" for another fault."""
        if status in (None, *UNFIT, 403):
            parts = fault.values() if isinstance(fault, dict) else [fault]
            if any(isinstance(part, str) and _FILTERED.search(part) for part in parts):
                return "filtered"
        return "refused" if self._answered and status in UNFIT else ""

    def _answer(self, request: Request, said: Answer) -> Answer:
        return {"key": key_of(request), "endpoint": self._url} | said

    def _refused(self, error: Any) -> InputError:
        status = error.status_code
        message = error.body.get("message") if isinstance(error.body, dict) else None
        found = f"found status {status} ({self._plain(message or error.response.text)}), expected"
        if status in (401, 403):
            advice = "a key that it accepts: correct" if self._key else "a key: set"
            return InputError(f"{self._url}: {found} {advice} OPENAI_API_KEY")
        if status == 404:
            return InputError(
                f"{self._url}: {found} /chat/completions and the model there: correct --endpoint "
                f"or --model ({self._url.rstrip('/')}/models lists the models)"
            )
        if status in (408, 409, 429) or status >= 500:
            wait = error.response.headers.get("retry-after")
            later = f"in {self._plain(wait)} seconds, as it says" if wait else "later"
            return Busy(
                f"{self._url}: {found} an answer: lower --parallel or --requests_per_minute and "
                f"run this again {later}; earlier answers are saved"
            )
        return InputError(f"{self._url}: {found} an answer: check --model and --parameters")

    def _parse(self, response: Any) -> Answer:
        """Text, `finish` and token counts of a response of status 200.

        Raises _Passing for a temporary fault, InputError for a wrong key, model or endpoint.
        """
        try:
            body = json.loads(response.text)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise self._unreadable(response)
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        choice = choice if isinstance(choice, dict) else {}
        fault = body.get("error") or choice.get("error")
        if fault or choice.get("finish_reason") == "error":
            return self._fault(response, fault or choice)
        if "message" not in choice and {"text", "delta"} & {*choice}:
            raise self._no_completion(response.text)  # another path than /chat/completions
        if not isinstance(choices, list) and body.get("object") != "chat.completion":
            raise self._unreadable(response)
        message = choice.get("message")
        said = _text_of(message.get("content") if isinstance(message, dict) else None)
        texts = {"text": said, "finish": str(choice.get("finish_reason", "no answer"))}
        # Half of a surrogate pair cannot be written as UTF-8.
        answer = {k: text.encode("utf-8", "replace").decode() for k, text in texts.items()}
        usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
        tokens = {"tokens_in": "prompt_tokens", "tokens_out": "completion_tokens"}
        return answer | {k: usage[v] for k, v in tokens.items() if COUNT.right(usage.get(v))}

    def _fault(self, response: Any, fault: object) -> Answer:
        """The answer of a refused window, from an error inside a 200.

        Raises _Passing for a temporary error, InputError for a wrong key, model or request.
        """
        code = fault.get("code", fault.get("status")) if isinstance(fault, dict) else None
        code = int(code) if isinstance(code, str) and code.isdecimal() else code
        text = json.dumps(fault, ensure_ascii=False)
        if finish := self._unfit(code if isinstance(code, int) else None, fault):
            return {"text": "", "finish": finish}
        if code in (*REFUSED, *UNFIT) or re.search(r"api.?key|model.?not.?found", text, re.I):
            raise InputError(
                f"{self._url}: found an error ({self._plain(text)}), expected an answer: check "
                "OPENAI_API_KEY, --model and --parameters"
            )
        raise self._passing(response, text)

    def _passing(self, response: Any, text: str) -> _Passing:
        wait = None
        for name, seconds in (("retry-after", 1.0), ("retry-after-ms", 1e-3)):
            with contextlib.suppress(KeyError, ValueError):
                wait = min(max(float(response.headers[name]) * seconds, 0.0), 120.0)
        return _Passing(
            f"{self._url}: found an error in place of an answer ({self._plain(text)}), expected a "
            "chat completion: run this again later; earlier answers are saved",
            wait,
        )

    def _unreadable(self, response: Any) -> InputError:
        """Temporary if another window was answered, as of a gateway under maintenance."""
        if self._answered:
            return self._passing(response, response.text)
        return self._no_completion(response.text)

    def _no_completion(self, text: str) -> InputError:
        return InputError(
            f"{self._url}: found {self._plain(text)}, expected a chat completion: correct "
            "--endpoint"
        )

    def _plain(self, text: object) -> str:
        """One short line without the key: servers repeat what they were sent."""
        text = " ".join(str(text).split()) or "nothing"
        text = text.replace(self._key, "[key]") if self._key else text
        return text if len(text) <= 200 else text[:200] + "…"


def _text_of(content: object) -> str:
    """A message's text, which may come in parts; parts with reasoning are left out."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        kinds = (None, "text", "output_text")
        said = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") in kinds]
        return "".join(text for text in said if isinstance(text, str))
    return content if isinstance(content, str) else ""  # null: refused, or cut while reasoning


class Pace:
    """Rate limiter: each call waits for its turn, `per_minute` turns per minute (0: no limit)."""

    def __init__(self, per_minute: int = 0):
        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock, self._free = threading.Lock(), 0.0

    def __call__(self, _request: object) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._free)
            self._free = turn + self._gap
        time.sleep(turn - now)


def ask_all(
    ask: Callable[[Request], Answer], requests: Iterable[Request], parallel: int
) -> Iterator[Answer]:
    """Yields answers in order of arrival, from `parallel` threads; runs in the main thread.

    After an error or Ctrl-C no new request is sent, but answers under way, which have to be paid
    for, are yielded before either is raised. A second Ctrl-C stops at once.
    """
    todo, done = collections.deque(requests), queue.SimpleQueue()
    for _ in range(parallel):
        # A daemon, as a second Ctrl-C must not wait for it.
        threading.Thread(target=_work, args=(ask, todo, done), daemon=True).start()
    errors = []
    with _interruptible(todo) as interrupted:
        for _ in range(parallel):
            for answer in iter(done.get, None):
                if isinstance(answer, Exception):
                    errors.append(answer)
                else:
                    yield answer
    if errors:
        raise errors[0]
    if interrupted:
        raise KeyboardInterrupt


def _work(ask: Callable, todo: collections.deque, done: queue.SimpleQueue) -> None:
    def take() -> Request | None:
        with contextlib.suppress(IndexError):
            return todo.popleft()

    try:
        for request in iter(take, None):
            done.put(ask(request))
    except Exception as error:  # `ask_all` raises it
        todo.clear()
        done.put(error)
    done.put(None)


@contextlib.contextmanager
def _interruptible(todo: collections.deque) -> Iterator[list[int]]:
    """The first Ctrl-C empties `todo` and is added to the list; the second interrupts as usual."""
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        todo.clear()
        signal.signal(signal.SIGINT, before)
        print("\nstopping after the answers under way; Ctrl-C again stops at once", flush=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def check_url(url: str) -> None:
    """Raises InputError for an invalid URL and for one with more than host and path."""
    expected = "expected http://host:port/v1"
    try:
        parts = urlsplit(url)
        # A port out of range and an invalid host name raise ValueError.
        host = (parts.hostname or "").encode("idna")
        valid = parts.scheme in ("http", "https") and host and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isprintable() or " " in url:
        raise InputError(f"--endpoint: found {url!r}, {expected}")
    if parts.username or parts.password or parts.query or parts.fragment:
        # The URL is written into the results, a key must not be.
        raise InputError(
            f"--endpoint: found more than host and path, {expected}: a key goes into the "
            "environment variable OPENAI_API_KEY"
        )


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            "OPENAI_API_KEY: found characters that no key has, expected printable ASCII: set it "
            "again"
        )
    return key
