"""Who computes what: by what is asked for, and otherwise by platform, dtype, size and length."""

import collections
import dataclasses
import functools
import re
import sys
import types
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimi_jax import MimiConfig, checkpoint
from mimi_jax.nn.seanet import DecoderStage, EncoderStage
from mimi_jax.ops import policy, triton_stages
from tests.models import load_fixture, noise, random_module


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[policy.Choice]:
    """What operations choose, none of which is computed."""
    seen: list[policy.Choice] = []

    def call(operation: str, choice: policy.Choice, *_: object, **__: object) -> None:
        seen.append(choice)

    monkeypatch.setattr(policy, "_call", call)
    return seen


def test_attention_is_chosen_by_length(choices: list[policy.Choice]):
    for time in (1, 500, 501):
        query = jax.ShapeDtypeStruct((1, time, 2, 4), jnp.float32)
        policy.attention(query, query, query, window=250)  # pyright: ignore[reportArgumentType]
    assert choices == [{"default": "reference"}, {"default": "reference"}, {"default": "banded"}]


def test_fused_attention_is_chosen_where_it_can_run(choices: list[policy.Choice]):
    query = jnp.zeros((1, 5, 2, 8), jnp.bfloat16)
    for compute in (
        policy.Compute(),
        policy.Compute(fused=("cuda",)),
        policy.Compute(fused=("tpu",), one_device=True),
        policy.Compute(fused=("tpu",)),  # the compiler cannot divide it between devices
    ):
        with policy.computing(compute):
            policy.attention(query, query, query, window=4)
    assert [set(choice.items()) - {("default", "reference")} for choice in choices] == [
        set(),
        {("cuda", "cudnn")},
        {("tpu", "splash")},
        set(),
    ]
    choices.clear()
    with policy.computing(policy.Compute(fused=("cuda", "tpu"), one_device=True)):
        policy.attention(*[query.astype(jnp.float32)] * 3, window=4)
        policy.attention(query, query, query, window=5)  # there is nothing that a TPU could leave out
        policy.attention(*[query[..., :6]] * 3, window=5)  # cuDNN refuses heads of this size
    assert choices == [
        {"default": "reference"},
        {"default": "reference", "cuda": "cudnn"},
        {"default": "reference"},
    ]


@pytest.mark.parametrize(
    ("platform", "capability", "fused"),
    [
        ("cpu", None, ()),
        ("gpu", "7.5", ()),
        ("gpu", "8.0", ("cuda",)),
        ("gpu", "12.0", ("cuda",)),
        ("gpu", "gfx942", ()),
        ("tpu", None, ("tpu",)),
    ],
)
def test_fused_attention_may_be_used_on_the_devices_that_have_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, capability: str | None, fused: tuple[str, ...]
):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(policy, "are_exact", lambda _: True)
    assert policy.resolve("auto").fused == fused


FITS = MimiConfig(num_filters=32)
STAGES = ("encoder_stage", "decoder_stage")


def shape(time: int, channels: int, dtype: str, batch: int = 1) -> Any:
    return jax.ShapeDtypeStruct((batch, time, channels), dtype)


def stage_choice(
    compute: policy.Compute,
    config: MimiConfig = FITS,
    dtype: str = "bfloat16",
    time: int = 2**15,
    batch: int = 1,
) -> list[dict[str, str]]:
    """What an encoder stage and a decoder stage are computed by, for each platform."""
    encoder_stage = jax.eval_shape(lambda: EncoderStage(config, config.num_filters, 4, rngs=nnx.Rngs(0)))
    decoder_stage = jax.eval_shape(lambda: DecoderStage(config, 2 * config.num_filters, 4, rngs=nnx.Rngs(0)))
    found = []
    with policy.computing(compute):
        for stage, channels in ((encoder_stage, config.num_filters), (decoder_stage, 2 * config.num_filters)):
            found.append(policy.part_choice(stage, shape(time, channels, dtype, batch)))
    return found


def test_stages_are_chosen_where_triton_can_compute_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    layers, triton = {"default": "layers"}, {"default": "layers", "cuda": "triton"}
    ampere = policy.Compute(fused=("cuda",), one_device=True, capability=80)
    monkeypatch.setattr(triton_stages, "is_available", lambda capability: True)
    assert stage_choice(ampere) == [triton] * 2
    assert stage_choice(ampere, dtype="float16") == [triton] * 2
    assert stage_choice(ampere, dtype="float32") == [layers] * 2
    assert stage_choice(ampere, time=0) == [layers] * 2
    assert stage_choice(ampere, time=2**15 + 2) == [layers, triton]  # the encoder refuses it
    assert stage_choice(ampere, time=2**12 - 4) == [layers] * 2  # a step
    triton_stages.say_that_programs_are_divided.cache_clear()
    assert stage_choice(policy.Compute(fused=("cuda",), capability=80)) == [layers] * 2  # many devices
    [record] = caplog.records
    assert "one GPU for each process, or inside shard_map" in record.getMessage()
    assert stage_choice(policy.PORTABLE) == [layers] * 2
    monkeypatch.setattr(triton_stages, "is_available", lambda capability: False)
    assert stage_choice(ampere) == [layers] * 2


