"""Delays equal those of moshi and of transformers' Moshi, for all shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimi_jax.tokens import delay, undelay

pytestmark = pytest.mark.parity
SIZE = 2048


@st.composite
def codes_and_delays(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Codes [batch, codebooks, frames], as long as the delays or longer: moshi wraps shorter ones."""
    books = draw(st.integers(1, 33))
    delays = draw(st.lists(st.integers(0, 3), min_size=books, max_size=books))
    shape = draw(st.integers(1, 3)), books, draw(st.integers(max(*delays, 1), 12))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, SIZE, shape), delays


@settings(deadline=None, max_examples=60)
@given(codes_and_delays())
def test_delay_equals_that_of_moshi(case: tuple[np.ndarray, list[int]]):
    torch, moshi = pytest.importorskip("torch"), pytest.importorskip("moshi.models.lm_utils")
    codes, delays = case
    initial = torch.arange(SIZE, SIZE + codes.shape[1])[None, :, None].expand(len(codes), -1, -1)
    expected = moshi._delay_sequence(delays, torch.from_numpy(codes), initial).numpy()
    ours = delay(codes, delays, pad=range(SIZE, SIZE + codes.shape[1]))
    np.testing.assert_array_equal(ours[:, :, : codes.shape[2]], expected)


@settings(deadline=None, max_examples=60)
@given(codes_and_delays(), st.booleans())
def test_undelay_equals_that_of_moshi(case: tuple[np.ndarray, list[int]], of_logits: bool):
    """Moshi's function marks the codes that its `_delay_sequence` has cut off as invalid."""
    torch, moshi = pytest.importorskip("torch"), pytest.importorskip("moshi.models.lm_utils")
    tokens, delays = case
    values = np.random.default_rng(0).normal(size=(*tokens.shape, 5)) if of_logits else tokens * 1.0
    values = values.astype(np.float32)
    expected, mask = moshi._undelay_sequence(delays, torch.from_numpy(values))
    frames = tokens.shape[2] - max(delays)
    assert mask[:, :, :frames].all()
    np.testing.assert_array_equal(undelay(values, delays), expected[:, :, :frames])


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 8, 5), (3, 4, 12), (1, 2, 40)])
def test_delay_equals_the_pattern_of_transformers(shape: tuple[int, int, int]):
    torch, module = pytest.importorskip("torch"), pytest.importorskip("transformers.models.moshi")
    codes = np.random.default_rng(0).integers(0, SIZE, shape)
    delays = [0] + [1] * (shape[1] - 1)
    build = module.modeling_moshi.MoshiForConditionalGeneration.build_delay_pattern_mask
    prompt, pattern = build(None, torch.from_numpy(codes), SIZE, SIZE, max_length=shape[2] + 1)
    ours = delay(codes, delays, SIZE)
    np.testing.assert_array_equal(ours, pattern)
    np.testing.assert_array_equal(ours[:, :, : shape[2]], prompt)
    # Without codes, -1 stands where the model is to generate them.
    _, pattern = build(None, torch.from_numpy(codes[:, :, :0]), SIZE, SIZE, max_length=shape[2] + 1)
    np.testing.assert_array_equal(delay(np.full(shape, -1), delays, SIZE), pattern)
