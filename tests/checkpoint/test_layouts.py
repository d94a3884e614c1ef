"""Every layout is read strictly, in all its variants, and written back bit for bit."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mimi_jax import Mimi, MimiConfig, checkpoint
from mimi_jax.checkpoint.int8 import to_int8
from mimi_jax.checkpoint.layouts import LAYOUTS
from mimi_jax.checkpoint.layouts.files import ModelFiles
from mimi_jax.checkpoint.layouts.names import weight_table
from mimi_jax.files.arrays import orbax_shapes, write_orbax
from tests.checkpoint.folders import (
    FLOAT_LAYOUTS,
    Tensors,
    assert_same_model,
    assert_same_tensors,
    read_fixture,
    write,
)
from tests.models import fixture_names


@pytest.mark.parametrize("name", fixture_names())
def test_transformers_layout_bit_for_bit(name: str, tmp_path: Path):
    config, tensors = read_fixture(name)
    model = Mimi.from_pretrained(write(tmp_path / "there", config, tensors))
    model.save_pretrained(tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert MimiConfig.from_json(tmp_path / "back" / "config.json") == model.config


def test_kyutai_layout_bit_for_bit(tmp_path: Path):
    config, tensors = read_fixture("kyutai")
    native = read_fixture("kyutai", "kyutai/")[1]
    model = Mimi.from_pretrained(write(tmp_path / "native", config, native))
    assert_same_model(model, Mimi.from_pretrained(write(tmp_path / "flat", config, tensors)))
    checkpoint.save(model, tmp_path / "back", "kyutai")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), native)
    assert_same_model(Mimi.from_pretrained(tmp_path / "back"), model)


def test_flax_layout_bit_for_bit(base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    checkpoint.save(model, tmp_path / "flax", "flax")
    assert_same_model(Mimi.from_pretrained(tmp_path / "flax"), model)
    assert not (tmp_path / "flax" / "model.safetensors").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_the_model_that_was_saved_last_is_loaded(before: str, layout: str, base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    older = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == jnp.float32 else leaf, model)
    older = to_int8(older) if before == "int8" else older
    model = to_int8(model) if layout == "int8" else model
    checkpoint.save(older, tmp_path, before)
    checkpoint.save(model, tmp_path, layout)
    assert_same_model(Mimi.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("layout", ["flax", "transformers"])
def test_a_checkpoint_of_something_else_is_kept(layout: str, base: Path, tmp_path: Path):
    model, folder = Mimi.from_pretrained(base), tmp_path / "run"
    folder.mkdir()
    write_orbax(folder / "params", {"another_model": np.zeros(3)})
    with pytest.raises(ValueError, match="params is not of a Mimi, and would be lost; name another folder"):
        checkpoint.save(model, folder, layout)
    assert orbax_shapes(folder / "params").keys() == {"another_model"}
    assert [path.name for path in folder.iterdir()] == ["params"]


def test_other_files_in_a_folder_of_that_name_are_kept(base: Path, tmp_path: Path):
    model, file = Mimi.from_pretrained(base), tmp_path / "params" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(ValueError, match="params is not of a Mimi"):
        checkpoint.save(model, tmp_path, "flax")
    checkpoint.save(model, tmp_path, "transformers")
    assert_same_model(Mimi.from_pretrained(tmp_path), model)
    assert file.read_text() == "mine"


def test_one_parameter_twice_is_refused(tmp_path: Path):
    config, tensors = read_fixture("kyutai")
    name = "encoder.layers.0.conv.weight"
    twice = tensors | {f"encoder.encoder_seanet.{name.removeprefix('encoder.')}": tensors[name]}
    with pytest.raises(ValueError, match=f"and another tensor are both {name}; keep one of them"):
        Mimi.from_pretrained(write(tmp_path / "twice", config, twice))


def test_the_config_of_a_language_model_is_not_that_of_mimi(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"card": 2048, "mimi_name": "mimi.safetensors"}')
    (tmp_path / "mimi.safetensors").touch()
    files = ModelFiles(tmp_path / "mimi.safetensors")
    assert not files.has_config and files.fields == {}


NESTED = {
    r"^encoder\.layers": "encoder.encoder_seanet.layers",
    r"^decoder\.layers": "decoder.decoder_seanet.layers",
    r"^(encoder_transformer|downsample)\.": r"encoder.\1.",
    r"^(decoder_transformer|upsample)\.": r"decoder.\1.",
}


NATIVE_ALIASES = [
    {r"in_proj_weight$": "in_proj.weight", r"_codebook\.embedding_sum": "_codebook.embed_avg"},
    {r"in_proj_weight$": "in_projs.0.weight", r"out_proj\.weight$": "out_projs.0.weight"},
    {
        r"_codebook\._initialized": "_codebook.inited",
        r"_codebook\.cluster_usage": "_codebook.cluster_size",
        r"_codebook\.embedding_sum": "_codebook.embed_sum",
    },
]


@pytest.mark.parametrize(
    "prefix, aliases", [("weights/", NESTED), *(("kyutai/", aliases) for aliases in NATIVE_ALIASES)]
)
def test_other_names(tmp_path: Path, prefix: str, aliases: dict[str, str]):
    config, tensors = read_fixture("kyutai", prefix)
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in aliases.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    assert len(renamed.keys() - tensors.keys()) >= 4
    model = Mimi.from_pretrained(write(tmp_path / "renamed", config, renamed))
    assert_same_model(model, Mimi.from_pretrained(write(tmp_path / "plain", *read_fixture("kyutai"))))


@pytest.mark.parametrize("g, v", [("_g", "_v"), (".original0", ".original1")])
def test_weight_norm_pairs_are_folded(tmp_path: Path, g: str, v: str):
    config, tensors = read_fixture("base")
    expected = Mimi.from_pretrained(write(tmp_path / "plain", config, tensors))
    for name in [name for name in tensors if name.endswith("conv.weight") and "layers" in name]:
        weight = tensors.pop(name)
        pair = name if g == "_g" else name.replace(".weight", ".parametrizations.weight")
        tensors[pair + g] = np.sqrt((weight**2).sum((1, 2), keepdims=True))
        tensors[pair + v] = 3 * weight
    model = Mimi.from_pretrained(write(tmp_path / "pairs", config, tensors))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), nnx.state(model), nnx.state(expected)
    )


def test_every_wrong_tensor_is_named(tmp_path: Path):
    config, tensors = read_fixture("base")
    del tensors["downsample.conv.weight"], tensors["encoder.layers.0.conv.bias"]
    tensors["encoder.layers.0.conv.wieght"] = np.zeros(1, np.float32)
    tensors["upsample.conv.weight"] = np.zeros((3, 1, 4), np.float32)
    with pytest.raises(ValueError) as error:
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))
    message = str(error.value)
    assert str(tmp_path / "broken") in message and "\n" not in message
    assert "missing downsample.conv.weight [16, 16, 4]" in message
    assert "missing encoder.layers.0.conv.bias [2]" in message
    assert "unexpected encoder.layers.0.conv.wieght" in message
    assert "upsample.conv.weight is float32 [3, 1, 4], expected floating point [16, 1, 4]" in message


def test_a_lone_file_of_another_configuration(tmp_path: Path):
    _, tensors = read_fixture("base")
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError) as error:
        Mimi.from_pretrained(tmp_path / "alone.safetensors")
    message = str(error.value)
    assert message.startswith(
        f"{tmp_path}/alone.safetensors, read as the published model (put its config.json beside it): the"
        " tensors do not fit the configuration: missing "
    )
    assert len(message) < 2000
    published = {row.transformers for row in weight_table(MimiConfig())}
    assert message.count("missing ") == 5
    assert f"and {len(published - tensors.keys()) - 5} more like this; " in message


def split(folder: Path, config: dict, tensors: Tensors, **changes: str) -> Path:
    """A model folder with its tensors in two files."""
    write(folder, config, {})
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + number % 2}-of-2.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("prefix", ["weights/", "kyutai/"])
def test_tensors_in_several_files(prefix: str, tmp_path: Path):
    config, tensors = read_fixture("kyutai", prefix)
    model = Mimi.from_pretrained(split(tmp_path / "split", config, tensors))
    assert_same_model(model, Mimi.from_pretrained(write(tmp_path / "whole", config, tensors)))
    assert checkpoint.layout_of(tmp_path / "split") == ("transformers" if prefix == "weights/" else "kyutai")


FIRST, SECOND = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"more": FIRST}, r"the files do not hold what the index says; they differ in more$"),
        ({"downsample.conv.weight": FIRST, "upsample.conv.weight": FIRST}, "they differ in (down|up)sample"),
        ({"more": "model-3-of-2.safetensors"}, r"model-3-of-2\.safetensors: not a readable safetensors file"),
        (
            {"more": "../model.safetensors"},
            r"index\.json: not a readable .*files must be in its own folder",
        ),
    ],
)
def test_an_index_that_is_wrong(changes: dict[str, str], error: str, tmp_path: Path):
    folder = split(tmp_path / "split", *read_fixture("base"), **changes)
    with pytest.raises(ValueError, match=error):
        Mimi.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": [1]}'])
def test_an_index_that_is_damaged(text: str, tmp_path: Path):
    folder = split(tmp_path / "split", *read_fixture("base"))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not a readable index of safetensors files"):
        Mimi.from_pretrained(folder)


def test_every_wrong_array_of_an_orbax_folder_is_named(base: Path, tmp_path: Path):
    import orbax.checkpoint as ocp

    checkpoint.save(Mimi.from_pretrained(base), tmp_path / "flax", "flax")
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "flax" / "params")
        del arrays["encoder.first.bias"]
        arrays["encoder.first.bais"] = np.zeros(1)
        arrays["upsample.kernel"] = np.zeros(3)
        checkpointer.save(tmp_path / "flax" / "params", arrays, force=True)
    with pytest.raises(
        ValueError, match=r"missing encoder\.first\.bias.*unexpected .*bais.*upsample\.kernel"
    ):
        Mimi.from_pretrained(tmp_path / "flax")


def test_tensors_must_be_floating_point(tmp_path: Path):
    config, tensors = read_fixture("base")
    tensors["downsample.conv.weight"] = tensors["downsample.conv.weight"].astype(np.int32)
    with pytest.raises(ValueError, match=r"weight is int32 \[16, .*, expected floating point \[16, "):
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))


def test_a_weight_norm_pair_must_be_whole(tmp_path: Path):
    config, tensors = read_fixture("base")
    tensors["downsample.conv.weight_g"] = tensors.pop("downsample.conv.weight")
    with pytest.raises(ValueError, match="weight must be one tensor or a weight normalization pair, got 1 "):
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))


def test_layout_of(base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    for layout in FLOAT_LAYOUTS:
        checkpoint.save(model, tmp_path / layout, layout)
        assert checkpoint.layout_of(tmp_path / layout) == layout


def test_every_layout_is_tested():
    assert checkpoint.LAYOUTS.keys() == {*FLOAT_LAYOUTS, "int8"}  # test_int8.py has the last


def test_layouts_that_cannot_hold_a_model(tmp_path: Path):
    model = Mimi.from_pretrained(write(tmp_path / "gqa", *read_fixture("gqa")))
    with pytest.raises(ValueError, match="neither attention biases nor grouped keys"):
        checkpoint.save(model, tmp_path / "new", "kyutai")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="must be one of int8, flax, kyutai, transformers, got 'keras'"):
        checkpoint.save(model, tmp_path / "new", "keras")
    with pytest.raises(ValueError, match="holds int8 weights, and this model has none"):
        checkpoint.save(model, tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damaged", ["half", "junk", "nothing"])
def test_damaged_files(base: Path, damaged: str):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"half": whole[: len(whole) // 2], "junk": b"junk", "nothing": b""}[damaged])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Mimi.from_pretrained(base)


def test_a_damaged_orbax_folder(base: Path, tmp_path: Path):
    checkpoint.save(Mimi.from_pretrained(base), tmp_path / "flax", "flax")
    for file in (tmp_path / "flax" / "params").iterdir():
        if file.is_file():
            file.unlink()
    with pytest.raises(ValueError, match="not a readable Orbax checkpoint"):
        Mimi.from_pretrained(tmp_path / "flax")
