"""Checkpoints in every layout: read strictly, written back bit for bit."""

import dataclasses
import json
import re
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mimi_jax
from mimi_jax import Mimi, MimiConfig, checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
Tensors = dict[str, np.ndarray]


def read_fixture(name: str, prefix: str = "weights/") -> tuple[dict, Tensors]:
    """The configuration and the tensors that a reference wrote."""
    with safe_open(FIXTURES / f"{name}.safetensors", framework="np") as file:
        names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return json.loads(file.metadata()["config"]), {
            key[len(prefix) :]: file.get_tensor(key) for key in names
        }


def write(folder: Path, config: dict, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def assert_same_tensors(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def assert_same_model(got: Mimi, expected: Mimi) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(expected))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", *read_fixture("base"))


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.glob("*.safetensors")))
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


def break_tensors(tensors: Tensors) -> None:
    del tensors["downsample.conv.weight"], tensors["encoder.layers.0.conv.bias"]
    tensors["encoder.layers.0.conv.wieght"] = np.zeros(1, np.float32)
    tensors["upsample.conv.weight"] = np.zeros((3, 1, 4), np.float32)


def test_every_wrong_tensor_is_named(tmp_path: Path):
    config, tensors = read_fixture("base")
    break_tensors(tensors)
    with pytest.raises(ValueError) as error:
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))
    message = str(error.value)
    assert str(tmp_path / "broken") in message and "\n" not in message
    assert "missing downsample.conv.weight [16, 16, 4]" in message
    assert "missing encoder.layers.0.conv.bias [2]" in message
    assert "unexpected encoder.layers.0.conv.wieght" in message
    assert "upsample.conv.weight has shape [3, 1, 4], expected [16, 1, 4]" in message


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
    with pytest.raises(ValueError, match=r"downsample\.conv\.weight holds int32, expected floating point"):
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))


def test_a_weight_norm_pair_must_be_whole(tmp_path: Path):
    config, tensors = read_fixture("base")
    tensors["downsample.conv.weight_g"] = tensors.pop("downsample.conv.weight")
    with pytest.raises(ValueError, match=r"downsample\.conv\.weight needs"):
        Mimi.from_pretrained(write(tmp_path / "broken", config, tensors))


@pytest.mark.parametrize("layout", ["transformers", "flax"])
def test_halves(base: Path, tmp_path: Path, layout: str):
    checkpoint.save(Mimi.from_pretrained(base), tmp_path / "whole", layout)
    whole = Mimi.from_pretrained(base)
    encoder = Mimi.from_pretrained(tmp_path / "whole", decoder=False)
    decoder = Mimi.from_pretrained(tmp_path / "whole", encoder=False)
    assert encoder.decoder is None and decoder.encoder is None
    for place, variable in nnx.to_flat_state(nnx.state(encoder)):
        np.testing.assert_array_equal(variable[...], dict(nnx.to_flat_state(nnx.state(whole)))[place][...])
    assert {checkpoint.model_id(m) for m in (whole, encoder, decoder)} == {checkpoint.model_id(whole)}
    # A half that is saved comes back as that half, and says so when the other is asked for.
    checkpoint.save(encoder, tmp_path / "half", layout)
    half = Mimi.from_pretrained(tmp_path / "half")
    assert_same_model(half, encoder)
    with pytest.raises(ValueError, match="has no decoder"):
        mimi_jax.decode(half, np.zeros((1, 2, 3), np.int32))
    with pytest.raises(ValueError, match="saved without its decoder, which was asked for"):
        Mimi.from_pretrained(tmp_path / "half", encoder=False)


def test_layout_of(base: Path, tmp_path: Path):
    model = Mimi.from_pretrained(base)
    for layout in checkpoint.LAYOUTS:
        checkpoint.save(model, tmp_path / layout, layout)
        assert checkpoint.layout_of(tmp_path / layout) == layout