def test_narrow_layers_have_several_positions_a_row_on_tpus():
    layers, rows = {"default": "layers"}, {"default": "layers", "tpu": "rows"}
    choice = functools.partial(stage_choice, policy.Compute(fused=("tpu",)), batch=8)
    assert choice() == choice(dtype="float32") == choice(time=16) == [rows] * 2
    assert choice(batch=7) == choice(time=0) == [layers] * 2
    for field in ({"num_filters": policy.LANES}, {"use_causal_conv": False}, {"pad_mode": "replicate"}):
        assert choice(config=dataclasses.replace(FITS, **field)) == [layers] * 2


def test_tpus_compute_the_ends_in_one_device_kernel_if_it_stays_whole():
    model: Any = checkpoint.abstract_model(MimiConfig())
    [front, _], [_, back] = model.encoder.groups(), model.decoder.groups()

    def choices(batch: int, compute: policy.Compute, frames: int = 4) -> list[str | None]:
        with policy.computing(compute):
            found = [
                policy.part_choice(part, jnp.zeros((batch, frames * time, channels), "bfloat16"))
                for part, time, channels in ((front, 1920, 1), (back, 480, 128))
            ]
        return [choice.get("tpu") for choice in found]

    whole = policy.Compute(fused=("tpu",), one_device=True)
    assert choices(16, whole) == choices(16, whole, frames=1) == ["pallas", "pallas"]
    assert choices(7, whole) == [None, None]
    parted = policy.Compute(fused=("tpu",))
    assert choices(16, parted) == choices(16, parted, frames=2) == ["rows", "rows"]
    assert choices(16, parted, frames=1) == ["rows", None]
    assert choices(16, policy.Compute(one_device=True)) == [None, None]
    with policy.computing(whole):
        assert policy.part_choice(model.encoder, jnp.zeros((8, 1920, 1), "bfloat16"))["tpu"] == "large_pieces"


def test_steps_are_written_for_few_launches_and_clips_for_few_passes_on_gpus():
    model = checkpoint.abstract_model(FITS)
    encoder, transformer = model.encoder, model.encoder_transformer
    assert encoder is not None and transformer is not None
    front, gpu = encoder.groups()[0], policy.Compute(capability=75)

    def choice(compute: policy.Compute, size: int) -> dict[str, str]:
        with policy.computing(compute):
            return policy.part_choice(front, shape(size, 1, "float32"))

    assert choice(gpu, 1920) == {"default": "layers"}
    assert choice(gpu, 2**15) == {"default": "layers", "cuda": "few_passes"}
    assert choice(policy.PORTABLE, 2**15) == {"default": "layers"}

    def stepped(compute: policy.Compute, time: int) -> str:
        state = jax.eval_shape(lambda: transformer.init_state(1))
        step = policy.computing(compute)(lambda part, state, x: part.step(state, x))
        traced = jax.jit(step).trace(transformer, state, shape(time, FITS.hidden_size, "float32"))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    found = [stepped(*case).count("barrier") > 0 for case in ((gpu, 2), (gpu, 8), (policy.PORTABLE, 2))]
    assert found == [True, False, False]


@pytest.mark.parametrize(
    ("fields", "fused"),
    [
        ({}, ["encoder_front", "decoder_back"]),
        ({"num_filters": 64}, ["encoder_front", "decoder_back"]),
        ({"num_filters": 128}, []),
        ({"audio_channels": 2}, []),
        ({"residual_kernel_size": 5}, []),
        ({"kernel_size": 17, "last_kernel_size": 4}, []),
        ({"kernel_size": 17}, ["decoder_back"]),
        ({"pad_mode": "replicate"}, []),
    ],
    ids=str,
)
def test_ends_next_to_the_waveform_are_chosen_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], fused: list[str]
):
    monkeypatch.setattr(triton_stages, "is_available", lambda capability: True)
    config = dataclasses.replace(FITS, **fields)
    model = checkpoint.abstract_model(config)
    found = []
    with policy.computing(policy.Compute(fused=("cuda",), one_device=True, capability=80)):
        for network in (model.encoder, model.decoder):
            assert network is not None
            for group in network.groups():
                if group.operation:
                    channels = config.audio_channels if network is model.encoder else 2 * config.num_filters
                    choice = policy.part_choice(group, shape(2**15, channels, "bfloat16"))["cuda"]
                    assert choice in ("few_passes", "triton")
                    found += [group.operation] if choice == "triton" else []
    assert found == fused


