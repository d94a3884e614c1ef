"""Products of float32 as three products of TF32: how exact they are, and where they are chosen.

CPUs do not have this algorithm. Here it is emulated, and programs for GPUs tell which products ask for it. To
run a function on a CPU, the algorithm is replaced by another one, which is plain float32 there.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import mimi_jax
from benchmarks import ahead
from mimi_jax import Mimi, MimiConfig, checkpoint
from mimi_jax.nn.conv import Conv1d
from mimi_jax.nn.quantizer import SplitResidualQuantizer
from mimi_jax.ops import policy, tensor_cores
from mimi_jax.ops.convolution import CONVOLUTIONS, PRODUCTS, plain_convolution
from mimi_jax.ops.nearest import SEARCHES, first_argmax
from tests.models import check_ties, load_fixture, noise, relative_error

PLAIN_ON_CPU = "BF16_BF16_F32_X6"
GPU = policy.Compute(capability=90, tensor_cores=True)
THREE = "num_primitive_operations = 3"


def round_to_tf32(x: Any) -> jax.Array:
    """Drop the last 13 of 24 bits."""
    bits = lax.bitcast_convert_type(jnp.asarray(x), jnp.uint32) & jnp.uint32(0xFFFFE000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def round_to_bfloat16(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)


def split(x: Any, rounded: Callable[[Any], jax.Array], count: int) -> list[jax.Array]:
    """Numbers of few bits whose sum is x but for the last bits, the largest first."""
    parts = []
    for _ in range(count):
        parts.append(rounded(x))
        x = x - parts[-1]
    return parts


def in_parts(
    function: Callable, rounded: Callable = round_to_tf32, count: int = 2, terms: int = 3
) -> Callable[..., jax.Array]:
    """A product as the sum of products of parts, without the smallest ones, which it adds up first."""

    def multiply(x: Any, kernel: Any, *args: Any, **options: Any) -> jax.Array:
        left, right = split(x, rounded, count), split(kernel, rounded, count)
        order = sorted((i + j, i, j) for i in range(count) for j in range(count))[:terms]
        total = jnp.zeros((), jnp.float32)
        for _, i, j in reversed(order):
            total = total + function(left[i], right[j], *args, **options)
        return total

    return multiply


def search_in_parts(vectors: jax.Array, embedding: jax.Array, half_square: jax.Array) -> jax.Array:
    half_square = jnp.expand_dims(half_square, range(vectors.ndim - 1))
    return first_argmax(in_parts(jnp.matmul)(vectors, embedding.T) - half_square)


@pytest.fixture
def plain_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_cores, "ALGORITHM", PLAIN_ON_CPU)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose tensor cores for small products too."""
    monkeypatch.setattr(policy, "FLOPS_PER_BYTE", 0)
    monkeypatch.setattr(policy, "MIN_SUMMANDS", 1)


@pytest.fixture
def fresh_check() -> Iterator[None]:
    tensor_cores.are_exact.cache_clear()
    yield
    tensor_cores.are_exact.cache_clear()


