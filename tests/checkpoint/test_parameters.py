"""Parameters by name, and models of the first codebooks only."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mimi_jax
from mimi_jax import Mimi, checkpoint
from mimi_jax.files.arrays import orbax_shapes
from tests.checkpoint.folders import FLOAT_LAYOUTS, assert_same_model


@pytest.mark.parametrize("layout", FLOAT_LAYOUTS)
def test_the_first_codebooks_only(base: Path, tmp_path: Path, layout: str):
    whole = Mimi.from_pretrained(base)
    checkpoint.save(whole, tmp_path / "whole", layout)
    few = Mimi.from_pretrained(tmp_path / "whole", num_quantizers=3)
    assert few.config == dataclasses.replace(whole.config, num_quantizers=3)
    audio = np.random.default_rng(0).standard_normal((1, 1, 4000)).astype(np.float32)
    codes = mimi_jax.encode(few, audio).audio_codes
    np.testing.assert_array_equal(codes, mimi_jax.encode(whole, audio, num_quantizers=3).audio_codes)
    decoded = [mimi_jax.decode(model, codes).audio_values for model in (few, whole)]
    np.testing.assert_array_equal(*decoded)
    # A save keeps it so. Its codes have the identity that the whole model gives to its first codes.
    checkpoint.save(few, tmp_path / "few", layout)
    assert_same_model(Mimi.from_pretrained(tmp_path / "few"), few)
    assert checkpoint.model_id(few) == checkpoint.model_id(whole, 3) != checkpoint.model_id(whole)
    assert checkpoint.model_id(few, 1) == checkpoint.model_id(whole, 1) != checkpoint.model_id(few)


@pytest.mark.parametrize("count", [0, 1, 5, True, 2.0])
def test_other_numbers_of_codebooks_are_refused(base: Path, count: int):
    with pytest.raises(ValueError, match=rf"an integer from 2 .* to 4 .*, got {re.escape(repr(count))}$"):
        Mimi.from_pretrained(base, num_quantizers=count)


def test_num_parameters_counts_what_is_stored(base: Path):
    model = Mimi.from_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    assert checkpoint.num_parameters(model) == sum(tensor.size for tensor in tensors.values())
    abstract = checkpoint.abstract_model(model.config)
    assert checkpoint.num_parameters(abstract) == checkpoint.num_parameters(model)


def test_parameters_have_the_names_of_the_flax_layout(base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    checkpoint.save(model, tmp_path / "flax", "flax")
    names = checkpoint.parameters(model).keys()
    assert names == orbax_shapes(tmp_path / "flax" / "params").keys()
    assert {"encoder.first.kernel", "quantizer.acoustic.embedding_sum"} <= names
    assert "quantizer.acoustic.embedding" not in names  # it is derived from the sum
