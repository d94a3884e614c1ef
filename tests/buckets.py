"""An S3 server on this machine, and a proxy before it that fails on purpose."""

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest

from mimi_jax.files import remote

# Any keys are right for this server. The library makes one attempt, so that ours are seen.
ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}
FAULTS = ("delay", "cut", "truncate", "refuse", "stale")
DELAY = 0.5  # seconds


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start an S3 server with an empty bucket named "bucket". Yields its address."""
    port = free_port()
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
                break
            time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def account(address: str) -> Iterator[None]:
    """Let s3fs, in this process and those that it starts, find the server at an address."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ACCOUNT, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        forget_connections(s3fs.S3FileSystem)
        yield
    forget_connections(s3fs.S3FileSystem)


def forget_connections(service: Any) -> None:
    """Make fsspec look for the server of a service again."""
    service.clear_instance_cache()
    remote._filesystem.cache_clear()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, some of which fail.

    Attributes:
        planned: how the next requests fail.
        broken: a part of a path, whose answers are always truncated; "" for none.
        faults: how many failed in each way.
        requests: how many came, by method and kind.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, share: float = 0.0, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_address_behind = address.removeprefix("http://")
        self.share, self.random = share, random.Random(seed)
        self.planned: list[str] = []
        self.broken = ""
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}  # the first answers
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def choose(self, path: str, is_listing: bool) -> str:
        """In which way a request fails; "" if it does not."""
        with self.lock:
            if self.planned:
                fault = self.planned.pop(0)
            elif self.broken and self.broken in path:
                fault = "truncate"
            elif self.random.random() < self.share:
                fault = self.random.choice(FAULTS if is_listing else FAULTS[:-1])
            else:
                return ""
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet: clients are killed on purpose."""


@contextlib.contextmanager
def proxy(address: str, share: float = 0.0, seed: int = 0) -> Iterator[Proxy]:
    """Start a proxy for a server, of whose answers a share is faulty."""
    with serving(Proxy(address, share, seed)) as server:
        yield server


Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let a server answer in a thread."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_listing = "list-type=2" in self.path
        with self.server.lock:
            self.server.requests["LIST" if is_listing else self.command] += 1
        fault = self.server.choose(self.path, is_listing)
        if fault == "delay":
            time.sleep(DELAY)
        if fault == "refuse":
            status = self.server.random.choice((500, 503))
            code = {500: "InternalError", 503: "ServiceUnavailable"}[status]
            text = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], text)
            return
        answer = self._ask(body)
        if is_listing and answer[0] == 200:
            first = self.server.listings.setdefault(self.path, answer)
            answer = first if fault == "stale" else answer
        self._answer(*answer, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.server_address_behind)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        own = ("connection", "date", "server")
        headers = [pair for pair in answer.getheaders() if pair[0].lower() not in own]
        connection.close()
        return answer.status, headers, data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str = "") -> None:
        sent = data[: len(data) // 2] if fault in ("cut", "truncate") else data
        self.send_response(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
            elif self.command == "HEAD":
                self.send_header(name, value)  # of the body that a GET would have
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(sent if fault == "truncate" else data)))
        self.end_headers()
        self.wfile.write(sent)
        if fault == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""
