"""A double of the Hugging Face Hub: one dataset in memory, and the requests that fsspec makes."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.buckets import forget_connections, serving

DATASET = "me/speech"


class Hub(ThreadingHTTPServer):
    """The server. `files` has the content of the dataset by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {".gitattributes": b"", "README.md": b"---\n"}  # as they are born
        self.is_gone = False  # then it closes connections without an answer


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Start the double and let huggingface_hub in this process use it."""
    from huggingface_hub import HfFileSystem, constants

    with serving(Hub()) as server, pytest.MonkeyPatch.context() as patch:
        address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        forget_connections(HfFileSystem)
        yield server
    forget_connections(HfFileSystem)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_one_request(self) -> None:
        if self.server.is_gone:
            self.close_connection = True
        else:
            super().handle_one_request()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api = f"/api/datasets/{DATASET}"
        if path.startswith(f"/datasets/{DATASET}/resolve/main/"):
            self._send_file(path.partition("/resolve/main/")[2])
        elif path in (api, f"{api}/revision/main"):
            self._send_json({"_id": "1", "id": DATASET, "sha": "0" * 40, "siblings": [], "private": False})
        elif path.startswith(f"{api}/tree/main"):
            self._send_tree(path.removeprefix(f"{api}/tree/main").strip("/"), "recursive=True" in self.path)
        elif path == f"{api}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._send_json({"files": [_upload(name) for name in names]})
        elif path == f"{api}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_POST = do_HEAD = do_GET

    def _send_tree(self, folder: str, is_recursive: bool) -> None:
        beginning, entries = f"{folder}/" if folder else "", {}
        for name, data in self.server.files.items():
            if not name.startswith(beginning):
                continue
            rest = name.removeprefix(beginning)
            for slash in re.finditer("/", rest):
                entries[rest[: slash.start()]] = {"type": "directory", "oid": "0" * 40, "size": 0}
            oid = hashlib.sha1(data).hexdigest()
            entries[rest] = {"type": "file", "oid": oid, "size": len(data)}
        if not entries and folder:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        shown = [
            {**entry, "path": beginning + name}
            for name, entry in sorted(entries.items())
            if is_recursive or "/" not in name
        ]
        self._send_json(shown)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
        url = f"http://127.0.0.1:{self.server.server_port}/datasets/{DATASET}/commit/{'0' * 40}"
        self._send_json({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def _send_file(self, name: str) -> None:
        if name not in self.server.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.files[name]
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            etag["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], etag)
        else:
            self._send(200, data, etag)

    def _send_json(self, fields: Any) -> None:
        self._send(200, json.dumps(fields).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


def _upload(name: str) -> dict[str, Any]:
    """How a file is to be uploaded: in the commit itself."""
    return {"path": name, "uploadMode": "regular", "shouldIgnore": False}
