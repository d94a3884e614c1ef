"""The error about memory says what to do."""

import pytest

from mimi_jax.tokenization.tokenizer import explained_memory_errors


def test_too_little_memory_is_explained():
    error = "the device has too little memory; lower batch_size"
    with pytest.raises(ValueError, match=error), explained_memory_errors():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 98765432100 bytes")


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="INTERNAL: a bug"), explained_memory_errors():
        raise RuntimeError("INTERNAL: a bug")
