"""Every option of the configuration gives the results of the references, which are in tests/fixtures."""

import jax
import numpy as np
import pytest

from mimi_jax.model import Mimi
from tests.models import (
    check_wide,
    fixture_names,
    load_fixture,
    load_wide,
    relative_error,
    wide_audio,
    wide_model,
)

# Clip 0 is six windows long, clip 1 ends inside a frame (in `kyutai` all frames are whole), clip 2 has 3
# samples. Compiling for a length takes a second, so most options skip clip 0, which adds nothing but length.
CLIPS = {"base": [0, 1, 2], "kyutai": [0, 1]}
CASES = [(name, clip) for name in fixture_names() for clip in CLIPS.get(name, [1, 2])]


@jax.jit
def roundtrip(model: Mimi, audio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    latents = model.encode_latents(audio)
    codes = model.quantize(latents)
    return latents, codes, model.decode_latents(model.dequantize(codes))


@pytest.mark.parametrize(("name", "clip"), CASES)
def test_equals_the_reference(name: str, clip: int):
    model, clips = load_fixture(name)
    expected = clips[clip]
    latents, codes, audio = roundtrip(model, expected.audio)
    np.testing.assert_array_equal(codes, expected.audio_codes)
    assert relative_error(latents, expected.latents) < 1e-5
    assert relative_error(audio, expected.audio_values) < 1e-5


def test_no_fixture_is_missing():
    assert len(fixture_names()) == 15


def test_layers_of_the_published_sizes_give_what_is_stored():
    """What GPUs are compared with, in tests/test_gpu.py."""
    model = wide_model()
    latents, codes, _ = roundtrip(model, wide_audio())
    audio = jax.jit(lambda model, codes: model.decode_latents(model.dequantize(codes)))(
        model, load_wide()["audio_codes"]
    )
    check_wide(latents, codes, audio)
