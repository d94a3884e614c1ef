"""Settings and fixtures for every test; pytest reads this before any JAX computation runs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]

# Sharding tests need several devices; single-device tests run as fast as before.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs between runs, in pytest's own cache (`pytest --cache-clear`)."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Forget the programs of each file: every one holds memory maps, of which Linux gives 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_speech() -> list[Path]:
    """Clips of real speech, sorted; they are not part of the repository, so the test may skip."""
    folder = Path(os.environ.get("MIMI_JAX_SPEECH", ROOT.parent / "shared" / "speech"))
    clips = sorted(folder.rglob("*.flac"))
    if not clips:
        pytest.skip(f"needs real speech: no .flac file under {folder}; set MIMI_JAX_SPEECH")
    return clips
