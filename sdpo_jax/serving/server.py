"""Recommendations over HTTP, and a page to try them.

Every request is checked before it is queued. Nothing of a request reaches the file system, a format
string or a log. The model runs in one thread (`sdpo_jax.serving.batcher`).
"""

import asyncio
import contextlib
import hmac
import importlib.metadata
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from sdpo_jax.serving.batcher import Batcher, Busy
from sdpo_jax.serving.recommender import Recommended, Recommender
from sdpo_jax.system.errors import InputError

PAGE = Path(__file__).with_name("page.html")
BODY = 256 * 1024  # most bytes of a request
TITLE = 500  # most characters of a title
SHOWN = 1000  # most titles of a history, of which the model reads the latest
MOST = 100  # items of an answer
PLACES = 256  # requests that may wait
SECONDS = 30.0  # after which a request is given up

Title = Annotated[str, Field(min_length=1, max_length=TITLE)]
Item = Annotated[int, Field(ge=-(2**53), le=2**53)] | Title
History = Annotated[list[Item], Field(min_length=1, max_length=SHOWN)]


class Question(BaseModel):
    """Unknown keys are refused, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    history: History
    stage: Annotated[str, Field(max_length=20)] | None = None


class RecommendQuestion(Question):
    k: Annotated[int, Field(ge=1, le=MOST)] = 10
    exclude_seen: bool = True
    items: Annotated[list[int], Field(max_length=100_000)] | None = None
    where: dict[str, Title | list[Title]] | None = None
    fuzzy: bool = False


class WhyQuestion(Question):
    item: Item


class ScoreQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    answers: Annotated[list[Title], Field(min_length=1, max_length=MOST)]
    stage: Annotated[str, Field(max_length=20)] | None = None


class RecommendedItem(BaseModel):
    id: int
    title: str
    score: float


class Recommendations(BaseModel):
    items: list[RecommendedItem]


class Reason(BaseModel):
    title: str
    change: float


class Reasons(BaseModel):
    titles: list[Reason]


class Meters:
    """What /metrics shows."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sdpo_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "sdpo_request_seconds", "Seconds per request.", ["path"], registry=self.registry
        )
        self.waiting = Gauge("sdpo_waiting", "Requests in the queue.", registry=self.registry)


class Service:
    """A recommender behind a queue."""

    def __init__(self, recommender: Recommender):
        stages = list(recommender.source.adapters)
        self.stages = {stage: recommender.at_stage(stage) for stage in stages}
        self.default = recommender.stage
        self.index = recommender.index
        self.batcher = Batcher(self._run, recommender.at_once, PLACES)

    def at(self, stage: str | None) -> Recommender:
        """Raises InputError for an unknown stage."""
        known = self.stages[self.default]
        return known if stage is None else self.stages[known.at_stage(stage).stage]

    def warm(self) -> None:
        """Compiles what the first requests need, for one person and for several."""
        item = next(iter(self.index.titles))
        recommender = self.stages[self.default]
        for count in (1, 2):
            recommender.answer([recommender.query([item])] * count)

    def _run(self, key: tuple[str, str], queries: list[Any]) -> list[Any]:
        """Answers; an InputError in place of an answer is that query's alone."""
        kind, stage = key
        recommender = self.stages[stage]
        if kind == "recommend":
            with contextlib.suppress(InputError):
                return recommender.answer(queries)
            return [_or_error(lambda q: recommender.answer([q])[0], query) for query in queries]
        return [_or_error(getattr(recommender, kind), *query) for query in queries]

    async def ask(self, kind: str, stage: str | None, query: Any) -> Any:
        """An answer within SECONDS. Raises HTTPException."""
        try:
            asked = self.batcher.ask((kind, stage or self.default), query)
            return await asyncio.wait_for(asked, SECONDS)
        except Busy:
            raise HTTPException(
                429, "too many requests wait: try again", {"Retry-After": "1"}
            ) from None
        except TimeoutError:
            raise HTTPException(503, "no answer in time: try again", {"Retry-After": "5"}) from None


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        found = function(*arguments)
    except InputError as error:
        return error
    return found