def test_identity_is_that_of_the_codes(base: Path, tmp_path: Path):
    identity = checkpoint.model_id(Mimi.from_pretrained(base))
    assert re.fullmatch("[0-9a-f]{16}", identity)
    config, tensors = read_fixture("base")
    tensors["decoder.layers.0.conv.bias"] += 1
    assert checkpoint.model_id(Mimi.from_pretrained(write(tmp_path / "a", config, tensors))) == identity
    tensors["quantizer.acoustic_residual_vector_quantizer.layers.0.codebook.embed_sum"][0, 0] += 1
    assert checkpoint.model_id(Mimi.from_pretrained(write(tmp_path / "b", config, tensors))) != identity


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_first_codebooks_alone(base: Path, tmp_path: Path, layout: str):
    whole = Mimi.from_pretrained(base)
    checkpoint.save(whole, tmp_path / "whole", layout)
    few = Mimi.from_pretrained(tmp_path / "whole", num_quantizers=3)
    assert few.config == dataclasses.replace(whole.config, num_quantizers=3)
    audio = np.random.default_rng(0).standard_normal((1, 1, 4000)).astype(np.float32)
    codes = mimi_jax.encode(few, audio).audio_codes
    np.testing.assert_array_equal(codes, mimi_jax.encode(whole, audio, num_quantizers=3).audio_codes)
    decoded = [mimi_jax.decode(model, codes).audio_values for model in (few, whole)]
    np.testing.assert_array_equal(*decoded)
    # It is saved as such a model, and its codes are named as the whole names its first ones.
    checkpoint.save(few, tmp_path / "few", layout)
    assert_same_model(Mimi.from_pretrained(tmp_path / "few"), few)
    assert checkpoint.model_id(few) == checkpoint.model_id(whole, 3) != checkpoint.model_id(whole)
    assert checkpoint.model_id(few, 1) == checkpoint.model_id(whole, 1) != checkpoint.model_id(few)


@pytest.mark.parametrize("count", [0, 1, 5, True, 2.0])
def test_numbers_of_codebooks_that_no_model_has(base: Path, count: int):
    with pytest.raises(ValueError, match=rf"an integer from 2, .*, to 4, .* got {re.escape(repr(count))}$"):
        Mimi.from_pretrained(base, num_quantizers=count)


def test_kyutais_layout_cannot_hold_everything(tmp_path: Path):
    model = Mimi.from_pretrained(write(tmp_path / "gqa", *read_fixture("gqa")))
    with pytest.raises(ValueError, match="neither attention biases nor grouped keys"):
        checkpoint.save(model, tmp_path / "new", "kyutai")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="must be one of flax, transformers, kyutai, got 'keras'"):
        checkpoint.save(model, tmp_path / "new", "keras")


def test_bundled_models_load():
    assert checkpoint.bundled_models() == ["mini"]
    config = Mimi.from_pretrained("mini").config
    assert (config.sampling_rate, config.frame_rate, config.frame_size) == (24_000, 12.5, 1920)


def test_unknown_names(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"unknown model 'maxi': give a bundled model \(mini\)"):
        Mimi.from_pretrained("maxi")
    with pytest.raises(FileNotFoundError, match=r"unknown model 'out/model\.safetensors'"):
        Mimi.from_pretrained("out/model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds model\.safetensors or params/, found neither"):
        Mimi.from_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds a config\.json, found none"):
        Mimi.from_pretrained(tmp_path)


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


def test_hub(base: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(base / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_model(Mimi.from_pretrained("kyutai/mimi"), Mimi.from_pretrained(base))
    assert asked == [("kyutai/mimi", "config.json"), ("kyutai/mimi", "model.safetensors")]


def test_hub_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        Mimi.from_pretrained("kyutai/mimi")
    assert str(error.value).startswith("cannot get model 'kyutai/mimi' from the Hugging Face Hub: ")
    assert "\n" not in str(error.value)


def test_stored_bfloat16_is_read(tmp_path: Path):
    config, tensors = read_fixture("base")
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    model = Mimi.from_pretrained(write(tmp_path / "half", config, half))
    assert model.dtype == jnp.float32
    expected = half["downsample.conv.weight"].astype(np.float32).transpose(2, 1, 0)
    assert model.downsample is not None
    np.testing.assert_array_equal(model.downsample.kernel[...], expected)
