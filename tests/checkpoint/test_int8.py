"""Int8 weights: what is rounded, what stays as it is, files that come back bit for bit, and errors."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mimi_jax
from mimi_jax import Mimi, MimiConfig, checkpoint, cli, export
from mimi_jax.checkpoint import int8
from mimi_jax.checkpoint.int8 import WEIGHTS, Int8Param, weights_of
from mimi_jax.files.arrays import named_variables
from mimi_jax.model import HALVES
from tests.checkpoint.folders import FLOAT_LAYOUTS, assert_same_model
from tests.models import load_fixture, relative_error

SPEECH = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"


@pytest.fixture(scope="module")
def model() -> Mimi:
    return Mimi.from_pretrained("mini")


@pytest.fixture(scope="module")
def small() -> Mimi:
    return Mimi.from_pretrained("mini", weights="int8")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return mimi_jax.load_audio(SPEECH)[None, :, : 2 * 24_000]


def assert_same_variable(got: nnx.Variable, expected: nnx.Variable) -> None:
    assert type(got) is type(expected) and got.dtype == expected.dtype
    np.testing.assert_array_equal(got[...], expected[...])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("fixture", ["base", "gqa"])
def test_every_kernel_of_its_halves_and_nothing_else(weights: str, fixture: str):
    model = load_fixture(fixture).model
    small = int8.to_int8(model, weights)
    parts = {part for half in WEIGHTS[weights] for part in HALVES[half]}
    before = named_variables(model)
    for name, variable in named_variables(small).items():
        is_matrix, part = len(before[name].shape) > 1, name.split(".")[0]
        assert isinstance(variable, Int8Param) == (is_matrix and part in parts), name
        if not isinstance(variable, Int8Param):
            assert_same_variable(variable, before[name])
    assert weights_of(small) == weights and weights_of(model) is None
    assert small.dtype == jnp.float32


def test_rounding_follows_the_definition(model: Mimi, small: Mimi):
    """A scale is the largest magnitude of its output channel over 127.5; values are nearest."""
    before = named_variables(model)
    for name, variable in named_variables(small).items():
        if isinstance(variable, Int8Param):
            kernel = np.asarray(before[name][...])
            values, scales = map(np.asarray, variable.get_raw_value())
            assert values.dtype == np.int8 and values.shape == kernel.shape and scales.dtype == np.float32
            inner = {2: (0,), 3: (0, 1), 5: (0, 2, 3)}[kernel.ndim]
            expected = np.abs(kernel).max(inner, keepdims=True) / np.float32(127.5)
            np.testing.assert_allclose(scales, expected, rtol=1e-6)
            assert np.all(np.abs(values * scales - kernel) <= 0.5001 * scales)


@pytest.mark.parametrize("name, dtype", [*((name, jnp.float32) for name in WEIGHTS), ("int8", jnp.bfloat16)])
def test_files_come_back_bit_for_bit(model: Mimi, tmp_path: Path, name: str, dtype):
    small = int8.to_int8(model.astype(dtype), name)
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"weights": name}
    assert checkpoint.layout_of(tmp_path) == "int8"
    assert_same_model(Mimi.from_pretrained(tmp_path, dtype=None), small)
    assert_same_model(Mimi.from_pretrained(tmp_path, dtype=None, weights=name), small)
    assert_same_model(Mimi.from_pretrained(tmp_path), small.astype(jnp.float32))
    assert checkpoint.model_id(small) == checkpoint.model_id(model)


def test_loading_and_running_need_no_qwix(small: Mimi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "qwix", None)
    assert_same_model(Mimi.from_pretrained(tmp_path, weights="int8"), small)
    with pytest.raises(ImportError, match=r"made by qwix; install it: pip install 'mimi_jax\[int8\]'"):
        Mimi.from_pretrained("mini", weights="int8")


def test_the_file_has_the_expected_size(model: Mimi, small: Mimi, tmp_path: Path):
    small.save_pretrained(tmp_path)
    expected = 0
    for name, parameter in checkpoint.parameters(model).items():
        size = np.prod(parameter.shape)
        if name.startswith("quantizer.") or len(parameter.shape) == 1:
            expected += 4 * size
        else:
            num_channels = np.prod([parameter.shape[axis] for axis in int8.OUTPUT_AXES[len(parameter.shape)]])
            expected += size + 4 * num_channels
    size_of_header = 30_000  # at most
    assert expected < (tmp_path / "model.safetensors").stat().st_size < expected + size_of_header


@pytest.mark.parametrize("num_quantizers, share", [(32, 0.387), (8, 0.294)])
def test_the_share_at_full_size(num_quantizers: int, share: float):
    """The sizes in docs/speed.md, of the published architecture with 32 and with 8 codebooks."""
    model = checkpoint.abstract_model(MimiConfig(num_quantizers=num_quantizers))

    def num_bytes(model: Mimi) -> int:
        leaves = jax.tree.leaves([p.get_raw_value() for p in checkpoint.parameters(model).values()])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    ratio = num_bytes(int8.abstract_int8(model, "int8")) / num_bytes(model)
    assert ratio == pytest.approx(share, abs=5e-4)


def test_codes_and_audio_are_close(model: Mimi, small: Mimi, speech: np.ndarray):
    codes = mimi_jax.encode(model, speech).audio_codes
    rounded = mimi_jax.encode(small, speech).audio_codes
    assert np.mean(rounded[:, 0] == codes[:, 0]) > 0.9
    assert np.mean(rounded[:, :8] == codes[:, :8]) > 0.7
    audio = mimi_jax.decode(model, codes).audio_values
    assert 1e-4 < relative_error(mimi_jax.decode(small, codes).audio_values, audio) < 0.1


def test_to_float_gives_the_same_function(small: Mimi, speech: np.ndarray, tmp_path: Path):
    plain = int8.to_float(small)
    assert weights_of(plain) is None
    latents = plain.encode_latents(speech)
    assert relative_error(small.encode_latents(speech), latents) < 1e-5
    checkpoint.save(plain, tmp_path, "kyutai")
    assert_same_model(Mimi.from_pretrained(tmp_path), plain)


def test_steps_give_the_codes_of_the_whole_clip(small: Mimi, speech: np.ndarray):
    codes = mimi_jax.encode(small, speech, num_quantizers=8).audio_codes
    encoder, decoder = mimi_jax.StreamingEncoder(small, 1, 8), mimi_jax.StreamingDecoder(small)
    frames = np.split(speech, speech.shape[2] // small.config.frame_size, axis=2)
    steps: list[Any] = [encoder.push(frame) for frame in frames]
    np.testing.assert_array_equal(np.concatenate(steps, axis=2), codes)
    audio: list[Any] = [decoder.push(step) for step in steps]
    expected = mimi_jax.decode(small, codes).audio_values
    assert relative_error(np.concatenate(audio, axis=2), expected) < 1e-5


def test_weights_are_int8_inside_a_program(small: Mimi):
    """A program takes them as they are, and makes them larger only while it runs."""
    audio = jax.ShapeDtypeStruct((1, 1, 1920), jnp.float32)
    inputs = jax.jit(mimi_jax.encode).trace(small, audio).jaxpr.in_avals
    kernels = [variable for variable in named_variables(small).values() if isinstance(variable, Int8Param)]
    shapes = [kernel.get_raw_value().values.shape for kernel in kernels]
    assert sorted(aval.shape for aval in inputs if aval.dtype == jnp.int8) == sorted(shapes)


def test_gradients_flow_through_latents(small: Mimi):
    latents = jnp.full((1, 2, small.config.hidden_size), 0.1)
    gradient = jax.grad(lambda latents: (small.decode_latents(latents) ** 2).sum())(latents)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_halves_of_models(small: Mimi, tmp_path: Path):
    encoder = Mimi.from_pretrained("mini", weights="int8", decoder=False)
    assert encoder.decoder is None and weights_of(encoder) == "int8"
    encoder.save_pretrained(tmp_path / "encoder")
    for name in (None, "int8", "int8-encoder"):
        assert_same_model(Mimi.from_pretrained(tmp_path / "encoder", weights=name), encoder)
    small.save_pretrained(tmp_path / "whole")
    assert_same_model(Mimi.from_pretrained(tmp_path / "whole", decoder=False), encoder)
    int8.to_int8(Mimi.from_pretrained("mini"), "int8-encoder").save_pretrained(tmp_path / "mixed")
    decoder = Mimi.from_pretrained(tmp_path / "mixed", encoder=False)
    assert_same_model(decoder, Mimi.from_pretrained("mini", encoder=False))


def test_int8_weights_are_not_rounded_again(model: Mimi, small: Mimi):
    in_turns = int8.to_int8(int8.to_int8(model, "int8-encoder"), "int8-decoder")
    assert weights_of(in_turns) == "int8"
    assert_same_model(in_turns, small)
    assert_same_model(int8.to_int8(small), small)


def test_exported_and_replicated(tmp_path: Path):
    model = load_fixture("base").model
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    small = int8.to_int8(model)
    small.save_pretrained(tmp_path / "saved")
    sharded = Mimi.from_pretrained(tmp_path / "saved", sharding=everywhere)
    assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(sharded))
    export.save(small, tmp_path / "base.zip", seconds=1.0, platforms=["cpu"])
    audio = load_fixture("base").clips[0].audio[:1, :, : model.config.frame_size]
    codes = export.load(tmp_path / "base.zip").encode(audio).audio_codes
    np.testing.assert_array_equal(codes, mimi_jax.encode(small, audio).audio_codes)


def test_unknown_weights():
    for name in ("int4", "", {"encoder": "int8"}):
        with pytest.raises(ValueError, match="weights must be one of int8, int8-encoder, int8-decoder, got"):
            Mimi.from_pretrained("mini", weights=name)  # pyright: ignore[reportArgumentType]


def test_a_half_that_is_not_there():
    with pytest.raises(ValueError, match="weights='int8-encoder' needs a half that this model does not have"):
        Mimi.from_pretrained("mini", weights="int8-encoder", encoder=False)


@pytest.mark.parametrize("layout", FLOAT_LAYOUTS)
def test_other_layouts_cannot_hold_it(small: Mimi, tmp_path: Path, layout: str):
    with pytest.raises(ValueError, match=rf"cannot be stored in the layout '{layout}'.*int8\.to_float"):
        checkpoint.save(small, tmp_path / "new", layout)
    assert not (tmp_path / "new").exists()


def test_a_half_that_is_not_loaded(model: Mimi, tmp_path: Path):
    int8.to_int8(model, "int8-decoder").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights='int8-decoder' needs a half that this model does not have"):
        Mimi.from_pretrained(tmp_path, decoder=False, weights="int8-decoder")


def test_other_weights_than_the_stored_ones(model: Mimi, tmp_path: Path):
    int8.to_int8(model, "int8-encoder").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved with weights='int8-encoder', and 'int8' was asked for"):
        Mimi.from_pretrained(tmp_path, weights="int8")


def test_kernels_are_rounded_once(model: Mimi, small: Mimi, tmp_path: Path):
    model.save_pretrained(tmp_path)
    half = Mimi.from_pretrained(tmp_path, weights="int8", dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(small.astype(jnp.bfloat16)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_without_its_config_is_refused(small: Mimi, tmp_path: Path):
    small.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "alone.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds int8 weights; put the config\.json that was saved with it"):
        Mimi.from_pretrained(tmp_path / "alone.safetensors")


def test_the_command_line_converts_to_floats(small: Mimi, tmp_path: Path):
    small.save_pretrained(tmp_path / "int8")
    assert (
        cli.main(["convert", str(tmp_path / "int8"), str(tmp_path / "floats"), "--to", "transformers"]) == 0
    )
    floats = Mimi.from_pretrained(tmp_path / "floats")
    for a, b in zip(jax.tree.leaves(floats), jax.tree.leaves(int8.to_float(small)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_everything_that_does_not_fit_is_named(small: Mimi, tmp_path: Path):
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.first.kernel_scale"]
    tensors["downsample.kernel"] = tensors["downsample.kernel"].astype(np.float32)
    tensors["upsample.kernel_zero"] = np.zeros(1, np.int8)
    tensors["decoder.first.bias"] = tensors["decoder.first.bias"].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Mimi.from_pretrained(tmp_path)
    for problem in (
        r"missing encoder.first.kernel_scale [1, 1, 16]",
        r"unexpected upsample.kernel_zero",
        r"downsample.kernel is float32 [4, 128, 128], expected int8 [4, 128, 128]",
        r"decoder.first.bias is int8 [256], expected floating point [256]",
    ):
        assert problem in str(error.value)
    fields = json.loads((tmp_path / "config.json").read_text())
    for mark in ({"quant_method": "gptq"}, {"weights": "int4"}, {}, "gptq"):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": mark}))
        with pytest.raises(
            ValueError, match=r"config\.json: quantization_config must be .* one of int8, int8-enc.*, got"
        ):
            Mimi.from_pretrained(tmp_path)
