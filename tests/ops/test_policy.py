"""Who computes what: by what is asked for, and otherwise by platform, dtype, size and length."""

import collections
import re
import types

import jax
import jax.numpy as jnp
import pytest

from mimi_jax import MimiConfig, checkpoint
from mimi_jax.ops import policy
from tests.models import load_fixture, noise


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
    query = jnp.zeros((1, 5, 2, 4), jnp.bfloat16)
    for compute in (
        policy.Compute(),
        policy.Compute(fused=("cuda",)),
        policy.Compute(fused=("tpu",), one_device=True),
        policy.Compute(fused=("tpu",)),  # the compiler cannot divide it between devices
    ):
        with policy.computing(compute):
            policy.attention(query, query, query, window=250)
    assert [set(choice.items()) - {("default", "reference")} for choice in choices] == [
        set(),
        {("cuda", "cudnn")},
        {("tpu", "splash")},
        set(),
    ]
    choices.clear()
    with policy.computing(policy.Compute(fused=("cuda", "tpu"), one_device=True)):
        policy.attention(*[query.astype(jnp.float32)] * 3, window=250)
    assert choices == [{"default": "reference"}]


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


def test_convolutions_and_products_are_chosen_for_cpus_by_dtype_and_size(choices: list[policy.Choice]):
    half, full = jnp.zeros((1, 40, 3), jnp.bfloat16), jnp.zeros((1, 40, 3))
    for x, taps, stride, dilation in ((full, 4, 2, 1), (half, 4, 2, 1), (half, 7, 2, 1), (half, 3, 1, 2)):
        policy.convolution(x, jnp.zeros((taps, 3, 5), x.dtype), stride=stride, dilation=dilation)
    assert [choice.get("cpu") for choice in choices] == [None, "strides", None, None]
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
