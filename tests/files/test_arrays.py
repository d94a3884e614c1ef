"""Named arrays: their names, what differs between two sets, and files that come back bit for bit."""

import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mimi_jax.files.arrays import (
    ORBAX_MARK,
    SafetensorsFile,
    differences,
    named_leaves,
    named_variables,
    orbax_shapes,
    restore_orbax,
    with_values,
    write_orbax,
    write_safetensors,
)

FLOAT, HALF, INTEGER = jnp.float32, jnp.bfloat16, jnp.int32


class Statistic(nnx.Variable):
    pass


class Layer(nnx.Module):
    def __init__(self, value: float):
        self.kernel = nnx.Param(jnp.full((2, 3), value))
        self.usage = Statistic(jnp.zeros(2))


class Stack(nnx.Module):
    def __init__(self):
        self.first = Layer(1.0)
        self.layers = nnx.List([Layer(2.0), Layer(3.0)])


def shape(*lengths: int, dtype=FLOAT) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, dtype)


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = {
        "a.kernel": generator.normal(size=(3, 4)).astype(np.float32).T,
        "b": np.arange(5, dtype=np.int8),
    }
    return {**values, "half": generator.normal(size=7).astype(HALF), "0/1/key": np.zeros((), np.float32)}


def assert_same(got, expected) -> None:
    assert dict(got).keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert np.asarray(got[name]).tobytes() == np.ascontiguousarray(array).tobytes()


def test_leaves_are_named_by_their_paths():
    tree = ({"key": 1, "value": 2}, [3, (4, None)])
    assert named_leaves(tree, "/") == {"0/key": 1, "0/value": 2, "1/0": 3, "1/1/0": 4}
    assert list(named_leaves(tree, ".")) == ["0.key", "0.value", "1.0", "1.1.0"]


def test_variables_are_named_by_their_places():
    kernels = ["first.kernel", "layers.0.kernel", "layers.1.kernel"]
    assert list(named_variables(Stack(), nnx.Param)) == kernels
    assert named_variables(Stack()).keys() == {*kernels, "first.usage", "layers.0.usage", "layers.1.usage"}
    assert named_variables(Stack(), nnx.Not(nnx.Param)).keys() == named_variables(Stack(), Statistic).keys()


def test_new_values_leave_the_original_as_it_was():
    stack = Stack()
    changed = with_values(stack, {"layers.1.kernel": jnp.full((2, 3), 7.0), "first.usage": jnp.ones(2)})
    values = {name: float(v[...].ravel()[0]) for name, v in named_variables(changed).items()}
    assert (values["layers.1.kernel"], values["first.usage"], values["layers.0.kernel"]) == (7, 1, 2)
    assert isinstance(changed.first.usage, Statistic)
    assert float(stack.layers[1].kernel[0, 0]) == 3
    assert changed.first.kernel[...] is stack.first.kernel[...]
    with pytest.raises(KeyError, match="second"):
        with_values(stack, {"second.kernel": jnp.zeros(1)})


def test_every_difference_is_reported():
    expected = {"a": shape(2, 3), "b": shape(4), "c": shape(5, dtype=INTEGER), "d": shape(1)}
    assert differences(expected, expected) == []
    found = {"x": shape(1), "d": shape(2), "c": shape(5), "b": shape(4, dtype=HALF), "other": shape(9)}
    assert differences(found, expected, optional={"other"}) == [
        "missing a [2, 3]",
        "unexpected x",
        "b is bfloat16 [4], expected float32 [4]",
        "c is float32 [5], expected int32 [5]",
        "d is float32 [2], expected float32 [1]",
    ]


def test_any_float_may_stand_for_another_float():
    expected = {"a": shape(2), "b": shape(2, dtype=INTEGER)}
    found = {"a": shape(2, dtype=HALF), "b": shape(2, dtype=INTEGER)}
    assert differences(found, expected, any_float=True) == []
    assert differences({"a": shape(2, dtype=INTEGER), "b": shape(2)}, expected, any_float=True) == [
        "a is int32 [2], expected floating point [2]",
        "b is float32 [2], expected int32 [2]",
    ]


def test_safetensors_come_back_bit_for_bit(tmp_path: Path):
    path = tmp_path / "arrays.safetensors"
    write_safetensors(path, arrays(), {"format": "test"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "test"} and len(file) == 4
    assert_same(file, arrays())
    assert "b" in file and "c" not in file
    with pytest.raises(KeyError, match="c"):
        file["c"]
    assert_same(safetensors.numpy.load_file(path), arrays())


def test_strided_and_scalar_arrays_are_stored_as_they_look(tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.arange(6).reshape(2, 3).T, "b": np.int8(1)}, {})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(file["a"], [[0, 3], [1, 4], [2, 5]])
    assert file["b"].shape == () and file["b"] == 1


def test_a_safetensors_file_is_written_whole_and_readable_by_others(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    write_safetensors(tmp_path / "a.safetensors", arrays(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "plain"]
    plain, written = (stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.iterdir(), reverse=True))
    assert plain == written
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_safetensors(tmp_path / "nowhere" / "a.safetensors", arrays(), {})


def test_files_that_are_not_safetensors(tmp_path: Path):
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("junk", "missing", "."):
        with pytest.raises(ValueError, match=r"not a readable safetensors file \(") as error:
            SafetensorsFile(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path))


def test_orbax_folders_come_back_bit_for_bit(tmp_path: Path):
    plain = {name.replace("/", "."): array for name, array in arrays().items()}
    write_orbax(tmp_path / "folder", plain)
    assert (tmp_path / "folder" / ORBAX_MARK).is_file()
    found = orbax_shapes(tmp_path / "folder")
    shapes = {name: shape(*array.shape, dtype=array.dtype) for name, array in plain.items()}
    assert differences(found, shapes) == []
    restored = restore_orbax(tmp_path / "folder", shapes)
    assert_same(restored, plain)
    assert all(array.devices() == {jax.devices()[0]} for array in restored.values())


def test_orbax_folders_restore_over_several_devices(tmp_path: Path):
    write_orbax(tmp_path / "folder", {"a": jnp.arange(16.0)})
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    like = {"a": jax.ShapeDtypeStruct((16,), FLOAT, sharding=sharding)}
    restored = restore_orbax(tmp_path / "folder", like)["a"]
    assert restored.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(restored, np.arange(16.0))


@pytest.mark.parametrize("kept", [None, ORBAX_MARK])
def test_folders_that_are_not_from_orbax(tmp_path: Path, kept: str | None):
    folder = tmp_path / "folder"
    write_orbax(folder, {"a": jnp.zeros(2)})
    for file in folder.iterdir():
        if file.is_file() and file.name != kept:
            file.unlink()
    with pytest.raises(ValueError, match=f"^{folder}: not a readable Orbax checkpoint"):
        orbax_shapes(folder)
