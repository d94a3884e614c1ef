"""The real `kyutai/mimi` weights give the values that `transformers` publishes in its own integration tests.

Sums of codes may differ by 3 in 1000, as there: resampling differs from library to library.
"""

import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi

pytestmark = pytest.mark.network

DATASET = "hf-internal-testing/dummy-audio-samples"
CLIP = "obama_first_45_secs.mp3"
# codebooks -> (distance of the normalized waveforms, sum of the codes)
PUBLISHED = {8: (0.00067151, 4_621_433), 32: (0.00049521, 18_446_927)}


@pytest.fixture(scope="module")
def model() -> Mimi:
    try:
        return Mimi.from_pretrained("kyutai/mimi")
    except FileNotFoundError as error:
        pytest.skip(f"NOT CHECKED against the real weights: {error}")


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    from huggingface_hub import hf_hub_download

    return mimi_jax.load_audio(hf_hub_download(DATASET, CLIP, repo_type="dataset"))[None]


@pytest.mark.parametrize("num_quantizers", PUBLISHED)
def test_published_values(model: Mimi, audio: np.ndarray, num_quantizers: int):
    distance, code_sum = PUBLISHED[num_quantizers]
    out = model(audio, num_quantizers=num_quantizers)
    decoded = np.asarray(out.audio_values)
    difference = audio / np.linalg.norm(audio) - decoded / np.linalg.norm(decoded)
    assert decoded.shape == audio.shape
    assert abs(np.sqrt(np.mean(difference**2)) - distance) < 1e-5
    assert abs(int(out.audio_codes.sum()) - code_sum) <= 3e-3 * code_sum
