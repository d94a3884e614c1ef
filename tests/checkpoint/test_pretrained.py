"""The options of loading: dtype, devices and halves."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi, checkpoint
from tests.checkpoint.folders import assert_same_model, read_fixture, write


def test_flax_layout_restores_sharded(base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    checkpoint.save(model, tmp_path / "flax", "flax")
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    for folder in (base, tmp_path / "flax"):
        sharded = Mimi.from_pretrained(folder, sharding=everywhere)
        for leaf in jax.tree.leaves(sharded):
            assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim)
        assert_same_model(sharded, model)


@pytest.mark.parametrize("layout", ["transformers", "flax"])
def test_bfloat16_survives(base: Path, tmp_path: Path, layout: str):
    model = Mimi.from_pretrained(base, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16 and model.quantizer.semantic.embedding.dtype == jnp.float32
    checkpoint.save(model, tmp_path / "saved", layout)
    assert_same_model(Mimi.from_pretrained(tmp_path / "saved", dtype=None), model)


def test_stored_bfloat16_is_read(tmp_path: Path):
    config, tensors = read_fixture("base")
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    model = Mimi.from_pretrained(write(tmp_path / "half", config, half))
    assert model.dtype == jnp.float32
    expected = half["downsample.conv.weight"].astype(np.float32).transpose(2, 1, 0)
    assert model.downsample is not None
    np.testing.assert_array_equal(model.downsample.kernel[...], expected)


@pytest.mark.parametrize("layout", ["transformers", "flax"])
def test_halves(base: Path, tmp_path: Path, layout: str):
    checkpoint.save(Mimi.from_pretrained(base), tmp_path / "whole", layout)
    whole = Mimi.from_pretrained(base)
    encoder = Mimi.from_pretrained(tmp_path / "whole", decoder=False)
    decoder = Mimi.from_pretrained(tmp_path / "whole", encoder=False)
    assert encoder.decoder is None and decoder.encoder is None
    parameters = checkpoint.parameters(whole)
    for name, parameter in checkpoint.parameters(encoder).items():
        np.testing.assert_array_equal(parameter[...], parameters[name][...])
    assert {checkpoint.model_id(m) for m in (whole, encoder, decoder)} == {checkpoint.model_id(whole)}
    # A saved half is loaded as that half; to ask for the other half is an error.
    checkpoint.save(encoder, tmp_path / "half", layout)
    half = Mimi.from_pretrained(tmp_path / "half")
    assert_same_model(half, encoder)
    with pytest.raises(ValueError, match="has no decoder"):
        mimi_jax.decode(half, np.zeros((1, 2, 3), np.int32))
    with pytest.raises(ValueError, match="saved without its decoder, which was asked for"):
        Mimi.from_pretrained(tmp_path / "half", encoder=False)
