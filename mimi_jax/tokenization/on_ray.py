"""Tokenization on a Ray cluster: many actors, each of which does one shard at a time.

Ray Data gives out the shards, a few ahead to each actor. If a machine is lost, it starts the actors again and
gives their shards to others. A shard that was written just before its machine was lost is not done again.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from mimi_jax.files.corpus import expand_home
from mimi_jax.files.remote import is_remote
from mimi_jax.model import Mimi
from mimi_jax.tokenization.job import Summary, plan
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.plan import Plan
from mimi_jax.tokenization.progress import Progress
from mimi_jax.tokenization.records import Totals
from mimi_jax.tokenization.settings import DEFAULTS, Settings
from mimi_jax.tokenization.tokenizer import make_tokenizer


def tokenize_on_ray(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] = "mini",
    settings: Settings = DEFAULTS,
    *,
    address: str | None = None,
    actors: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: dict[str, float] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    retry_errors: bool = False,
) -> Summary:
    """`tokenize` on a Ray cluster, whose machines must have inputs, model and output under the same paths.

    Args:
        sources, output, model, settings: as for `tokenize`.
        address: of the cluster, such as "auto" or "ray://head:10001". None starts a cluster on this machine.
        actors: how many models work at once. None for as many as the cluster has room for.
        num_cpus, num_gpus, resources: what each actor needs, such as `resources={"TPU": 4}`.
        batch_size, strict, retry_errors: as for `tokenize`.
        workers: processes of each actor that read and resample audio. None for one less than `num_cpus`.

    Returns:
        What this run did, and how much of the job is done.

    Raises:
        FileNotFoundError: as for `tokenize`.
        ValueError: as for `tokenize`; or there is no cluster at the address, or the cluster has failed.
    """
    import ray  # pyright: ignore[reportMissingImports]

    model = os.path.abspath(model) if os.path.exists(model) else model
    output = output if is_remote(output) else os.path.abspath(expand_home(output))
    job = plan(sources, output, model, settings)
    shards = job.missing(job.shards, retry_errors)
    now = Totals()
    with contextlib.closing(job.progress(shards)) as progress, _cluster(address):
        workers = max(int(num_cpus) - 1, 1) if workers is None else workers
        folder, recorded = os.fspath(output), job.output.settings
        rows = [{"shard": shard.index} for shard in shards]
        pool: dict[str, Any] = {"size": actors} if actors else {"min_size": 1, "max_size": max(len(rows), 1)}
        results = ray.data.from_items(rows, override_num_blocks=max(len(rows), 1)).map(
            _Actor,  # pyright: ignore[reportArgumentType] - the type is that of functions
            compute=ray.data.ActorPoolStrategy(**pool),
            fn_constructor_args=(os.fspath(model), folder, recorded, batch_size, workers, strict),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            resources=resources,
        )
        for row in results.iter_rows() if rows else ():
            totals = Totals.from_json(row["totals"])
            progress.shard(totals.clips, totals.errors, totals.samples, row["num_bytes"])
            now += totals
    return job.finish(now, progress, None)


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray, keep a connection that exists already, and explain Ray's errors in one line."""
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    was_connected = ray.is_initialized()
    try:
        if not was_connected:
            _connect(address)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # the errors of Ray Data have no common class
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"the Ray cluster has failed: {cause}") from error
    finally:
        if not was_connected:
            ray.shutdown()


def _connect(address: str | None) -> None:
    import ray  # pyright: ignore[reportMissingImports]

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from error


class _Actor:
    """A model on one machine of the cluster, which does the shards it is given."""

    def __init__(
        self,
        model: str,
        output: str,
        recorded: dict[str, Any],
        batch_size: int | None,
        workers: int | None,
        strict: bool,
    ):
        codec = Mimi.from_pretrained(model, decoder=False)
        self._output = Output(output, recorded, codec.config.to_dict())
        self._tokenizer = make_tokenizer(codec, self._output, batch_size, workers, strict)
        self._rate = codec.config.sampling_rate
        self._shards = Plan(self._output.plan()).shards

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = self._shards[row["shard"]]
        with open(os.devnull, "w") as nowhere:
            progress = Progress(shard.num_bytes, self._rate, nowhere)
            self._tokenizer.run([shard], progress, wait=True)
        return {"totals": json.dumps(self._output.totals(shard.index)), "num_bytes": shard.num_bytes}
