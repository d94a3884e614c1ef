"""The identity of codes, and the names of the models that make them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mimi_jax import Mimi, checkpoint
from mimi_jax.files.codes import CodeSpec
from tests.checkpoint.folders import read_fixture, write


def test_identity_is_that_of_the_codes(base: Path, tmp_path: Path):
    identity = checkpoint.model_id(Mimi.from_pretrained(base))
    assert re.fullmatch("[0-9a-f]{16}", identity)
    config, tensors = read_fixture("base")
    tensors["decoder.layers.0.conv.bias"] += 1
    assert checkpoint.model_id(Mimi.from_pretrained(write(tmp_path / "a", config, tensors))) == identity
    tensors["quantizer.acoustic_residual_vector_quantizer.layers.0.codebook.embed_sum"][0, 0] += 1
    assert checkpoint.model_id(Mimi.from_pretrained(write(tmp_path / "b", config, tensors))) != identity


@pytest.mark.parametrize("count", [None, 1, 3])
def test_code_spec(base: Path, count: int | None):
    model = Mimi.from_pretrained(base, decoder=False)
    config = model.config
    assert checkpoint.code_spec(model, count) == CodeSpec(
        model_id=checkpoint.model_id(model, count),
        sampling_rate=config.sampling_rate,
        frame_size=config.frame_size,
        codebook_size=config.codebook_size,
        num_codebooks=count or config.num_quantizers,
    )


def test_counts_of_codebooks_that_the_model_does_not_have(base: Path):
    model = Mimi.from_pretrained(base, decoder=False)
    for function in (checkpoint.model_id, checkpoint.code_spec):
        with pytest.raises(ValueError, match="num_quantizers must be an integer from 1 to 4"):
            function(model, 5)


def test_bundled_with(base: Path):
    mini = Mimi.from_pretrained("mini", encoder=False)
    for count in (None, 8):
        spec = checkpoint.code_spec(mini, count)
        assert checkpoint.bundled_with(spec) == "mini"
        assert checkpoint.bundled_with(replace(spec, sampling_rate=16_000)) is None
    assert checkpoint.bundled_with(replace(spec, num_codebooks=64)) is None
    assert checkpoint.bundled_with(checkpoint.code_spec(Mimi.from_pretrained(base))) is None


def test_codes_of_another_model_are_refused(base: Path):
    model = Mimi.from_pretrained(base)
    spec = checkpoint.code_spec(model)
    checkpoint.check_same_codes(spec, model)
    checkpoint.check_same_codes(checkpoint.code_spec(model, 2), model)
    few = Mimi.from_pretrained(base, num_quantizers=2)
    with pytest.raises(ValueError, match="the codes have 4 codebooks, but the model has only 2"):
        checkpoint.check_same_codes(spec, few)
    for field, value in {"model_id": "other", "sampling_rate": 16_000}.items():
        with pytest.raises(ValueError, match=f"their {field} is {value}, that of the model"):
            checkpoint.check_same_codes(replace(spec, **{field: value}), model)
