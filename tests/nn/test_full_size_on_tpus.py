"""At full size, the forms for TPUs give the codes and the audio of the portable form, for real speech."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from mimi_jax import Mimi, MimiConfig
from tests.models import relative_error

pytestmark = pytest.mark.slow

FORMS = {
    form: {"network": "large_pieces", "encoder_front": form, "decoder_back": form, "ring": "lanes"}
    for form in ("rows", "pallas")
}
SAMPLES = 2 * 24_000


@pytest.fixture(scope="module")
def audio(shared_speech: list[Path]) -> jax.Array:
    clips = (mimi_jax.load_audio(path)[:, :SAMPLES] for path in shared_speech)
    long = (clip for clip in clips if clip.shape[1] == SAMPLES)
    return jnp.asarray(np.stack([*itertools.islice(long, 9)]))


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_audio_are_those_of_the_portable_form(form: str, audio: jax.Array):
    portable, model = (
        Mimi(MimiConfig(), rngs=nnx.Rngs(0), compute=compute) for compute in ("portable", FORMS[form])
    )
    mask = jnp.arange(SAMPLES)[None] < jnp.full((len(audio), 1), SAMPLES).at[1].set(SAMPLES // 2 + 1)
    codes = mimi_jax.encode(portable, audio, mask).audio_codes
    np.testing.assert_array_equal(mimi_jax.encode(model, audio, mask).audio_codes, codes)
    expected = mimi_jax.decode(portable, codes).audio_values
    assert relative_error(mimi_jax.decode(model, codes).audio_values, expected) < 1e-6
