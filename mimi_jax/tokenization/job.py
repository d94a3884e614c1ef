"""A tokenization job: shards in, Parquet out, nothing lost, nothing twice."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mimi_jax.checkpoint.store import model_id
from mimi_jax.model import Mimi
from mimi_jax.tokenization.coding import Coder, Result
from mimi_jax.tokenization.inputs import Shard, find_shards, fingerprint
from mimi_jax.tokenization.output import Failure, Output, Row, Totals
from mimi_jax.tokenization.progress import Progress
from mimi_jax.tokenization.workers import Decoders, Stream, Target

DTYPES = ("float32", "bfloat16")
BATCH_SIZE = {"cpu": 8}  # rows of a device
OTHER_BATCH_SIZE = 64
# Frames of long clips that are coded at once. Each step costs what it does for the past of its rows, and the
# end of a clip half a step for nothing. On a CPU the first is little, so steps are short: 1.28 s.
BLOCK_FRAMES = {"cpu": 16}
OTHER_BLOCK_FRAMES = 50
MAX_WORKERS = 16  # by default: a core decodes thousands of seconds in one
CLIPS_PER_SHARD = 1000
MAX_SECONDS = 24 * 3600.0
COMPILED = "/jax/core/compile/backend_compile_duration"


class Summary(NamedTuple):
    """What one process did, and how far all are."""

    now: Totals  # of the shards that were done now
    sampling_rate: int  # Hz, of the samples in `now` and `total`
    seconds: float
    compilations: int | None  # None where they were elsewhere
    total: Totals  # of all shards that are done: before, now, or by others
    num_done: int  # shards
    num_shards: int


class Plan(NamedTuple):
    """What every process that takes part finds by itself."""

    shards: list[Shard]
    model: Mimi  # its encoder, in float32
    output: Output


def plan(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    num_quantizers: int | None = None,
    dtype: str = "float32",
    clips_per_shard: int = CLIPS_PER_SHARD,
    max_seconds: float = MAX_SECONDS,
) -> Plan:
    """Look at the inputs, the model and what stands in the output; arguments as for `tokenize`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    shards = find_shards(sources, clips_per_shard, without=output)
    codec = Mimi.from_pretrained(os.fspath(model), decoder=False)
    config = codec.config
    jax.eval_shape(lambda: codec.init_encoder_state(1))  # which refuses a model that cannot stream
    count = codec.quantizer.resolve_count(config.num_quantizers if num_quantizers is None else num_quantizers)
    settings = {
        "model_id": model_id(codec, count),
        "encoder_id": _encoder_id(codec),  # other encoders may share the codebooks
        "num_quantizers": count,
        "dtype": dtype,
        "sampling_rate": config.sampling_rate,
        "frame_size": config.frame_size,
        "codebook_size": config.codebook_size,
        "max_seconds": max_seconds,
        "clips_per_shard": clips_per_shard,
        "num_shards": len(shards),
        "inputs": fingerprint(shards),
    }
    return Plan(shards, codec, Output(Path(output), settings, config.to_dict()))


def tokenize(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] = "mini",
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    retry_errors: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
    **settings: Any,
) -> Summary:
    """Turn audio into Parquet files of codes, on all devices of this process.

    What is done already stays; run again after a kill, and only missing shards are coded. Every clip's codes
    are, in float32, those of `encode` on the clip alone.

    Args:
        sources: folders, patterns, audio files, .tar and .parquet files, .jsonl manifests; see
            `mimi_jax.tokenization.inputs.find_shards`.
        output: a folder, made where there is none; see `mimi_jax.tokenization.output`.
        model: as for `Mimi.from_pretrained`.
        batch_size: clips that are coded at once; a multiple of the number of devices. None for 8 on a CPU and
            64 a device on others. A batch has no more than 256 seconds a device: long clips are fewer.
        workers: processes that read and resample; None for one less than there are CPUs, at most 16.
        strict: stop at the first clip that cannot be coded, instead of listing it.
        retry_errors: do again the shards that have errors, as after a disk or a network that failed.
        process_index, process_count: this process does every `process_count`-th shard, from `process_index`
            on. None for those of `jax.distributed`, where that is initialized, else for one process alone.
        num_quantizers: how many codebooks to keep, the first ones; all by default.
        dtype: "float32", or "bfloat16" for speed.
        clips_per_shard: of files that are not in an archive.
        max_seconds: longer clips count as errors.

    Raises:
        FileNotFoundError, ValueError: inputs, model or output cannot be used, or, with `strict`, a clip.
        ChildProcessError: worker processes cannot start. They import the script that called this, which must
            do so under `if __name__ == "__main__":`.
    """
    if process_index is None or process_count is None:
        is_one_of_many = jax.distributed.is_initialized()
        process_index, process_count = (
            (jax.process_index(), jax.process_count()) if is_one_of_many else (0, 1)
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, {process_count}), got {process_index}")
    shards, codec, folder = plan(sources, output, model, **settings)
    mine = shards[process_index::process_count]
    if retry_errors:  # of these alone: other processes may have retried theirs already
        folder.forget_errors(shard.index for shard in mine)
    mine = [shard for shard in mine if not folder.is_done(shard.index)]
    progress = Progress(sum(shard.num_bytes for shard in mine), codec.config.sampling_rate)
    now = Totals()
    with contextlib.closing(progress), counted_compilations() as compiled:
        if mine:
            with Tokenizer(codec, folder, batch_size, workers, strict) as tokenizer:
                now = tokenizer.run(mine, progress)
    total, num_done = folder.finish()
    return Summary(
        now, codec.config.sampling_rate, progress.seconds, len(compiled), total, num_done, len(shards)
    )