@pytest.mark.parametrize(
    "fields",
    [
        {"num_filters": 16},
        {"num_filters": 48},
        {"num_filters": 2048},
        {"compress": 4},
        {"use_conv_shortcut": True},
        {"pad_mode": "replicate"},
        {"num_residual_layers": 2},
        {"residual_kernel_size": 1},
        {"use_causal_conv": False},
    ],
    ids=str,
)
def test_other_stages_are_computed_layer_by_layer(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]):
    monkeypatch.setattr(triton_stages, "is_available", lambda capability: True)
    ampere = policy.Compute(fused=("cuda",), one_device=True, capability=80)
    config = dataclasses.replace(FITS, **fields)
    assert stage_choice(ampere, config) == [{"default": "layers"}] * 2


def test_one_line_of_the_log_says_that_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    triton_stages.is_available.cache_clear()
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert not triton_stages.is_available(90) and not triton_stages.is_available(90)
    triton_stages.is_available.cache_clear()
    [record] = caplog.records
    assert record.name == "mimi_jax"
    assert "pip install 'mimi_jax[cuda]'" in record.getMessage()


def test_triton_is_left_out_where_its_device_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(capability: int) -> None:
        raise RuntimeError("ptxas: unsupported .version 9.4")

    triton_stages.is_available.cache_clear()
    monkeypatch.setattr(triton_stages, "import_jax_triton", lambda: None)
    monkeypatch.setattr(triton_stages, "run_one_block", fail)
    assert triton_stages.is_available(90)  # no GPU is here, so nothing has to run
    triton_stages.is_available.cache_clear()
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])
    assert not triton_stages.is_available(90)
    triton_stages.is_available.cache_clear()
    assert "ptxas: unsupported" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("capability", "version"), [(80, 80), (90, 80), (None, 80), (100, 87), (120, 87)])
def test_ptx_is_old_enough_for_the_assemblers_of_older_systems(capability: int | None, version: int):
    assert triton_stages.compiler_options(capability)["ptx_version"] == version


def test_jax_triton_finds_the_nvidia_part_of_an_older_triton(monkeypatch: pytest.MonkeyPatch):
    """jax_triton looks for a name when it is imported, which Triton 3.6 lacks."""
    names = ["triton", "triton.backends", "triton.backends.nvidia", "triton.backends.nvidia.driver"]
    modules = {name: types.ModuleType(name) for name in [*names, "jax_triton"]}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    driver: Any = modules[names[-1]]
    assert triton_stages.import_jax_triton() is modules["jax_triton"]
    assert driver.TMA_TF32 == 11  # as in Triton 3.7
    driver.TMA_TF32 = 12
    triton_stages.import_jax_triton()
    assert driver.TMA_TF32 == 12


@pytest.mark.parametrize("kind", [EncoderStage, DecoderStage])
def test_stages_that_triton_cannot_compute_are_refused_where_it_is_asked_for(kind: type):
    stage = kind(FITS, 64, 4, rngs=nnx.Rngs(0))
    with (
        policy.computing(policy.resolve(dict.fromkeys(STAGES, "triton"))),
        pytest.raises(
            ValueError, match=r'"triton" needs bfloat16 or float16, .* "auto" uses it where it can'
        ),
    ):
        stage(jnp.zeros((1, 8, 64)))


def test_what_is_missing_for_triton_is_named_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    stage = DecoderStage(FITS, 64, 4, rngs=nnx.Rngs(0))
    stage = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), stage)
    with (
        policy.computing(policy.resolve({"decoder_stage": "triton"})),
        pytest.raises(ImportError, match=r"need jax_triton and Python 3.12 .*pip install 'mimi_jax\[cuda\]'"),
    ):
        stage(jnp.zeros((1, 8, 64), jnp.bfloat16))


def test_stages_under_vmap_are_computed_layer_by_layer(monkeypatch: pytest.MonkeyPatch):
    """jax_triton has no rule for `vmap`."""
    stage = random_module(lambda rngs: EncoderStage(FITS, 32, 2, rngs=rngs))
    stage = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), stage)
    x = jnp.asarray(noise(2, 1, 8, 32), jnp.bfloat16)
    expected = jax.vmap(stage)(x)

    def call(*_: Any, outputs: list[tuple[int, ...]], **__: Any) -> list[jax.Array]:
        return [jnp.zeros(shape, "bfloat16") for shape in outputs]

    monkeypatch.setattr(triton_stages, "call", call)
    with policy.computing(policy.resolve({"encoder_stage": "triton"})):
        assert not np.array_equal(stage(x[0]), expected[0])
        np.testing.assert_array_equal(jax.vmap(stage)(x), expected)


