"""States on disk: a stream continues exactly, on one device or several, and other files are refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import mimi_jax
from mimi_jax import Mimi, load_state, save_state
from tests.models import load_fixture, noise

MODEL = load_fixture("base").model
FRAME = MODEL.config.frame_size
NAMES = ["state.safetensors", "state"]


def half_way(model: Mimi, batch: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """A state after five frames, the audio of five more, and their codes."""
    audio = noise(batch, 1, 10 * FRAME)
    state, _ = mimi_jax.encode_step(model, model.init_encoder_state(batch), audio[:, :, : 5 * FRAME])
    rest = audio[:, :, 5 * FRAME :]
    return state, rest, np.asarray(mimi_jax.encode_step(model, state, rest)[1])


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_stream_continues_from_disk(tmp_path: Path, name: str, dtype: Any):
    model = MODEL.astype(dtype)
    state, audio, codes = half_way(model, 2)
    save_state(tmp_path / name, state)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    loaded = load_state(tmp_path / name, model.init_encoder_state(2))
    assert_equal(loaded, state)
    np.testing.assert_array_equal(mimi_jax.encode_step(model, loaded, audio)[1], codes)


@pytest.mark.parametrize("name", NAMES)
def test_one_session_moves_to_another_server(tmp_path: Path, name: str):
    state, audio, codes = half_way(MODEL, 3)
    save_state(tmp_path / name, mimi_jax.take_rows(state, 1))
    shapes = jax.eval_shape(lambda: MODEL.init_encoder_state(1))
    other = mimi_jax.put_rows(MODEL.init_encoder_state(4), 2, load_state(tmp_path / name, shapes))
    _, got = mimi_jax.encode_step(MODEL, other, np.tile(audio[1], (4, 1, 1)))
    np.testing.assert_array_equal(np.asarray(got)[2], codes[1])


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_are_saved_together(tmp_path: Path, name: str):
    states = half_way(MODEL, 2)[0], MODEL.init_decoder_state(2)
    save_state(tmp_path / name, states)
    assert_equal(load_state(tmp_path / name, states), states)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_restored_over_devices(tmp_path: Path, name: str):
    state, _, _ = half_way(MODEL, 8)
    save_state(tmp_path / name, state)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    like = jax.device_put(MODEL.init_encoder_state(8), NamedSharding(mesh, PartitionSpec("data")))
    loaded = load_state(tmp_path / name, like)
    for leaf in jax.tree.leaves(loaded):
        assert leaf.addressable_shards[0].data.shape[0] == 1
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("like", "error"),
    [
        (MODEL.init_encoder_state(3), r"the saved state does not fit: its batch is \[2\], expected \[3\]$"),
        (MODEL.init_decoder_state(2), "the saved state does not fit: missing .*; unexpected "),
        (
            load_fixture("kernels").model.init_encoder_state(2),
            r"is float32 \[2, .*\], expected float32 \[2, ",
        ),
        (
            jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL.init_encoder_state(2)),
            r"0/0/past is float32 \[2, .*\], expected bfloat16 \[2, .*; 0/1",
        ),
    ],
    ids=["batch", "half", "model", "dtype"],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, name: str, like: Any, error: str):
    path = tmp_path / name
    save_state(path, half_way(MODEL, 2)[0])
    with pytest.raises(ValueError, match=error) as info:
        load_state(path, like)
    assert str(info.value).startswith(f"{path}: ")


def test_other_files_are_refused(tmp_path: Path):
    like = MODEL.init_encoder_state(1)
    for name in NAMES:
        with pytest.raises(FileNotFoundError, match="there is no saved state"):
            load_state(tmp_path / name, like)
    path = tmp_path / "junk.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ValueError, match=f"{path}: not a readable safetensors file"):
        load_state(path, like)
    save_file({"weight": np.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not a saved state: format must be 'mimi_jax.state', got 'pt'"):
        load_state(path, like)
    save_file({}, path, {"format": "mimi_jax.state"})
    with pytest.raises(ValueError, match="the saved state does not fit: missing 0/0/past \\[1, "):
        load_state(path, like)
    save_file({"0/0/past": np.zeros(())}, path, {"format": "mimi_jax.state"})
    with pytest.raises(ValueError, match="the saved state does not fit: missing "):
        load_state(path, like)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / 'folder'}: not a readable Orbax checkpoint"):
        load_state(tmp_path / "folder", like)


def test_a_folder_of_other_files_is_not_lost(tmp_path: Path):
    folder = tmp_path / "sessions"
    folder.mkdir()
    save_state(folder / "1.safetensors", MODEL.init_encoder_state(1))
    with pytest.raises(ValueError, match="sessions is a folder of other files; name a new folder"):
        save_state(folder, MODEL.init_encoder_state(1))
    assert [path.name for path in folder.iterdir()] == ["1.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_follows_the_model(tmp_path: Path, name: str):
    """It moves to the device of the model, as a fresh state does, or to where `like` was put."""
    state, audio, codes = half_way(MODEL, 2)
    save_state(tmp_path / name, state)
    model = jax.device_put(MODEL, jax.devices()[3])
    for like in (MODEL.init_encoder_state(2), jax.device_get(state), jax.eval_shape(lambda: state)):
        loaded = load_state(tmp_path / name, like)
        np.testing.assert_array_equal(mimi_jax.encode_step(model, loaded, audio)[1], codes)
    loaded = load_state(tmp_path / name, jax.device_put(state, jax.devices()[3]))
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(loaded))


def test_the_file_reads_without_this_package(tmp_path: Path):
    state = half_way(MODEL, 2)[0]
    save_state(tmp_path / "state.safetensors", state)
    stored = load_file(tmp_path / "state.safetensors")
    assert len(stored) == len(jax.tree.leaves(state))
    np.testing.assert_array_equal(stored["0/0/past"], state[0][0].past)


@pytest.mark.parametrize("name", NAMES)
def test_a_save_replaces_the_one_before(tmp_path: Path, name: str):
    save_state(tmp_path / name, MODEL.init_encoder_state(1))
    state = half_way(MODEL, 2)[0]
    save_state(tmp_path / name, state)
    assert_equal(load_state(tmp_path / name, state), state)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_state(tmp_path / "nowhere" / name, state)
