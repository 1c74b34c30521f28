"""Requests of many people computed together, by one thread that owns the model."""

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Any

WAIT = 0.005  # seconds in which requests gather


class Busy(Exception):
    """As many requests wait as the queue has places."""


@dataclasses.dataclass
class _Job:
    key: Any
    query: Any
    future: asyncio.Future


class Batcher:
    """Queues queries and hands those with one key to `run` together, up to `at_once`.

    Args:
      run: (key, queries) -> answers or exceptions, in order; called in one thread, never twice at
        a time.
      at_once: most queries of a call.
      places: most queries that may wait.
    """

    def __init__(self, run: Callable[[Any, list[Any]], list[Any]], at_once: int, places: int):
        self._run, self._at_once, self._places = run, at_once, places
        self._waiting: list[_Job] = []
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task | None = None
        self._running = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Called inside the event loop."""
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        """Answers what waits, then ends the thread."""
        while self._waiting or self._running:
            await asyncio.sleep(0.01)
        if self._task:
            self._task.cancel()
        self._thread.shutdown(wait=True)

    async def ask(self, key: Any, query: Any) -> Any:
        """The answer to a query. Raises Busy, and what `run` raises."""
        if len(self._waiting) >= self._places:
            raise Busy
        job = _Job(key, query, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        return await job.future

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            started = time.monotonic()
            while len(self._waiting) < self._at_once and time.monotonic() - started < WAIT:
                await asyncio.sleep(WAIT / 5)
            await self._answer(self._next())
            if not self._waiting:
                self._arrived.clear()

    def _next(self) -> list[_Job]:
        """The oldest job and others with its key; those whose caller has gone are dropped."""
        self._waiting = [job for job in self._waiting if not job.future.done()]
        if not self._waiting:
            return []
        same = [job for job in self._waiting if job.key == self._waiting[0].key][: self._at_once]
        chosen = {id(job) for job in same}
        self._waiting = [job for job in self._waiting if id(job) not in chosen]
        return same

    async def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self._running = True
        queries = [job.query for job in jobs]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._run, jobs[0].key, queries)
        except Exception as error:  # given to those who asked
            found = [error] * len(jobs)
        finally:
            self._running = False
        for job, answer in zip(jobs, found, strict=True):
            if job.future.done():
                continue
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
