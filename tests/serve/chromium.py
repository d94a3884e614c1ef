"""Drives a real Chromium by its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A page in Chromium.

    Attributes:
        sent, received: the messages of its WebSockets, bytes or text, in order.
        problems: what the page wrote to the console as errors.
    """

    def __init__(self, socket: ClientConnection):
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.sent: list[bytes | str] = []
        self.received: list[bytes | str] = []
        self.problems: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says, for ever."""
        async for text in self._socket:
            message = json.loads(text)
            if (answer := self._answers.pop(message.get("id", 0), None)) is not None:
                if "error" in message:
                    answer.set_exception(RuntimeError(str(message["error"])))
                else:
                    answer.set_result(message["result"])
            else:
                self._note(message.get("method"), message.get("params", {}))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        frames = {
            "Network.webSocketFrameSent": self.sent,
            "Network.webSocketFrameReceived": self.received,
        }
        if method in frames:
            frame = params["response"]
            data = frame["payloadData"]
            frames[method].append(base64.b64decode(data) if frame["opcode"] == 2 else data)
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(str(params["entry"]))

    async def call(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result."""
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        return await asyncio.wait_for(answer, 30)

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in JavaScript, as if a person had caused it."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(seconds):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.1)

    async def screenshot(self, path: Path) -> None:
        data = (await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True))["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.asynccontextmanager
async def opened(address: str, microphone: Path, width: int = 1100, height: int = 900) -> AsyncIterator[Page]:
    """Open a page, whose microphone hears a WAV file.

    Args:
        address: of the page.
        microphone: the file.
        width, height: of the window.
    """
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            PROGRAM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            f"--window-size={width},{height}",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}",
            "--autoplay-policy=no-user-gesture-required",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=os.environ | {"HOME": folder},
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort")
            targets = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/json/list")
            page = next(target for target in targets if target["type"] == "page")
            async with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                found = Page(socket)
                listening = asyncio.create_task(found.listen())
                for domain in ("Page", "Network", "Runtime", "Log"):
                    await found.call(f"{domain}.enable")
                await found.call("Page.navigate", url=address)
                await found.until("document.readyState === 'complete'")
                yield found
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listening
        finally:
            process.kill()
            await process.wait()


async def _port(file: Path) -> int:
    async with asyncio.timeout(60):
        while not (file.exists() and file.read_text().count("\n")):
            await asyncio.sleep(0.1)
    return int(file.read_text().split("\n")[0])


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)