def lowered(function: Callable, *args: Any, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[bool]:
    """For each product of a program, whether it is one of three."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    return [THREE in line for line in lines]


# How exact


@pytest.mark.parametrize(
    ("product", "error"),
    [
        (jnp.matmul, 1.5),
        (in_parts(jnp.matmul), 1.5),
        (in_parts(jnp.matmul, round_to_bfloat16, 3, 6), 1.5),
        (in_parts(jnp.matmul, round_to_bfloat16, 2, 3), 16),
        (in_parts(jnp.matmul, count=1, terms=1), 1000),
    ],
    ids=["float32", "tf32 x3", "bfloat16 x6", "bfloat16 x3", "tf32"],
)
def test_three_products_of_tf32_are_as_exact_as_float32(product: Callable, error: float):
    """`error` is in units of the largest one that counts as exact: below 1, or above the number."""
    x, kernel = noise(1000, 256), noise(256, 2048, seed=1)
    errors = np.abs(np.asarray(jax.jit(product)(x, kernel)) - x.astype(np.float64) @ kernel)
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    largest = np.max(errors / norms) / tensor_cores.LARGEST_ERROR
    assert largest < 1 if error == 1.5 else largest > error / 8


def test_codes_are_the_nearest_ones_up_to_rounding():
    """Vectors between two entries, ever nearer to the middle."""
    generator = np.random.default_rng(0)
    entries = generator.standard_normal((2048, 256)).astype(np.float32)
    first, second = generator.permuted(np.tile(np.arange(2048), (400, 1)), axis=1)[:, :2].T
    share = 0.5 - 10.0 ** -np.linspace(1, 7, 400)[:, None]
    vectors = (entries[first] * (1 - share) + entries[second] * share).astype(np.float32)
    half_square = (np.sum(entries.astype(np.float64) ** 2, axis=1) / 2).astype(np.float32)
    scores = vectors.astype(np.float64) @ entries.T.astype(np.float64) - half_square
    best = scores.max(axis=1)
    scale = np.linalg.norm(vectors, axis=1) * np.linalg.norm(entries, axis=1).max()
    for search in (SEARCHES["plain"], search_in_parts):
        codes = np.asarray(jax.jit(search)(vectors, entries, half_square))
        gaps = (best - scores[np.arange(400), codes]) / scale
        assert np.mean(codes == scores.argmax(axis=1)) > 0.9
        assert gaps.max() < 2 * tensor_cores.LARGEST_ERROR


@pytest.mark.parametrize(
    ("taps", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 1, 4), (7, 1, 2), (8, 4, 1), (10, 5, 1)]
)
@pytest.mark.usefixtures("plain_on_cpu")
def test_a_convolution_on_tensor_cores_is_the_plain_one(taps: int, stride: int, dilation: int):
    x, kernel = jnp.asarray(noise(2, 43, 6)), jnp.asarray(noise(taps, 6, 5, seed=1))
    how = {"stride": stride, "dilation": dilation}
    shifts, plain = CONVOLUTIONS["tensor_cores"](x, kernel, **how), plain_convolution(x, kernel, **how)
    assert relative_error(shifts, plain) < 1e-6


# Where they are chosen


def test_a_product_is_chosen_if_memory_is_not_its_limit(monkeypatch: pytest.MonkeyPatch):
    seen: list[policy.Choice] = []
    monkeypatch.setattr(policy, "_call", lambda _, choice, *__, **___: seen.append(choice))
    kernel, entries = jnp.zeros((512, 2048)), jnp.zeros((2048, 256))
    with policy.computing(GPU, "highest"):
        for rows in (1, 16, 64, 12_000):
            policy.product(jnp.zeros((1, rows, 512)), kernel, None)
            policy.projection(jnp.zeros((1, rows, 512)), kernel, None)
            policy.search(jnp.zeros((1, rows, 256)), entries, jnp.zeros(2048))
    assert [choice.get("cuda") == "tensor_cores" for choice in seen] == [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    ("time", "shape", "how", "expected"),
    [
        (48_000, (3, 64, 32), {}, None),  # too few summands
        (48_000, (8, 64, 128), {"stride": 4}, None),
        (6000, (10, 128, 256), {"stride": 5}, "tensor_cores"),
        (1000, (3, 512, 256), {}, "tensor_cores"),
        (1000, (3, 512, 256), {"dilation": 2}, "tensor_cores"),
        (1000, (2, 1024, 4096), {}, "tensor_cores"),  # a transposed convolution
        (48_000, (7, 512, 512), {"stride": 2}, None),  # its taps are not whole strides
        (8, (3, 512, 256), {}, "windows"),  # short
    ],
)
def test_convolutions_are_chosen_by_count(
    monkeypatch: pytest.MonkeyPatch, time: int, shape: tuple, how: dict[str, int], expected: str | None
):
    seen: list[policy.Choice] = []
    monkeypatch.setattr(policy, "_call", lambda _, choice, *__, **___: seen.append(choice))
    x, kernel = jax.ShapeDtypeStruct((1, time, shape[1]), jnp.float32), jnp.zeros(shape)
    with policy.computing(GPU, "highest"):
        policy.convolution(x, kernel, **how)  # pyright: ignore[reportArgumentType]
    assert [choice.get("cuda") for choice in seen] == [expected]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("precision", "chosen"),
    [("highest", True), ("float32", True), ("F32_F32_F32", False), ("default", False), ("high", False)],
)
def test_they_are_for_exact_float32(precision: str, chosen: bool):
    x, kernel = jnp.zeros((1, 8, 4)), jnp.zeros((4, 5))
    with policy.computing(GPU, precision):
        layer = nnx.Linear(4, 5, dot_general=policy.product, rngs=nnx.Rngs(0))
        assert products(lowered(layer, x)) == [chosen]
        for dtype in policy.HALF_PRECISION:
            half = nnx.Linear(4, 5, dtype=dtype, dot_general=policy.product, rngs=nnx.Rngs(0))
            assert products(lowered(half, x.astype(dtype))) == [False]
        text = lowered(plain_convolution, x, kernel[None])
    expected = {"default": "DEFAULT", "high": "HIGH"}.get(precision, "HIGHEST")
    assert re.findall(r"precision (\w+)", text) == [expected] * 2


def with_compute(model: Mimi, compute: policy.Compute) -> Mimi:
    model = nnx.merge(*nnx.split(model))
    model.compute = compute
    return model


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("platform", "compute", "dtype", "expected"),
    [
        # Of the encoder and of the decoder. What is left are two products for each attention, of which each
        # half has two, and the two of the depthwise upsampling. Clips are short: each codebook has a product.
        ("cuda", GPU, jnp.float32, (31 - 4, 28 - 6)),
        ("cuda", GPU, jnp.bfloat16, (6, 2)),  # those of the quantizer
        ("cuda", policy.PORTABLE, jnp.float32, (0, 0)),
        ("tpu", GPU, jnp.float32, (0, 0)),
        ("cpu", GPU, jnp.float32, (0, 0)),
    ],
)
def test_a_model_uses_them_on_nvidia_gpus_alone(
    platform: str, compute: policy.Compute, dtype: Any, expected: tuple[int, int]
):
    model, clips = load_fixture("base")
    model = with_compute(model, compute).astype(dtype)
    audio, codes = jnp.asarray(clips[0].audio), jnp.asarray(clips[0].audio_codes)
    found = (
        products(
            lowered(lambda model, audio: mimi_jax.encode(model, audio), model, audio, platform=platform)
        ),
        products(
            lowered(lambda model, codes: mimi_jax.decode(model, codes), model, codes, platform=platform)
        ),
    )
    assert (sum(found[0]), sum(found[1])) == expected
    if any(expected) and dtype == jnp.float32:
        assert (len(found[0]), len(found[1])) == (31, 28)


@pytest.mark.usefixtures("always")
def test_a_model_made_for_a_gpu_computes_the_same_on_a_cpu():
    model, clips = load_fixture("base")
    portable, other = with_compute(model, policy.PORTABLE), with_compute(model, GPU)
    audio, codes = clips[0].audio, clips[0].audio_codes
    np.testing.assert_array_equal(portable.encode_latents(audio), other.encode_latents(audio))
    np.testing.assert_array_equal(portable.quantize(clips[0].latents), other.quantize(clips[0].latents))
    expected, found = (mimi_jax.decode(m, codes).audio_values for m in (portable, other))
    np.testing.assert_array_equal(expected, found)


@pytest.mark.usefixtures("always")
def test_an_exported_function_of_a_gpu_has_them():
    """JAX has no way to lower them for CPUs, so a program for several platforms must be portable."""
    model, clips = load_fixture("base")

    def export(compute: policy.Compute, platforms: list[str]) -> str:
        codes = jax.jit(lambda audio: mimi_jax.encode(with_compute(model, compute), audio).audio_codes)
        return jax.export.export(codes, platforms=platforms)(clips[0].audio).mlir_module()

    assert THREE in export(GPU, ["cuda"])
    assert THREE not in export(policy.PORTABLE, ["cpu", "cuda", "tpu"])


@pytest.mark.usefixtures("always")
def test_gradients_use_them_too():
    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(policy.convolution(x, kernel, stride=4) ** 2)

    with policy.computing(GPU, "highest"):
        text = lowered(jax.grad(loss, argnums=(0, 1)), jnp.zeros((2, 16, 6)), jnp.zeros((8, 6, 4)))
    assert products(text) == [True] * 3


@pytest.mark.usefixtures("always", "plain_on_cpu")
def test_they_work_inside_transformations(monkeypatch: pytest.MonkeyPatch):
    """Run on the CPU as on a GPU: the functions for tensor cores are chosen there."""
    monkeypatch.setitem(CONVOLUTIONS, "plain", CONVOLUTIONS["tensor_cores"])
    monkeypatch.setitem(PRODUCTS, "plain", PRODUCTS["tensor_cores"])
    layer, x = Conv1d(6, 4, 8, stride=4, rngs=nnx.Rngs(0)), jnp.asarray(noise(8, 16, 6))
    expected = layer(x)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    by_row = PartitionSpec("data")
    with policy.computing(GPU, "highest"):
        for transformed in (
            lambda x: jax.vmap(lambda row: layer(row[None])[0])(x),
            lambda x: lax.scan(lambda _, row: (None, layer(row[None])[0]), None, x)[1],
            jax.shard_map(lambda x: layer(x), mesh=mesh, in_specs=by_row, out_specs=by_row),
        ):
            assert relative_error(jax.jit(transformed)(x), expected) < 1e-6


# The check of the machine


@pytest.mark.usefixtures("fresh_check", "plain_on_cpu")
def test_the_check_passes_where_products_are_exact_even_while_something_is_traced():
    device = jax.devices("cpu")[0]
    found = []

    def trace(x: jax.Array) -> jax.Array:
        found.append(tensor_cores.are_exact(device))
        return x

    with warnings.catch_warnings(), jax.transfer_guard("disallow"):
        warnings.simplefilter("error")
        jax.eval_shape(jax.vmap(jax.grad(trace)), jax.ShapeDtypeStruct((2,), jnp.float32))
    assert found == [True]


@pytest.mark.usefixtures("fresh_check")
def test_a_gpu_without_the_algorithm_is_named_once():
    device = jax.devices("cpu")[0]  # which does not have it
    with pytest.warns(RuntimeWarning, match=r"tensor cores of this cpu, since .* is not supported .* on CPU"):
        assert not tensor_cores.are_exact(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tensor_cores.are_exact(device)


@pytest.mark.usefixtures("fresh_check", "plain_on_cpu")
@pytest.mark.parametrize("terms", [1, 3])
def test_a_compiler_that_takes_another_algorithm_is_found_out(monkeypatch: pytest.MonkeyPatch, terms: int):
    other = in_parts(jnp.matmul, round_to_bfloat16 if terms == 3 else round_to_tf32, 2, terms)
    monkeypatch.setattr(jnp, "matmul", other)
    monkeypatch.setattr(tensor_cores, "on_tensor_cores", lambda _: lambda x, kernel: other(x, kernel))
    with pytest.warns(RuntimeWarning, match=r"its error is .*e-0[456].*precision=\"F32_F32_F32\""):
        assert not tensor_cores.are_exact(jax.devices("cpu")[0])


# At full size


@pytest.mark.slow
def test_codes_of_real_speech_are_those_of_float32(
    monkeypatch: pytest.MonkeyPatch, shared_speech: list[Path]
):
    """All products and convolutions of the encoder are emulated."""
    monkeypatch.setitem(PRODUCTS, "emulated", in_parts(lax.dot_general))
    monkeypatch.setitem(CONVOLUTIONS, "emulated", in_parts(plain_convolution))
    monkeypatch.setitem(SEARCHES, "emulated", search_in_parts)
    emulated: dict[str, str] = dict.fromkeys(("product", "convolution", "search"), "emulated")
    config = MimiConfig(layer_scale_initial_scale=0.3, num_quantizers=8)
    model = Mimi(config, rngs=nnx.Rngs(0), decoder=False)
    other = nnx.merge(*nnx.split(model))
    other.compute = policy.resolve(emulated)
    audio = mimi_jax.load_audio(shared_speech[0])[None, :, : 10 * config.sampling_rate]
    codes, codes_in_parts = (np.asarray(mimi_jax.encode(m, audio).audio_codes)[0] for m in (model, other))
    check_ties(model, np.asarray(model.encode_latents(audio))[0], codes_in_parts, codes)
    assert np.mean(codes_in_parts == codes) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("function", ["encode", "decode"])
def test_compiled_programs_keep_the_algorithm(function: str):
    """Ahead of time there are no device kernels of Triton. cuBLAS computes three products for each one."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs JAX's CUDA plugin: see benchmarks/ahead.py")
    mesh = Mesh(ahead.make_mesh("h100").devices[:1], ("data",))
    model = checkpoint.abstract_model(MimiConfig(num_quantizers=8), compute=GPU)
    program = ahead.compile_for(mesh, model, function, batch=4, seconds=10.0)
    pattern = r'"operand_precision":\["(\w+)".*?"algorithm":"(\w+)"'
    found = Counter(re.findall(pattern, program.text))
    # Nothing is plain TF32. The products that are left are two for each attention. XLA merges some of the
    # others, such as those of queries and keys.
    assert set(found) == {three := ("DEFAULT", "ALG_DOT_TF32_TF32_F32"), rest := ("HIGHEST", "ALG_UNSET")}
    assert found[rest] == 2 * 8
    assert found[three] % 3 == 0
    assert found[three] >= 3 * 8 * 4