def test_gradients_of_stages_are_computed_layer_by_layer(monkeypatch: pytest.MonkeyPatch):
    stage = random_module(lambda rngs: EncoderStage(FITS, 32, 2, rngs=rngs))
    stage = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), stage)
    x = jnp.asarray(noise(1, 8, 32), jnp.bfloat16)

    def gradient() -> jax.Array:
        return jax.grad(lambda x: stage(x).astype("float32").sum())(x)

    expected = gradient()
    monkeypatch.setattr(triton_stages, "call", None)
    with policy.computing(policy.resolve({"encoder_stage": "triton"})):
        np.testing.assert_array_equal(gradient(), expected)


def test_convolutions_and_products_are_chosen_for_cpus_by_dtype_and_size(choices: list[policy.Choice]):
    half, full = jnp.zeros((1, 400, 3), jnp.bfloat16), jnp.zeros((1, 400, 3))
    few = half[:, :128]
    for x, taps, stride, dilation in (
        *((full, 4, 2, 1), (full[:, :128], 4, 2, 1)),
        *((half, 4, 2, 1), (half, 7, 2, 1), (half, 3, 1, 2)),
        *((few, 4, 2, 1), (few, 7, 2, 1), (few, 3, 1, 2)),
    ):
        policy.convolution(x, jnp.zeros((taps, 3, 5), x.dtype), stride=stride, dilation=dilation)
    policy.convolution(full[..., :1], jnp.zeros((7, 1, 5)))  # of a waveform
    for outputs, stride, dilation in ((1, 1, 1), (8, 1, 2), (9, 1, 1), (8, 2, 1)):
        policy.convolution(full, jnp.zeros((4, 3, outputs)), stride=stride, dilation=dilation)
    rest = "gradients_for_eigen"
    assert [choice.get("cpu") for choice in choices] == [
        *(rest, rest), *("strides", rest, rest), *["windows"] * 3, "multiply_adds",
        *("shifts", "shifts", rest, rest),
    ]  # fmt: skip
    choices.clear()
    for x in (full, full[:, :2], full[:, :3], half):
        policy.product(x, jnp.zeros((3, 5), x.dtype), None)
    assert [choice.get("cpu") for choice in choices] == [None, None, "convolution", "float32_sums"]


def test_what_is_asked_for_is_used_on_every_platform():
    query = jnp.asarray(noise(1, 12, 2, 4))

    def program(compute: str | dict[str, str]) -> str:
        with policy.computing(policy.resolve(compute)):
            return str(jax.make_jaxpr(lambda x: policy.attention(x, x, x, window=4))(query))

    assert program("auto") == program("portable") == program({"attention": "banded"})
    assert program({"attention": "reference"}) != program("auto")


@pytest.mark.parametrize(
    ("compute", "error"),
    [
        (
            "fast",
            'compute must be "auto", "portable" or a mapping of attention, convolution, .*, got \'fast\'',
        ),
        ({"convolutions": "plain"}, "compute names operations among attention, .*, got 'convolutions'"),
        (
            {"attention": "flash"},
            r"compute\['attention'\] must be one of reference, banded, cudnn, splash, got 'flash'",
        ),
    ],
)
def test_what_does_not_exist_is_refused(compute: str | dict[str, str], error: str):
    with pytest.raises(ValueError, match=error):
        policy.resolve(compute)


def test_no_device_is_looked_at_while_tracing(monkeypatch: pytest.MonkeyPatch):
    model = checkpoint.abstract_model(MimiConfig())
    model = jax.eval_shape(lambda model: model.astype(jnp.bfloat16), model)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("devices were looked at")

    for name in ("devices", "local_devices", "device_count", "local_device_count", "default_backend"):
        monkeypatch.setattr(jax, name, refuse)
    latents = jax.ShapeDtypeStruct((1, 2, 512), jnp.float32)
    assert jax.eval_shape(lambda model, x: model.decode_latents(x), model, latents).shape == (1, 1, 3840)


def test_gradients_keep_the_precision_of_the_model():
    """JAX traces the rule of the network's gradient outside of the model's own settings."""
    model = load_fixture("base").model
    latents = jnp.zeros((1, 3, model.config.hidden_size))
    gradient = jax.jit(jax.grad(lambda latents: model.decode_latents(latents).sum()))
    text = gradient.lower(latents).as_text()
    found = collections.Counter(re.findall(r"precision (DEFAULT|HIGHEST)|\b(DEFAULT|HIGHEST), ", text))
    assert found
    assert {name for names in found for name in names if name} == {"HIGHEST"}
