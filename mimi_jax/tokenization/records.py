"""What a job records: the codes of clips, clips that failed, and counts of both. And these as tables."""

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.files.corpus import as_utf8

FORMAT = "mimi_jax.tokens"  # in the manifest of an output, and in its files of codes


class Totals(NamedTuple):
    """Counts of one shard, or of several."""

    clips: int = 0  # that have codes
    errors: int = 0  # clips without codes
    samples: int = 0
    frames: int = 0
    left_out: Counter[str] = Counter()  # noqa: RUF012 - never changed; files that are no clips, by suffix
    transient: int = 0  # those of the errors after which a second try may succeed

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]
        return Totals(
            self.clips + other.clips,
            self.errors + other.errors,
            self.samples + other.samples,
            self.frames + other.frames,
            self.left_out + other.left_out,
            self.transient + other.transient,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "Totals":
        """Read what `json.dumps` made of totals."""
        return cls.from_fields(*json.loads(text))

    @classmethod
    def from_fields(
        cls,
        clips: int,
        errors: int,
        samples: int,
        frames: int,
        left_out: Mapping[str, int] = MappingProxyType({}),
        transient: int = 0,
    ) -> "Totals":
        """Totals of the fields that JSON has of them. Older outputs have only the first ones."""
        return cls(clips, errors, samples, frames, Counter(left_out), transient)

    def hours(self, sampling_rate: int) -> float:
        """Hours of audio, at a sampling rate in Hz."""
        return self.samples / sampling_rate / 3600


class TokenizedClip(NamedTuple):
    """A clip and its codes."""

    id: str
    source: str  # the folder, pattern or file that the clip was found in
    num_samples: int
    codes: np.ndarray  # uint16 [num_quantizers, num_frames]


class Failure(NamedTuple):
    """A clip that could not be encoded."""

    id: str
    source: str
    reason: str
    is_transient: bool = False  # a second try may succeed, so the next run makes one


MOST_CODES = 2**31 - 1  # of a column in one piece: days of audio with all codebooks


@functools.cache
def code_schema() -> Any:
    """The columns of a file of codes."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("num_samples", pa.int64()),
            ("num_frames", pa.int32()),
            ("num_quantizers", pa.int32()),
            ("codes", pa.list_(pa.uint16())),
        ]
    )


def table_of_clips(clips: Sequence[TokenizedClip]) -> Any:
    """Clips as a table of `code_schema`."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(clip.codes.size for clip in clips)])
    if offsets[-1] > MOST_CODES:
        half = len(clips) // 2
        return pa.concat_tables([table_of_clips(clips[:half]), table_of_clips(clips[half:])])
    flat = np.concatenate([np.zeros(0, np.uint16), *(clip.codes.ravel() for clip in clips)])
    columns = [
        [clip.id for clip in clips],
        [clip.source for clip in clips],
        [clip.num_samples for clip in clips],
        [clip.codes.shape[1] for clip in clips],
        [len(clip.codes) for clip in clips],
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat)),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, code_schema(), strict=True)]
    return pa.table(arrays, schema=code_schema())


def table_of_failures(failures: Sequence[Failure]) -> Any:
    """Failures as a table: a column for each field."""
    import pyarrow as pa

    # A URL may hold half of a surrogate pair, which UTF-8 does not have.
    clean = [failure._replace(reason=as_utf8(failure.reason)) for failure in failures]
    columns = map(list, zip(*clean, strict=True))
    return pa.table(dict(zip(Failure._fields, columns, strict=True)))