class Tokenizer:
    """Holds a model and its workers, and codes shards.

    Args:
        model: its encoder, in float32.
        output: which says in what dtype and how many codebooks.
        batch_size, workers, strict: as for `tokenize`.
    """

    def __init__(
        self, model: Mimi, output: Output, batch_size: int | None, workers: int | None, strict: bool
    ):
        settings, devices = output.settings, jax.local_devices()
        platform = devices[0].platform
        if batch_size is None:
            batch_size = BATCH_SIZE.get(platform, OTHER_BATCH_SIZE) * len(devices)
        if workers is None:
            workers = min(max(_num_cpus() - 1, 1), MAX_WORKERS)
        if settings["dtype"] != "float32":
            model = model.astype(settings["dtype"])
        block_frames = BLOCK_FRAMES.get(platform, OTHER_BLOCK_FRAMES)
        self._coder = Coder(model, batch_size, block_frames, settings["num_quantizers"], devices)
        target = Target(settings["sampling_rate"], model.config.audio_channels, settings["max_seconds"])
        self._decoders = Decoders(target, workers)
        self._output, self._strict = output, strict

    def __enter__(self) -> "Tokenizer":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.__exit__()

    def run(self, shards: Sequence[Shard], progress: Progress, wait: bool = False) -> Totals:
        """Code shards, but for those that are done or that another process is at.

        Args:
            wait: for that process, and code what it leaves behind.
        """
        with contextlib.ExitStack() as claims:
            ledger = _Ledger(self._output, self._decoders, progress, claims)
            for result in self._coder.run(ledger.streams(shards, wait), progress.coded):
                if self._strict and result.codes is None:
                    raise ValueError(f"{ledger.place(result.stream)}: {result.problem}")
                ledger.enter(result)
        return ledger.totals


class _Open:
    """A shard that is being coded."""

    def __init__(self, shard: Shard, release: Callable[[], object]):
        self.shard, self.release = shard, release
        self.results: dict[int, Row | Failure] = {}
        self.num_items = self.num_bytes = 0
        self.is_read = False

    @property
    def is_done(self) -> bool:
        return self.is_read and len(self.results) == self.num_items


class _Ledger:
    """Which clip belongs where: shards are read one after the other, and overlap while they are coded."""

    def __init__(self, output: Output, decoders: Decoders, progress: Progress, claims: contextlib.ExitStack):
        self._output, self._decoders, self._progress, self._claims = output, decoders, progress, claims
        self._places: dict[int, tuple[_Open, int]] = {}
        self.totals = Totals()

    def streams(self, shards: Sequence[Shard], wait: bool) -> Iterator[Stream]:
        for shard in shards:
            claim = contextlib.ExitStack()
            self._claims.push(claim)
            if not claim.enter_context(self._output.claim(shard.index, wait)):
                claim.close()
                continue
            opened = _Open(shard, claim.close)
            for item in shard.read():
                stream = self._decoders.open(item)
                self._places[stream.key] = (opened, opened.num_items)
                opened.num_items += 1
                yield stream
            opened.is_read = True
            self._close_if_done(opened)

    def place(self, stream: Stream) -> str:
        source, name = self._places[stream.key][0].shard.source, stream.item.id
        return f"{source}: {name}" if name and name != source else source

    def enter(self, result: Result) -> None:
        item = result.stream.item
        opened, position = self._places.pop(result.stream.key)
        source = opened.shard.source
        if result.codes is None:
            opened.results[position] = Failure(item.id, source, result.problem)
            self._progress.error(item.num_bytes)
        else:
            opened.results[position] = Row(item.id, source, result.num_samples, result.codes)
            self._progress.clip(item.num_bytes)
        opened.num_bytes += item.num_bytes
        self._close_if_done(opened)

    def _close_if_done(self, opened: _Open) -> None:
        if not opened.is_done:
            return
        results = [opened.results[position] for position in range(opened.num_items)]
        rows = [result for result in results if isinstance(result, Row)]
        failures = [result for result in results if isinstance(result, Failure)]
        self.totals += self._output.write(opened.shard.index, rows, failures)
        self._progress.read(max(opened.shard.num_bytes - opened.num_bytes, 0))
        opened.release()


def _num_cpus() -> int:
    """That this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encoder_id(model: Mimi) -> str:
    """16 hexadecimal digits of all weights before the quantizer."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((model.encoder, model.encoder_transformer, model.downsample)):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """A list that grows with every program that XLA is asked for."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
