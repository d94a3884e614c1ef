"""Settings are checked when they are made."""

from typing import Any

import pytest

from mimi_jax.tokenization import Settings


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"max_seconds": 0}, "max_seconds must be positive and finite, got 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be positive and finite, got nan"),
        ({"max_seconds": float("inf")}, "max_seconds must be positive and finite, got inf"),
        ({"clips_per_shard": 0}, "clips_per_shard must be a positive integer, got 0"),
        ({"num_quantizers": 0}, "num_quantizers must be a positive integer, got 0"),
        ({"num_quantizers": 2.0}, r"num_quantizers must be a positive integer, got 2\.0"),
    ],
)
def test_values_that_are_not_allowed_are_refused(options: dict[str, Any], error: str):
    with pytest.raises(ValueError, match=error):
        Settings(**options)


def test_all_codebooks_are_the_default():
    assert Settings().num_quantizers is None
