"""Settings and fixtures for every test; pytest reads this before any JAX computation runs."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]

# Tests of sharding need several devices. Tests of one device are not slower for it.
jax.config.update("jax_num_cpu_devices", 8)
# As in Equinox, code must say where an axis is added and where a dtype changes.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Each call of a layer that is traced is checked against the shapes and dtypes in its annotations. This must
# come before the first import of the layers.
jaxtyping.install_import_hook("mimi_jax.nn", "beartype.beartype")

# XLA takes most of the time of the tests, for small programs that run once. Without these optimizations it
# takes a fifth.
COMPILE_FAST = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # newer versions exit at flags that they no longer have
    COMPILE_FAST.append("--xla_cpu_use_fusion_emitters=false")


MAX_MEMORY_MAPS = 4_000  # of about 500 programs


def pytest_configure(config: pytest.Config) -> None:
    """Compile fast, and keep compiled programs in pytest's own cache (`pytest --cache-clear`)."""
    # The selections by marker, such as `make slow` and `make parity`, compile as users do.
    if str(config.getoption("markexpr")).startswith("not "):
        os.environ.setdefault("XLA_FLAGS", " ".join(COMPILE_FAST))
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Traces fill the memory with objects that live long. Looking for garbage among them takes a tenth of the
    # time, unless it is done rarely.
    gc.set_threshold(2_000, 10, 50)
    _heed_signals()


def _heed_signals() -> None:
    """Let the processes that tests start heed the signals that ask to stop.

    `nohup` and background jobs of a shell ignore such signals, and child processes inherit that. A handler
    that does nothing has the same effect in this process, but child processes start with the default.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Forget all programs before there are so many that each new one takes several times as long.

    They also hold memory maps, of which Linux gives a process 65,530. Until then the test files share them.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
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
