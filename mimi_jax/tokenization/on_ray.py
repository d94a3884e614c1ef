"""Tokenization on a Ray cluster: the same core, a shard at a time in each of many actors.

Ray Data hands out the shards, keeps every actor busy with few shards ahead, starts actors anew when their
machine is gone, and gives their shards to others. A shard that was written just before is not done again.
"""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mimi_jax.model import Mimi
from mimi_jax.tokenization.inputs import Shard
from mimi_jax.tokenization.job import Summary, Tokenizer, plan
from mimi_jax.tokenization.output import Output, Totals
from mimi_jax.tokenization.progress import Progress


def tokenize_on_ray(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] = "mini",
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
    **settings: Any,
) -> Summary:
    """`tokenize` on a Ray cluster, whose machines see inputs, model and output under the same paths.

    Args:
        address: of the cluster, such as "auto" or "ray://head:10001"; None for one on this machine.
        actors: how many models work at once; None for as many as the cluster has room for.
        num_cpus, num_gpus, resources: what each of them takes, such as `resources={"TPU": 4}`.
        workers: of each; None for one less than `num_cpus`.
        sources, output, model, batch_size, strict, retry_errors, and the rest: as for `tokenize`.
    """
    import ray  # pyright: ignore[reportMissingImports]

    model = os.path.abspath(model) if os.path.exists(model) else model
    shards, codec, folder = plan(sources, os.path.abspath(output), model, **settings)
    if retry_errors:
        folder.forget_errors(shard.index for shard in shards)
    todo = [shard for shard in shards if not folder.is_done(shard.index)]
    progress = Progress(sum(shard.num_bytes for shard in todo), codec.config.sampling_rate)
    now = Totals()
    with contextlib.closing(progress), _cluster(address):
        workers = workers or max(int(num_cpus) - 1, 1)
        constructor = (os.fspath(model), str(folder.folder), folder.settings, batch_size, workers, strict)
        rows = [{"shard": pickle.dumps(shard)} for shard in todo]
        pool: dict[str, Any] = {"size": actors} if actors else {"min_size": 1, "max_size": max(len(todo), 1)}
        results = ray.data.from_items(rows, override_num_blocks=max(len(rows), 1)).map(
            _Actor,  # pyright: ignore[reportArgumentType] - which is for functions
            compute=ray.data.ActorPoolStrategy(**pool),
            fn_constructor_args=constructor,
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            resources=resources,
        )
        for row in results.iter_rows() if rows else ():
            totals = Totals(row["clips"], row["errors"], row["samples"], row["frames"])
            progress.shard(totals.clips, totals.errors, totals.samples, row["num_bytes"])
            now += totals
    total, num_done = folder.finish()
    return Summary(now, codec.config.sampling_rate, progress.seconds, None, total, num_done, len(shards))


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A connection to Ray, which stays where there was one; its errors in our words."""
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    was_connected = ray.is_initialized()
    try:
        if not was_connected:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    except ConnectionError as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # Ray Data's own are of no common kind
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"the cluster gave up: {cause}") from error
    finally:
        if not was_connected:
            ray.shutdown()


class _Actor:
    """A model on one machine of the cluster, for as many shards as it is given."""

    def __init__(
        self,
        model: str,
        output: str,
        settings: dict[str, Any],
        batch_size: int | None,
        workers: int | None,
        strict: bool,
    ):
        codec = Mimi.from_pretrained(model, decoder=False)
        self._output = Output(Path(output), settings, codec.config.to_dict())
        self._tokenizer = Tokenizer(codec, self._output, batch_size, workers, strict)
        self._rate = codec.config.sampling_rate

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard: Shard = pickle.loads(row["shard"])
        with open(os.devnull, "w") as nowhere:
            progress = Progress(shard.num_bytes, self._rate, nowhere)
            self._tokenizer.run([shard], progress, wait=True)
        return {**self._output.totals(shard.index)._asdict(), "num_bytes": shard.num_bytes}
