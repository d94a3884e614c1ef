"""Configurations of every release, their derived rates, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mimi_jax.config import MimiConfig

# The config.json of kyutai/mimi, as an old release wrote it.
OLD = {
    "_name_or_path": "mimi",
    "architectures": ["MimiModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "audio_channels": 1,
    "codebook_dim": 256,
    "codebook_size": 2048,
    "compress": 2,
    "dilation_growth_rate": 2,
    "frame_rate": 12.5,
    "head_dim": 64,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "kernel_size": 7,
    "last_kernel_size": 3,
    "layer_scale_initial_scale": 0.01,
    "max_position_embeddings": 8000,
    "model_type": "mimi",
    "norm_eps": 1e-05,
    "normalize": False,
    "num_attention_heads": 8,
    "num_filters": 64,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "num_quantizers": 32,
    "num_residual_layers": 1,
    "num_semantic_quantizers": 1,
    "pad_mode": "constant",
    "residual_kernel_size": 3,
    "rope_theta": 10000.0,
    "sampling_rate": 24000,
    "sliding_window": 250,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0.dev0",
    "trim_right_ratio": 1.0,
    "upsample_groups": 512,
    "upsampling_ratios": [8, 6, 5, 4],
    "use_cache": False,
    "use_causal_conv": True,
    "use_conv_shortcut": False,
    "vector_quantization_hidden_dimension": 256,
}
# 5.x moves and derives, and adds what every configuration has.
NEW = {key: OLD[key] for key in OLD.keys() - {"frame_rate", "normalize", "rope_theta", "torch_dtype"}} | {
    "_frame_rate": None,
    "chunk_size_feed_forward": 0,
    "dtype": "float32",
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_streaming": False,
}


def test_the_default_rates():
    config = MimiConfig()
    assert (config.sampling_rate, config.encodec_frame_rate, config.frame_rate) == (24_000, 25, 12.5)
    assert (config.frame_size, config.latent_stride, config.head_dim) == (1920, 2, 64)
    assert config.is_streamable


@pytest.mark.parametrize(
    ("fields", "steps_per_second", "frame_rate", "latent_stride", "frame_size"),
    [
        ({"upsampling_ratios": (6, 5, 4), "frame_rate": 12.5}, 200, 12.5, 16, 1920),
        ({"upsampling_ratios": (4, 2), "frame_rate": 750.0}, 3000, 750.0, 4, 32),
        ({"sampling_rate": 16_000, "upsampling_ratios": (8, 5, 4, 2)}, 50, 25.0, 2, 640),
        ({"sampling_rate": 16_000, "upsampling_ratios": (7, 5, 3)}, 153, 16_000 / 210, 2, 210),
        ({"sampling_rate": 16_000, "upsampling_ratios": (7, 5, 3), "frame_rate": 51.0}, 153, 51.0, 3, 315),
    ],
)
def test_rates_of_other_codecs(
    fields: dict, steps_per_second: int, frame_rate: float, latent_stride: int, frame_size: int
):
    config = MimiConfig(**fields)
    rates = config.encodec_frame_rate, config.frame_rate, config.latent_stride, config.frame_size
    assert rates == (steps_per_second, frame_rate, latent_stride, frame_size)


@pytest.mark.parametrize("fields", [OLD, NEW, {}], ids=["old", "new", "empty"])
def test_the_published_configuration_is_the_default(tmp_path: Path, fields: dict[str, Any]):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert MimiConfig.from_json(path) == MimiConfig()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_theta": 500}, "rope_theta": 7.0}, {"rope_theta": 500}),
        ({"rope_parameters": None, "rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"frame_rate": 6.25}, {"frame_rate": 6.25}),
        ({"_frame_rate": 6.25}, {"frame_rate": 6.25}),
        ({"frame_rate": None}, {}),
        ({"num_codebooks": 8}, {"num_quantizers": 8}),
        ({"head_dim": None}, {"head_dim": 64}),
        (
            {"codebook_dim": None, "vector_quantization_hidden_dimension": 512},
            {"codebook_dim": 512, "vector_quantization_hidden_dimension": 512},
        ),
        ({"upsampling_ratios": None}, {}),
        ({"normalize": False, "chunk_length_s": None}, {}),
        ({"encoder_config": None, "decoder_config": None}, {}),
    ],
)
def test_spellings_of_other_releases(fields: dict[str, Any], expected: dict[str, Any]):
    assert MimiConfig.from_dict(fields) == MimiConfig(**expected)


CHANGED = MimiConfig(
    audio_channels=2,
    frame_rate=6.25,
    rope_theta=300.0,
    head_dim=32,
    use_causal_conv=False,
    pad_mode="replicate",
)


@pytest.mark.parametrize("config", [MimiConfig(), CHANGED], ids=["default", "changed"])
def test_round_trip_through_json(tmp_path: Path, config: MimiConfig):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert MimiConfig.from_json(path) == config


def test_equal_configurations_hash_alike():
    lists = MimiConfig.from_dict({"upsampling_ratios": [8, 6, 5, 4]})
    assert lists == MimiConfig() and hash(lists) == hash(MimiConfig())
    assert MimiConfig() != CHANGED
    with pytest.raises(dataclasses.FrozenInstanceError):
        lists.hidden_size = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_streams_need_layers_that_do_not_look_ahead():
    assert not MimiConfig(use_causal_conv=False).is_streamable
    assert not MimiConfig(trim_right_ratio=0.5).is_streamable


def test_all_that_is_unknown_is_named_at_once():
    fields = {
        "hidden_sise": 512,
        "use_weight_norm": True,
        "normalize": True,
        "encoder_config": {"hidden_size": 512},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    }
    with pytest.raises(ValueError, match="unsupported Mimi configuration") as error:
        MimiConfig.from_dict(fields)
    for problem in (
        "unknown field 'hidden_sise'",
        "unknown field 'use_weight_norm'",
        "normalize must be false, got true",
        "encoder_config must be null or absent",
        "rope_type must be 'default', got 'yarn'",
        "unknown field 'rope_parameters.factor'",
    ):
        assert problem in str(error.value)


BAD_VALUES = [
    ("audio_channels", 3, "must be 1 or 2"),
    ("pad_mode", "reflect", "must be one of constant, replicate"),
    ("hidden_act", "tanh", "must be one of gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swish"),
    ("hidden_size", 500, "must be a multiple of num_attention_heads=8"),
    ("num_key_value_heads", 3, "must divide 8 heads"),
    ("head_dim", 63, "must be even, since RoPE rotates pairs"),
    ("codebook_size", 2000, "must be a power of 2"),
    ("num_semantic_quantizers", 32, "must be lower than num_quantizers=32"),
    ("codebook_dim", 128, "must equal vector_quantization_hidden_dimension=256"),
    ("upsample_groups", 100, "must divide hidden_size=512"),
    ("trim_right_ratio", 1.5, "must lie in [0, 1]"),
    ("frame_rate", 25.0, "must be at most half of the 25 steps a second"),
    ("attention_dropout", 0.1, "must be 0, since dropout is not implemented"),
    ("hidden_size", 0, "must be a positive integer"),
    ("num_filters", 2.5, "must be a positive integer"),
    ("kernel_size", "7", "must be a positive integer"),
    ("sliding_window", True, "must be a positive integer"),
    ("head_dim", -2, "must be a positive integer"),
    ("upsampling_ratios", [8, 0], "must be positive integers"),
    ("upsampling_ratios", 960, "must be positive integers"),
    ("norm_eps", "small", "must be a number"),
    ("rope_theta", float("nan"), "must be a number"),
    ("frame_rate", 0, "must be a positive number"),
    ("use_causal_conv", 1, "must be true or false"),
    ("pad_mode", None, "must be a string"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD_VALUES)
def test_a_value_without_meaning_is_refused(field: str, value: Any, rule: str):
    with pytest.raises(ValueError, match="unsupported Mimi configuration") as error:
        MimiConfig.from_dict({field: value})
    assert f"{field} {rule}" in str(error.value)


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ValueError, match=r"audio_channels must be 1 or 2, got 3; pad_mode .*, got 'wrap'"):
        MimiConfig(audio_channels=3, pad_mode="wrap")
    with pytest.raises(ValueError, match="trim_right_ratio must be 1 where use_causal_conv is false"):
        MimiConfig(use_causal_conv=False, trim_right_ratio=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "it must hold one JSON object"),
        ('{"hidden_sise": 3}', "unknown field 'hidden_sise'"),
        ("\0\0", "Expecting value"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        MimiConfig.from_json(path)
