"""What decides the codes of a corpus, and which clips share an output file."""

import dataclasses
import math

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the codes of a corpus, and which clips share an output file.

    They are recorded in the output's manifest. A job can be resumed only with the settings it began with.

    Attributes:
        num_quantizers: how many codebooks to keep, counted from the first. None keeps all of the model's.
        dtype: of weights and activations. "float32" gives exactly the codes of `encode`; "bfloat16" is faster
            and changes some of them.
        clips_per_shard: clips in one output file. An archive (.tar or .parquet) always becomes one file.
        max_seconds: the longest clip that is encoded, in seconds. A longer one is listed as an error.
        audio_column: the column of Parquet files that has the audio: bytes, paths, or {bytes, path}.

    Raises:
        ValueError: a value is not allowed.
    """

    num_quantizers: int | None = None
    dtype: str = "float32"
    clips_per_shard: int = 1000
    max_seconds: float = 24 * 3600.0
    audio_column: str = "audio"

    def __post_init__(self) -> None:
        for name, value in (
            ("num_quantizers", self.num_quantizers),
            ("clips_per_shard", self.clips_per_shard),
        ):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds must be positive and finite, got {self.max_seconds}")


DEFAULTS = Settings()
