"""The plan of a job: its shards, and the clips in them. One process lists them, and all read the plan.

`plan.parquet` in the output folder has one row group for each shard of clips that are files of their own,
with one row a clip:

    id       of the clip
    path     of the audio file, or its URL, in bytes
    size     of the audio file in bytes; null if there is none
    start    seconds; where the clip begins in the file
    end      seconds; null for the end of the file
    problem  why the clip cannot be encoded; "" if it can

The metadata of the file lists the shards, archives too. A process reads it when it starts, and the clips of a
shard when its turn comes. So a job of a million clips takes little memory.
"""

import functools
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from mimi_jax.files.corpus import expand_home
from mimi_jax.files.remote import is_remote
from mimi_jax.tokenization.inputs import Shard, find_shards
from mimi_jax.tokenization.settings import DEFAULTS
from mimi_jax.tokenization.sources import Item

KEY = b"mimi_jax.plan"  # of the metadata


class Plan:
    """The shards of a job.

    Args:
        data: the content of plan.parquet.

    Attributes:
        data: the same.
        sources: the sources that were listed, as absolute paths or URLs.
        fingerprint: a hash that is the same for the same clips in the same shards, wherever the files are.
        shards: their items are read each time that they are iterated.
    """

    def __init__(self, data: bytes):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.data = data
        file = pq.ParquetFile(pa.BufferReader(data))
        fields = json.loads(file.metadata.metadata[KEY])
        self.sources: list[str] = fields["sources"]
        self.fingerprint: str = fields["fingerprint"]
        column, groups = fields["audio_column"], iter(range(file.num_row_groups))
        self.shards: list[Shard] = []
        for index, (source, path, num_bytes, left_out) in enumerate(fields["shards"]):
            items = None if path else _Items(file, next(groups))
            self.shards.append(Shard(index, source, items, path, num_bytes, column, Counter(left_out)))


class _Items:
    """The clips of a row group, which is read each time that they are iterated."""

    def __init__(self, file: Any, group: int):
        self._file, self._group = file, group

    def __iter__(self) -> Iterator[Item]:
        columns = (column.to_pylist() for column in self._file.read_row_group(self._group).columns)
        for name, path, size, start, end, problem in zip(*columns, strict=True):
            yield Item(name, _path(path), size=size, start=start, end=end, problem=problem)


def make_plan(
    sources: Sequence[str | os.PathLike[str]],
    clips_per_shard: int = DEFAULTS.clips_per_shard,
    without: str | os.PathLike[str] | None = None,
    audio_column: str = DEFAULTS.audio_column,
) -> Plan:
    """List the shards of some sources. Arguments and errors are those of `find_shards`."""
    import pyarrow.parquet as pq

    digest, shards, file = hashlib.sha256(), [], io.BytesIO()
    with (
        pq.ParquetWriter(file, _schema(), compression="zstd") as writer,
        tqdm(desc="listing", unit=" clips", disable=None, leave=False) as progress,
    ):
        for shard in find_shards(sources, clips_per_shard, without, audio_column):
            digest.update(_identity(shard).encode())
            if shard.items is not None:
                table = _table(shard.items)
                writer.write_table(table, row_group_size=table.num_rows)  # by default it begins a new group
                progress.update(clips_per_shard)
            shards.append((shard.source, shard.path, shard.num_bytes, shard.left_out))
        fields = {
            "sources": absolute(sources),
            "fingerprint": digest.hexdigest()[:16],
            "audio_column": audio_column,
            "shards": shards,
        }
        writer.add_key_value_metadata({KEY: json.dumps(fields)})
    return Plan(file.getvalue())


def absolute(sources: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The sources as a plan records them."""
    return [source if is_remote(source) else os.path.abspath(expand_home(source)) for source in sources]


def _identity(shard: Shard) -> str:
    """What the fingerprint depends on."""
    if shard.items is None:
        return json.dumps([os.path.basename(shard.source), shard.num_bytes])
    return json.dumps(None) + "".join(json.dumps([item.id, item.start, item.end]) for item in shard.items)


@functools.cache
def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("path", pa.binary()),
            ("size", pa.int64()),
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("problem", pa.string()),
        ]
    )


def _table(items: Iterable[Item]) -> Any:
    import pyarrow as pa

    rows = [(item.id, _bytes(item.path), item.size, item.start, item.end, item.problem) for item in items]
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=_schema())


def _bytes(path: str) -> bytes:
    """A path, in which Python may have put single surrogates for bytes that are no text."""
    return path.encode("utf-8", "surrogatepass")


def _path(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
