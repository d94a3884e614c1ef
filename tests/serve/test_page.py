"""The page in a real Chromium, whose microphone hears the bundled speech."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

import mimi_jax
from mimi_jax.files.audio import save_audio
from mimi_jax.model import decode, encode
from mimi_jax.serve.app import serving
from mimi_jax.serve.limits import Access, Limits
from mimi_jax.streams.pool import Pool
from tests.serve.chromium import PROGRAM, Page, opened
from tests.serve.test_server import parse, split_loopback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium"),
]
SPEECH = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"


async def speak(page: Page) -> None:
    await page.evaluate("document.getElementById('microphone').click()")
    await page.until("document.getElementById('status').textContent === 'Live.'")
    await page.until("Number(document.getElementById('frames').textContent) >= 40")


async def slide(page: Page, count: int) -> None:
    await page.evaluate(
        f"const slider = document.getElementById('codebooks'); slider.value = {count};"
        "slider.dispatchEvent(new Event('input'))"
    )


async def stop(page: Page) -> None:
    await page.evaluate("document.getElementById('stop').click()")
    await page.until("document.getElementById('status').textContent === 'The stream has ended.'")


def check(model: mimi_jax.Mimi, page: Page) -> None:
    """What came back is what `encode` and `decode` make of what was sent."""
    pcm = b"".join(message for message in page.sent if isinstance(message, bytes))
    audio = np.frombuffer(pcm, "<i2").astype(np.float32)[None, None] / 32768
    stream, sound = split_loopback(
        b"".join(message for message in page.received if isinstance(message, bytes)), "<i2"
    )
    codes, length = parse(stream)
    assert length == audio.shape[2] > 40 * 1920
    assert np.abs(audio).max() > 0.05  # it has heard something
    expected = np.asarray(encode(model, audio).audio_codes)[0]
    assert np.mean(codes == expected) > 0.999  # but for ties
    decoded = np.concatenate(sound) / 32768
    assert len(decoded) == length
    counts = [
        json.loads(text)["num_quantizers"] for text in page.sent if isinstance(text, str) and "num" in text
    ]
    assert counts == [8, 3]
    errors = []
    for count in counts:
        whole = np.asarray(decode(model, codes[None, :count]).audio_values)[0, 0, :length]
        errors.append(
            [np.abs(whole - decoded)[part].max() for part in (slice(None, 30_000), slice(-30_000, None))]
        )
    (first, _), (_, last) = errors  # 8 codebooks at first, 3 in the end
    assert max(first, last) < 1e-3 < min(errors[0][1], errors[1][0])


@contextlib.asynccontextmanager
async def served(model: mimi_jax.Mimi, folder: Path) -> AsyncIterator[Page]:
    """The page, of a server of its own."""
    save_audio(folder / "speech.wav", mimi_jax.load_audio(SPEECH), 24_000)
    make_pool = functools.partial(Pool, model, 8)
    options = {"host": "127.0.0.1", "port": 0, "limits": Limits(), "access": Access()}
    async with (
        serving(make_pool, 0.08, **options) as (_, port),
        opened(f"http://127.0.0.1:{port}/", folder / "speech.wav") as page,
    ):
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_speaks_and_hears(tmp_path: Path, scheme: str):
    model = mimi_jax.Mimi.from_pretrained("mini")

    async def test() -> None:
        async with served(model, tmp_path) as page:
            await page.call(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            await speak(page)
            await slide(page, 3)
            assert await page.evaluate("document.getElementById('rate').value") == "3, 0.30 kbit/s"
            await asyncio.sleep(4)
            await page.screenshot(tmp_path / f"{scheme}.png")
            await stop(page)
            assert int(await page.evaluate("document.getElementById('late').textContent")) >= 0
            check(model, page)
            assert page.problems == []

    asyncio.run(asyncio.wait_for(test(), 300))
    assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000


def test_a_new_stream_closes_what_played_the_old_one(tmp_path: Path):
    async def test() -> None:
        async with served(mimi_jax.Mimi.from_pretrained("mini"), tmp_path) as page:
            await page.evaluate(
                "window.contexts = []; const Context = AudioContext;"
                "window.AudioContext = class extends Context {"
                "  constructor(options) { super(options); contexts.push(this); } }; true"
            )
            await speak(page)
            for _ in range(3):
                await page.evaluate("document.getElementById('microphone').click()")
            await page.until("document.getElementById('status').textContent === 'Live.'")
            await stop(page)
            await page.until("contexts.length > 5 && contexts.every((each) => each.state === 'closed')")
            assert page.problems == []

    asyncio.run(asyncio.wait_for(test(), 300))
