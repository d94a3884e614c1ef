"""The server: its addresses, and how it starts and stops."""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from mimi_jax.serve.limits import Access, Limits
from mimi_jax.serve.metrics import Metrics
from mimi_jax.serve.moving import from_bytes, to_bytes
from mimi_jax.serve.sessions import KINDS, OPTIONS, Session
from mimi_jax.serve.socket import BAD_DATA, BROKEN, GOING_AWAY, REFUSED, EndError, Socket, listen
from mimi_jax.streams.pool import Pool

PAGE = Path(__file__).parent / "page"
STOP_SECONDS = 10.0  # for streams to end, when the server stops
SECURITY = {  # the page needs nothing from elsewhere, and shows in no frame of another page
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Server:
    """Serves the streams of a pool.

    Args:
        pool: entered already.
        metrics: which `pool` counts its steps in.
        limits: of each session.
        access: who may connect.
        key: signs sessions that move to another server; None: they may not.
    """

    def __init__(
        self, pool: Pool, metrics: Metrics, limits: Limits, access: Access, key: bytes | None = None
    ):
        self._pool, self._metrics, self._limits = pool, metrics, limits
        self._access, self._key = access, key
        self._sessions: dict[str, Session] = {}
        self._stops = False

    def app(self) -> Any:
        """The Starlette application."""
        from starlette.applications import Starlette
        from starlette.routing import Mount, Route, WebSocketRoute
        from starlette.staticfiles import StaticFiles

        routes: list[Any] = [
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            *(WebSocketRoute(f"/{kind}", self._open) for kind in KINDS),
        ]
        if self._key is not None:
            routes += [
                Route("/detach/{id}", self._detach, methods=["POST"]),
                WebSocketRoute("/attach", self._open),
            ]
        page = Starlette(routes=[Mount("/", StaticFiles(directory=PAGE, html=True))])
        return Starlette(routes=[*routes, Mount("/", _with_headers(page, SECURITY))])

    async def stop(self) -> None:
        """End all streams with their last frames."""
        self._stops = True
        for session in self._sessions.values():
            session.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while self._sessions:
                    await asyncio.sleep(0.01)

    async def _health(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        status, code = ("stopping" if self._stops else "ok"), 200
        try:
            self._pool.check()
        except RuntimeError:
            status, code = "failed", 503
        return JSONResponse({"status": status, "sessions": len(self._sessions)}, code)

    async def _show_metrics(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse, Response

        if problem := self._access.problem(request.headers, request.query_params):
            return PlainTextResponse(problem, 403)
        return Response(self._metrics.text(self._pool), media_type="text/plain; version=0.0.4")

    async def _detach(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse, Response

        if problem := self._access.problem(request.headers, request.query_params):
            return PlainTextResponse(problem, 403)
        session = self._sessions.get(request.path_params["id"])
        if session is None:
            return PlainTextResponse("there is no such session", 404)
        try:
            moved = await session.detach()
        except asyncio.CancelledError:
            return PlainTextResponse("the session ended before it could be detached", 409)
        assert self._key is not None
        # In a thread, because all codebooks are hashed, and other streams go on.
        data = await asyncio.to_thread(
            to_bytes, moved, self._pool.model, self._pool.num_quantizers, self._key
        )
        return Response(data, media_type="application/octet-stream")

    async def _open(self, websocket: Any) -> None:
        query = dict(websocket.query_params)
        problem = self._access.problem(websocket.headers, query)
        await websocket.accept()  # a browser tells its page nothing about a connection that was not accepted
        socket = Socket(websocket, self._limits)
        kind = websocket.url.path.rpartition("/")[2]
        session = None
        try:
            if problem:
                raise EndError(REFUSED, problem, "refused")
            self._check_goes_on()
            session = await self._make(kind, socket, query)
            self._check_goes_on()  # it may have waited for a first message
            self._sessions[session.id] = session
            await session.run()
            self._metrics.count_end("done")
        except EndError as error:
            await self._end(socket, error)
        except Exception as error:  # one session, and no other
            await self._end(socket, EndError(BROKEN, f"{type(error).__name__}: {error}", "broken"))
        finally:
            if session is not None:
                self._sessions.pop(session.id, None)

    def _check_goes_on(self) -> None:
        if self._stops:
            raise EndError(GOING_AWAY, "the server stops", "stopping")

    async def _make(self, kind: str, socket: Socket, query: dict[str, str]) -> Session:
        try:
            if kind in KINDS:
                options = {name: query[name] for name in OPTIONS if name in query}  # not the token
                return KINDS[kind](socket, self._pool, options)
            assert self._key is not None
            data = await socket.receive(self._limits.moved_bytes)
            if not isinstance(data, bytes):
                raise ValueError("the first message must be what /detach gave")
            moved = await asyncio.to_thread(
                from_bytes, data, self._pool.model, self._pool.num_quantizers, self._key
            )
            return KINDS[moved.kind](socket, self._pool, moved.options, moved)
        except ValueError as error:
            raise EndError(BAD_DATA, str(error), "bad") from error

    async def _end(self, socket: Socket, error: EndError) -> None:
        self._metrics.count_end(error.kind)
        if error.code == BROKEN:
            logging.getLogger("mimi_jax").error("a session broke: %s", error)
        with contextlib.suppress(EndError):
            await socket.tell(error=str(error))
        await socket.close(error.code, str(error))


def _with_headers(app: Any, headers: dict[str, str]) -> Any:
    """The application with headers in all its answers."""
    added = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await app(scope, receive, send_more)

    return wrapped


@contextlib.asynccontextmanager
async def serving(
    make_pool: Callable[..., Pool],
    frame_seconds: float,
    *,
    host: str,
    port: int,
    limits: Limits,
    access: Access,
    key: bytes | None = None,
) -> AsyncIterator[tuple[Server, int]]:
    """Serve until the context ends.

    Args:
        make_pool: makes the pool; it is called with `on_step`.
        frame_seconds: of the model.
        host, port: to listen on; port 0 for any free one.
        limits, access, key: as for `Server`.

    Yields:
        The server, and the port that it listens on.

    Raises:
        OSError: the port is taken.
    """
    import uvicorn

    class Web(uvicorn.Server):
        def capture_signals(self) -> Any:  # streams end before their connections close
            return contextlib.nullcontext()

    metrics = Metrics(frame_seconds)
    # The port first: if it is taken, nothing is compiled.
    with contextlib.closing(listen(host, port, limits)) as listener:
        async with make_pool(on_step=metrics.count_step) as pool:
            await pool.warmup()
            server = Server(pool, metrics, limits, access, key)
            # A message up to this size is read, so that its session ends with a reason.
            longest = max(2 * limits.message_bytes, 0 if key is None else limits.moved_bytes)
            config = uvicorn.Config(
                server.app(),
                ws_max_size=longest,
                # The answer to a ping waits behind what TCP holds back. Who sends nothing is ended as idle.
                ws_ping_interval=None,
                ws_per_message_deflate=False,  # neither PCM nor codes become much smaller
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=5,
            )
            web = Web(config)
            running = asyncio.create_task(web.serve(sockets=[listener]))
            while not web.started and not running.done():
                await asyncio.sleep(0.01)
            try:
                yield server, listener.getsockname()[1]
            finally:
                await server.stop()
                web.should_exit = True
                await running


async def serve_until_signal(announce: Callable[[int], None], **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM. `announce` is called with the port; the rest is as for `serving`."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    async with serving(**options) as (_, port):  # until it serves, both end the program at once
        # A full collection looks at all objects of JAX, for 0.3 s. All streams would wait for it.
        gc.collect()
        gc.freeze()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            announce(port)
            await stop.wait()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