def make_app(recommender: Recommender, key: str = "") -> FastAPI:
    """The application; `key`: what requests must give as X-API-Key, "" for none."""
    service, meters = Service(recommender), Meters()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    def allowed(x_api_key: Annotated[str | None, Header()] = None) -> None:
        if key and not hmac.compare_digest((x_api_key or "").encode(), key.encode()):
            raise HTTPException(401, "found no valid X-API-Key, expected the server's key")

    version = importlib.metadata.version("sdpo_jax")
    app = FastAPI(title="sdpo_jax", version=version, lifespan=lifespan)
    app.state.service = service
    app.middleware("http")(_watch(meters, service))
    app.exception_handler(InputError)(_refuse)
    app.exception_handler(RequestValidationError)(_refuse)
    _add_routes(app, service, [Depends(allowed)])

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        meters.waiting.set(service.batcher.waiting)
        return Response(generate_latest(meters.registry), media_type="text/plain; version=0.0.4")

    return app


def _refuse(request: Request, error: Exception) -> Response:
    """422 in the form of FastAPI's own, without the input, which may be no text at all."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    detail = [{key: one[key] for key in ("loc", "msg", "type")} for one in found]
    detail = detail or [{"loc": ["body"], "msg": str(error), "type": "value_error"}]
    text = json.dumps({"detail": detail})  # all of it ASCII
    return Response(text, 422, media_type="application/json")


def _watch(meters: Meters, service: Service) -> Callable[..., Awaitable[Response]]:
    """A middleware: refuses large bodies before they are read, and counts."""

    async def watch(request: Request, call_next) -> Response:
        started = time.perf_counter()
        size = request.headers.get("content-length", "")
        if size.isdecimal() and int(size) > BODY:
            response: Response = JSONResponse({"detail": f"expected up to {BODY} bytes"}, 413)
        elif request.method == "POST" and not size.isdecimal():
            response = JSONResponse({"detail": "expected Content-Length"}, 411)
        else:
            try:
                async with asyncio.timeout(2 * SECONDS):
                    response = await call_next(request)
            except TimeoutError:  # of a body that does not come
                response = JSONResponse({"detail": "the request took too long"}, 408)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")  # never the request's own text
        meters.requests.labels(path, response.status_code).inc()
        meters.seconds.labels(path).observe(time.perf_counter() - started)
        return response

    return watch


def _add_routes(app: FastAPI, service: Service, checks: list[Any]) -> None:
    @app.post("/recommend", dependencies=checks, responses=_ERRORS)
    async def recommend(question: RecommendQuestion) -> Recommendations:
        """The k best items for a history of titles or ids, oldest first."""
        q, recommender = question, service.at(question.stage)
        allowed_I = service.index.allowed(q.items, q.where)
        query = recommender.query(q.history, q.k, q.exclude_seen, allowed_I, fuzzy=q.fuzzy)
        found: list[Recommended] = await service.ask("recommend", recommender.stage, query)
        listed = [RecommendedItem(id=o.item, title=o.title, score=o.score) for o in found]
        return Recommendations(items=listed)

    @app.post("/score", dependencies=checks, responses=_ERRORS)
    async def score(question: ScoreQuestion) -> dict[str, list[float]]:
        """Log-probabilities of answers after a prompt, EOS included."""
        q, stage = question, service.at(question.stage).stage
        return {"scores": await service.ask("score", stage, (q.prompt, q.answers))}

    @app.post("/why", dependencies=checks, responses=_ERRORS)
    async def why(question: WhyQuestion) -> Reasons:
        """How much an item's log-probability falls without each title of the history."""
        q, stage = question, service.at(question.stage).stage
        history = [service.index.item(one) for one in q.history]
        item = service.index.item(q.item)
        found = await service.ask("why", stage, (history, item))
        return Reasons(titles=[Reason(title=title, change=change) for title, change in found])

    @app.get("/items", dependencies=checks)
    def items(
        q: Annotated[str, Query(max_length=TITLE)] = "",
        limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
    ) -> dict[str, list[dict[str, Any]]]:
        """Items whose title contains a text, with their attributes."""
        return {"items": [service.index.about(item) for item in service.index.search(q, limit)]}

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        """Whether the server answers, and with what."""
        stages, items = list(service.stages), len(service.index.titles)
        return {"status": "ok", "stages": stages, "stage": service.default, "items": items}

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in (
        (400, "The body is no JSON"),
        (401, "No valid key"),
        (408, "The body did not come in time"),
        (411, "No Content-Length"),
        (413, "The body is too large"),
        (429, "Too many requests wait"),
        (503, "No answer in time"),
    )
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
