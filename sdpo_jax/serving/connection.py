"""What uvicorn's connections lack: a time limit for a request's head, and a good end."""

import asyncio
import functools
import os
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from a connection, or a later request's first byte, to the end of its head
LAST_SECONDS = 0.5  # for a request that is on its way when the server ends


class Connection(H11Protocol):
    """Is closed where the head of a request does not come in HEAD_SECONDS."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._between_requests():
            self._expect_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Ends the connection after the request in progress, or one that comes in LAST_SECONDS."""
        if self._between_requests():
            self.loop.call_later(LAST_SECONDS, self._end)
        else:
            super().shutdown()

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        """Starts the time limit; bytes that trickle in do not extend it."""
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._between_requests():
            self.transport.close()


async def accept_the_last(server: uvicorn.Server) -> None:
    """Stops listening without losing connections that wait to be accepted."""
    loop = asyncio.get_running_loop()
    made = functools.partial(
        Connection,
        config=server.config,
        server_state=server.server_state,
        app_state=server.lifespan.state,
    )
    for listening in server.servers:
        # Closed, a listening socket resets what waits; the copies keep it open meanwhile.
        copies = [socket.socket(fileno=os.dup(one.fileno())) for one in listening.sockets]
        listening.close()
        waiting = [connection for copy in copies for connection in _accept_all(copy)]
        for connection in waiting:
            await loop.connect_accepted_socket(made, connection)


def _accept_all(listening: socket.socket) -> list[socket.socket]:
    """All connections that wait; closes the socket."""
    listening.setblocking(False)
    found = []
    with listening:
        while True:
            try:
                found.append(listening.accept()[0])
            except OSError:  # none waits, or no more can be opened
                return found
