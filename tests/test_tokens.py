"""Codes become tokens in the documented order, and come back exactly, whatever their shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mimi_jax.tokens import delay, flatten, undelay, unflatten

SIZE = 2048
shapes = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 4))
codes_of = hnp.arrays(st.sampled_from([np.uint16, np.int32]), shapes, elements=st.integers(0, SIZE - 1))


def test_delays_are_those_of_the_docstring():
    codes = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    tokens = delay(codes, (0, 1, 1), pad=-1)
    assert tokens.tolist() == [[[1, 2, 3, -1], [-1, 4, 5, 6], [-1, 7, 8, 9]]]
    assert tokens.dtype == jnp.int32


def test_each_codebook_may_have_its_own_pad():
    tokens = delay(np.zeros((2, 2, 1), np.uint16), (2, 0), pad=(32_000, 2048))
    assert tokens.tolist() == [[[32_000, 32_000, 0], [0, 2048, 2048]]] * 2


@settings(deadline=None, max_examples=8)
@given(codes_of, st.data())
def test_undelay_takes_back_delay(codes: np.ndarray, data: st.DataObject):
    books = codes.shape[1]
    delays = data.draw(st.lists(st.integers(0, 4), min_size=books, max_size=books))
    tokens = delay(codes, delays, SIZE)
    assert tokens.shape == (*codes.shape[:2], codes.shape[2] + max(delays))
    assert (tokens == SIZE).sum() == codes.shape[0] * books * max(delays)
    np.testing.assert_array_equal(undelay(tokens, delays), codes)


def test_logits_are_undelayed_with_their_vocabulary():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7, 11)).astype(np.float32)
    result = undelay(logits, (0, 2, 1))
    assert result.shape == (2, 3, 5, 11)
    np.testing.assert_array_equal(result[:, 1], logits[:, 1, 2:])
    np.testing.assert_array_equal(result[:, 2], logits[:, 2, 1:6])


def test_a_padded_row_gets_the_tokens_that_it_gets_alone():
    codes = np.random.default_rng(0).integers(0, SIZE, (2, 4, 6))
    codes[1, :, 4:] = SIZE
    tokens, alone = (delay(rows, (0, 1, 1, 1), SIZE) for rows in (codes, codes[1:, :, :4]))
    np.testing.assert_array_equal(tokens[1, :, :5], alone[0])
    assert (tokens[1, :, 5:] == SIZE).all()


def test_tokens_are_those_of_the_docstring():
    assert flatten(np.array([[[1, 2], [3, 4]]]), 10).tolist() == [[1, 13, 2, 14]]
    assert flatten(np.array([[[1, 2], [3, 4]]]), 10, offset=100).tolist() == [[101, 113, 102, 114]]


@settings(deadline=None, max_examples=8)
@given(codes_of, st.integers(0, 40_000))
def test_unflatten_takes_back_flatten(codes: np.ndarray, offset: int):
    batch, books, frames = codes.shape
    tokens = flatten(codes, SIZE, offset)
    assert tokens.shape == (batch, books * frames) and tokens.dtype == jnp.int32
    places = (np.asarray(tokens) - offset) // SIZE
    np.testing.assert_array_equal(places, np.tile(np.arange(books), (batch, frames)))
    np.testing.assert_array_equal(unflatten(tokens, books, SIZE, offset), codes)


def test_semantic_and_acoustic_streams_share_no_token():
    codes = np.random.default_rng(0).integers(0, SIZE, (1, 8, 50))
    semantic, acoustic = flatten(codes[:, :1], SIZE, 2), flatten(codes[:, 1:], SIZE, 2 + SIZE)
    assert semantic.min() >= 2 and semantic.max() < 2 + SIZE <= acoustic.min()
    back = unflatten(semantic, 1, SIZE, 2), unflatten(acoustic, 7, SIZE, 2 + SIZE)
    np.testing.assert_array_equal(np.concatenate(back, axis=1), codes)


def test_a_token_in_the_wrong_place_is_no_code():
    codes = unflatten(np.array([[SIZE, 0]]), 2, SIZE)
    assert not ((codes >= 0) & (codes < SIZE)).any()


def test_delayed_codes_can_be_interleaved():
    codes = np.random.default_rng(0).integers(0, SIZE, (2, 4, 6))
    delays = (0, 2, 2, 2)

    @jax.jit
    def there_and_back(codes):
        tokens = flatten(delay(codes, delays, SIZE), SIZE + 1, offset=3)
        return tokens, undelay(unflatten(tokens, 4, SIZE + 1, offset=3), delays)

    tokens, back = there_and_back(codes)
    np.testing.assert_array_equal(tokens, flatten(delay(codes, delays, SIZE), SIZE + 1, offset=3))
    np.testing.assert_array_equal(back, codes)


CODES, TOKENS = np.zeros((1, 2, 3), np.int32), np.zeros((1, 6), np.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: delay(CODES[0], (0, 1), 9),
            ValueError,
            r"codes must be \[batch, codebooks, frames\], got \[2",
        ),
        (lambda: delay(CODES + 0.5, (0, 1), 9), TypeError, "codes must be integers, got float"),
        (lambda: delay(CODES, (0, 1, 1), 9), ValueError, r"one for each of 2 codebooks, got \[0, 1, 1\]"),
        (lambda: delay(CODES, (0, -1), 9), ValueError, r"zero or more, .*, got \[0, -1\]"),
        (lambda: delay(CODES, (0, 1), 2.7), ValueError, r"pad must be a token, an integer .* got 2\.7"),  # pyright: ignore[reportArgumentType]
        (lambda: delay(CODES, (0, 1), 2**40), ValueError, "pad must be a token, an integer below"),
        (lambda: undelay(CODES, (0, 4)), ValueError, "as many frames as the longest delay, 4, got 3"),
        (lambda: undelay(TOKENS, (0,)), ValueError, r"tokens must be \[batch, codebooks, frames, ...\], got"),
        (lambda: flatten(TOKENS, 9), ValueError, r"codes must be \[batch, codebooks, frames\]"),
        (lambda: flatten(CODES, 2**30, 1), ValueError, "tokens must be below 2"),
        (lambda: flatten(CODES, 0), ValueError, "codebook_size must be positive"),
        (lambda: unflatten(TOKENS, 4, 9), ValueError, "a multiple of num_codebooks=4, got 6"),
        (lambda: unflatten(CODES, 2, 9), ValueError, r"tokens must be \[batch, tokens\]"),
        (lambda: unflatten(TOKENS * 1.0, 2, 9), TypeError, "tokens must be integers"),
    ],
)
def test_what_cannot_be_used_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arrays_on_a_device_under_a_transfer_guard():
    codes, tokens = jax.device_put((CODES, TOKENS))
    with jax.transfer_guard("disallow"):
        undelay(delay(codes, (0, 1), 9), (0, 1))
        flatten(codes, 9)
        unflatten(tokens, 2, 9)
