"""A whole tokenization job: `tokenize`."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mimi_jax.checkpoint import model_id
from mimi_jax.files.corpus import expand_home
from mimi_jax.model import HALVES, Mimi
from mimi_jax.tokenization.inputs import Shard, check_sources, in_words
from mimi_jax.tokenization.output import Output, planning
from mimi_jax.tokenization.plan import Plan, absolute, make_plan
from mimi_jax.tokenization.processes import process_from_cluster, process_from_jax
from mimi_jax.tokenization.progress import Progress
from mimi_jax.tokenization.records import Totals
from mimi_jax.tokenization.settings import DEFAULTS, Settings
from mimi_jax.tokenization.tokenizer import make_tokenizer

# The event that JAX records for each compiled program.
COMPILED = "/jax/core/compile/backend_compile_duration"


class Summary(NamedTuple):
    """What one process did, and how much of the whole job is done."""

    now: Totals  # of the shards that this run did
    sampling_rate: int  # Hz, of the samples in `now` and `total`
    seconds: float  # that this run took
    compilations: int | None  # programs that this run compiled; None on Ray, where the actors compile
    total: Totals  # of all shards that are done: by this run, by earlier ones and by other processes
    num_done: int  # shards
    num_shards: int

    @property
    def hours(self) -> float:
        """Hours of audio that this run encoded."""
        return self.now.hours(self.sampling_rate)

    @property
    def realtime(self) -> float:
        """Seconds of audio that this run encoded in a second."""
        return 3600 * self.hours / self.seconds

    @property
    def left_out(self) -> str:
        """What was found in the inputs and is no clip, such as "12 .txt, 3 .json"; "" if nothing was."""
        return in_words(self.total.left_out)


class Job(NamedTuple):
    """What is to be done: each process that takes part finds the same."""

    shards: list[Shard]
    model: Mimi  # its encoder, in float32
    output: Output

    def missing(self, shards: Sequence[Shard], retry_errors: bool) -> list[Shard]:
        """Those of the given shards that are not done. `retry_errors` undoes those that have errors first."""
        done = self.output.start((shard.index for shard in shards), retry_errors)
        return [shard for shard in shards if self.output.name(shard.index) not in done]

    def progress(self, shards: Sequence[Shard]) -> Progress:
        """The progress of a run that does these shards."""
        return Progress(sum(shard.num_bytes for shard in shards), self.model.config.sampling_rate)

    def finish(self, now: Totals, progress: Progress, compilations: int | None) -> Summary:
        """Update the manifest and sum up a run."""
        total, num_done = self.output.finish()
        rate, num_shards = self.model.config.sampling_rate, len(self.shards)
        return Summary(now, rate, progress.seconds, compilations, total, num_done, num_shards)


def plan(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    settings: Settings,
    is_first: bool = True,
) -> Job:
    """Load the model, find the inputs and open the output. Arguments and errors are those of `tokenize`.

    Args:
        is_first: this is the first process. It lists the inputs even if there is a plan already, to find out
            whether they have changed. The others believe the plan, if it is one of the same sources.
    """
    check_sources(sources)
    codec = Mimi.from_pretrained(os.fspath(model), decoder=False)
    jax.eval_shape(lambda: codec.init_encoder_state(1))  # refuses a model that cannot stream
    recorded = _recorded(codec, settings)
    with planning(output, is_first) as data:
        found = None if data is None or is_first else Plan(data)
        if found is None or found.sources != absolute(sources):
            found = make_plan(sources, settings.clips_per_shard, expand_home(output), settings.audio_column)
        recorded |= {"num_shards": len(found.shards), "inputs": found.fingerprint}
        opened = Output(output, recorded, codec.config.to_dict())
        if found.data != data:
            opened.keep_plan(found.data)
    return Job(found.shards, codec, opened)


def _recorded(codec: Mimi, settings: Settings) -> dict[str, Any]:
    """What decides the codes, for the manifest."""
    config = codec.config
    num_quantizers = codec.quantizer.resolve_count(settings.num_quantizers)
    recorded = {
        "model_id": model_id(codec, num_quantizers),  # of the codebooks alone
        "encoder_id": _encoder_id(codec),  # since another encoder may have the same codebooks
        "num_quantizers": num_quantizers,
        "dtype": settings.dtype,
        "sampling_rate": config.sampling_rate,
        "frame_size": config.frame_size,
        "codebook_size": config.codebook_size,
        "max_seconds": settings.max_seconds,
        "clips_per_shard": settings.clips_per_shard,
    }
    if settings.audio_column != DEFAULTS.audio_column:
        recorded["audio_column"] = settings.audio_column
    return recorded


def tokenize(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] = "mini",
    settings: Settings = DEFAULTS,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    retry_errors: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
    distributed: bool = False,
) -> Summary:
    """Turn audio into Parquet files of codes, on all devices of this process.

    Shards that are already done are kept, so a job that was killed is resumed by the same call. Shards with
    transient errors, such as a lost connection, are done again. In float32 the codes of each
    clip are those of `encode` on that clip alone.

    Args:
        sources: folders, patterns, audio files, .tar and .parquet files, and manifests, or URLs of them, as
            described for `mimi_jax.tokenization.inputs.find_shards`.
        output: a folder, or its URL, such as "gs://bucket/tokens". It is created if it does not exist.
            `mimi_jax.tokenization.output` describes what is written there.
        model: as for `Mimi.from_pretrained`.
        settings: what decides the codes and which clips share a file.
        batch_size: clips that are encoded at once, a multiple of the number of devices. A batch of clips has
            at most 256 seconds of audio a device, so it has fewer rows if the clips are long. None for 8 a
            device on CPUs and 64 a device on others.
        workers: processes that read and resample audio. None for one less than the number of CPUs, but at
            most 16.
        strict: stop at the first clip that cannot be encoded, instead of listing it as an error.
        retry_errors: do all shards that have errors again, for instance after files were repaired.
        process_index, process_count: this process does every `process_count`-th shard, starting with number
            `process_index`. None for both takes them from `jax.distributed` if it is initialized, and
            otherwise does all shards.
        distributed: take both from where `jax.distributed.initialize` takes them: from a slice of TPUs,
            SLURM, Open MPI or Kubernetes. No process waits for another or ends with it. On TPUs, call this
            before JAX has used any.

    Returns:
        What this process did, and how much of the job is done.

    Raises:
        FileNotFoundError: a source is missing, or the model cannot be found.
        ConnectionError: a service cannot be reached. What is done is kept.
        ValueError: the inputs, the model, the output or an argument cannot be used, the device has too little
            memory, or a clip cannot be encoded and `strict` is set.
        ChildProcessError: the worker processes cannot start. They import the script that called this
            function, so it must make the call under `if __name__ == "__main__":`.
    """
    process_index, process_count = _place(process_index, process_count, distributed)
    job = plan(sources, output, model, settings, is_first=process_index == 0)
    # Only those of this process are retried: others may have retried theirs already.
    shards = job.missing(job.shards[process_index::process_count], retry_errors)
    now = Totals()
    with contextlib.closing(job.progress(shards)) as progress, counted_compilations() as compiled:
        if shards:
            with make_tokenizer(job.model, job.output, batch_size, workers, strict) as tokenizer:
                now = tokenizer.run(shards, progress)
    return job.finish(now, progress, len(compiled))


def _place(process_index: int | None, process_count: int | None, distributed: bool) -> tuple[int, int]:
    """The index of this process and the number of processes, from the arguments of `tokenize`."""
    if (process_index is None) != (process_count is None):
        raise ValueError(
            "process_index and process_count must be given together, got"
            f" process_index={process_index}, process_count={process_count}"
        )
    if distributed and process_index is not None:
        raise ValueError("distributed finds process_index and process_count; give either it or them")
    if process_index is None or process_count is None:
        process_index, process_count = process_from_cluster() if distributed else process_from_jax()
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, {process_count}), got {process_index}")
    return process_index, process_count


def _encoder_id(model: Mimi) -> str:
    """16 hexadecimal digits that identify all weights before the quantizer."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves([getattr(model, part) for part in HALVES["encoder"]]):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Yield a list that grows by one entry with each program that XLA compiles."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
