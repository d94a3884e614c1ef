"""The real `kyutai/mimi` weights give the values that `transformers` publishes in its own integration tests.

As in those tests, a sum of codes may differ by 3 in 1000, because libraries resample differently. Two sums
have been published for the short clip, with the same distances.
"""

import io

import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi
from mimi_jax.files.audio import read_audio

pytestmark = pytest.mark.network

# (clip, codebooks) -> distance of the normalized waveforms, and the sums of the codes
PUBLISHED = {
    ("short", 8): (0.0018785292, (426_176, 430_423)),
    ("short", 32): (0.0012330565, (1_795_819, 1_803_071)),
    ("long", 8): (0.00067151, (4_621_433,)),
    ("long", 32): (0.00049521, (18_446_927,)),
}


@pytest.fixture(scope="module")
def model() -> Mimi:
    try:
        return Mimi.from_pretrained("kyutai/mimi")
    except FileNotFoundError as error:
        pytest.skip(f"NOT CHECKED against the real weights: {error}")


def read_clip(clip: str) -> np.ndarray:
    """float32 [1, 1, samples] at 24 kHz."""
    if clip == "long":  # 45 s, past the attention window
        from huggingface_hub import hf_hub_download

        repository, name = "hf-internal-testing/dummy-audio-samples", "obama_first_45_secs.mp3"
        return mimi_jax.load_audio(hf_hub_download(repository, name, repo_type="dataset"))[None]
    datasets = pytest.importorskip("datasets", reason="NOT CHECKED on the short clip: needs datasets")
    speech = datasets.load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
    audio = speech.cast_column("audio", datasets.Audio(decode=False))[-1]["audio"]
    return read_audio(io.BytesIO(audio["bytes"]), "librispeech_asr_dummy")[None]


@pytest.mark.parametrize(("clip", "num_quantizers"), PUBLISHED)
def test_published_values(model: Mimi, clip: str, num_quantizers: int):
    distance, code_sums = PUBLISHED[clip, num_quantizers]
    audio = read_clip(clip)
    out = model(audio, num_quantizers=num_quantizers)
    decoded = np.asarray(out.audio_values)
    difference = audio / np.linalg.norm(audio) - decoded / np.linalg.norm(decoded)
    assert decoded.shape == audio.shape
    assert abs(np.sqrt(np.mean(difference**2)) - distance) < 1e-5
    code_sum = int(out.audio_codes.sum())
    assert any(abs(code_sum - published) <= 3e-3 * published for published in code_sums)