# On a GPU


@pytest.fixture(scope="module")
def gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")


@pytest.mark.gpu
def test_the_check_passes_on_a_gpu(gpu: Any):
    is_fast = 10 * float(gpu.compute_capability) in tensor_cores.FAST and jax.device_count() == 1
    assert policy.resolve("auto").tensor_cores == is_fast
    assert policy.resolve("portable").tensor_cores is False


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["base", "kernels"])
def test_codes_and_audio_of_small_models_are_those_of_the_references(gpu: Any, name: str):
    model, clips = load_fixture(name)
    model = jax.device_put(nnx.merge(*nnx.split(model)), gpu)
    model.compute = policy.resolve("auto")
    codes = mimi_jax.encode(model, jax.device_put(clips[0].audio, gpu)).audio_codes
    np.testing.assert_array_equal(codes, clips[0].audio_codes)
    audio = mimi_jax.decode(model, jax.device_put(clips[0].audio_codes, gpu)).audio_values
    assert relative_error(audio, clips[0].audio_values) < 1e-5


@pytest.mark.gpu
def test_codes_of_the_full_quantizer_are_those_of_the_cpu(gpu: Any):
    cpu, latents = jax.devices("cpu")[0], noise(1, 3000, 512)
    with jax.default_device(cpu):
        quantizer = SplitResidualQuantizer(MimiConfig(num_quantizers=8), rngs=nnx.Rngs(0))
    codes = []
    for device in (cpu, gpu):
        with policy.computing(policy.resolve("auto"), "highest"):
            encode = jax.jit(lambda quantizer, latents: quantizer.encode(latents))
            codes.append(np.asarray(encode(*jax.device_put((quantizer, latents), device)))[0])
    model: Any = SimpleNamespace(quantizer=quantizer)
    check_ties(model, latents[0], codes[1], codes[0])
    assert np.mean(codes[1] == codes[0]) > 0.999
