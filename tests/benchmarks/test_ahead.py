"""The codec of full size compiles for TPUs and NVIDIA GPUs, fits in memory and needs no communication.

No such device is needed, only their compilers.
"""

import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from benchmarks import ahead
from benchmarks.flops import count_flops
from benchmarks.hlo import DeviceKernel
from mimi_jax import MimiConfig, checkpoint
from mimi_jax.ops import policy

BATCH = 8  # rows on each chip
SECONDS = 10.0
KINDS = [("bfloat16", "default"), ("float32", "highest")]


@pytest.fixture(scope="module")
def tpus() -> Mesh:
    pytest.importorskip("libtpu", reason="needs libtpu: see benchmarks/ahead.py")
    return ahead.make_mesh("v5e")


@pytest.fixture(scope="module")
def gpus() -> Mesh:
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs JAX's CUDA plugin: see benchmarks/ahead.py")
    return ahead.make_mesh("h100")


def check_program(
    mesh: Mesh, device: str, function: str, kind: tuple[str, str], attention: str | None = None
) -> ahead.Program:
    model = ahead.make_model(*kind, attention, platform=ahead.DEVICES[device].platform)
    seconds = SECONDS
    if function in ahead.STEPS:
        seconds = model.config.frame_size / model.config.sampling_rate
    report = ahead.compile_for(mesh, model, function, BATCH, seconds, by_hand=attention == "splash")
    assert report.collectives == []
    assert report.memory < ahead.DEVICES[device].memory
    half = (model.encoder, model.encoder_transformer, model.downsample)
    if function.startswith("decode"):
        half = (model.decoder, model.decoder_transformer, model.upsample)
    assert report.moved > sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(half))
    return report


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("function", ahead.FUNCTIONS)
def test_compiles_for_eight_tpus(tpus: Mesh, function: str, kind: tuple[str, str]):
    check_program(tpus, "v5e", function, kind)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["encode", "decode"])
def test_compiles_for_eight_tpus_with_splash_attention(tpus: Mesh, function: str):
    """In bfloat16, with a separate program for each chip."""
    check_program(tpus, "v5e", function, KINDS[0], "splash")


@pytest.mark.slow
@pytest.mark.parametrize("function", ahead.STEPS)
def test_steps_move_their_weights_and_their_state_once_on_tpus(tpus: Mesh, function: str):
    """64 streams on each chip, in bfloat16."""
    case = ahead.Case(function, KINDS[0], 64, 0.08)
    moved = ahead.compile_case(tpus, "v5e", case).moved
    assert 1 <= moved / sum(ahead.needed(ahead.model_of("v5e", case), function, 64, 0.08)) <= 1.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("function", ahead.FUNCTIONS)
def test_compiles_for_eight_gpus(gpus: Mesh, function: str, kind: tuple[str, str]):
    """With cuDNN's attention in bfloat16."""
    attention = ahead.fused_attention("h100", kind[0])
    report = check_program(gpus, "h100", function, kind, attention)
    fused = report.text.count("__cudnn$fmhaSoftmax")
    assert fused == (8 if attention and function not in ahead.STEPS else 0)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["encode", "decode"])
def test_stages_in_triton_save_more_than_half_of_the_bytes(gpus: Mesh, function: str):
    """64 clips of 30 s in bfloat16. Layer by layer, they take about 150 GB and 140 GB."""
    pytest.importorskip("jax_triton", reason="needs mimi_jax[triton], on Python 3.12 or newer")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter, which other tests need, cannot compile; run this file alone")
    report = ahead.compile_case(gpus, "h100", ahead.Case(function, KINDS[0], 64, 30.0, stages=True))
    assert len(re.findall(r"custom-call\(.*triton_kernel_call", report.text)) == 8  # 4 stages, in two lengths
    assert report.collectives == []
    assert report.moved <= 70e9


@pytest.mark.slow
@pytest.mark.parametrize(("function", "most"), [("encode", 134), ("decode", 125)])
def test_whole_clips_move_few_bytes_on_gpus(gpus: Mesh, function: str, most: float):
    """In GB, for 64 clips of 30 s on one GPU, in bfloat16 and with all 32 codebooks."""
    case = ahead.Case(function, KINDS[0], 64, 30.0)
    report = ahead.compile_case(Mesh(gpus.devices[:1], gpus.axis_names), "h100", case)
    assert report.moved < most * 1e9


@pytest.mark.slow
def test_a_training_step_compiles_for_gpus(gpus: Mesh):
    """Forward and backward through both halves, with cuDNN's attention."""
    model = ahead.make_model(*KINDS[0], "cudnn")
    everywhere, rows = (jax.NamedSharding(gpus, jax.P(*axes)) for axes in ((), ("data",)))
    audio = jax.ShapeDtypeStruct((gpus.size * BATCH, 1, 48_000), jnp.float32)

    def loss(model, audio):
        roundtrip = model.decode_latents(model.encode_latents(audio))
        return jnp.mean((roundtrip.astype(jnp.float32) - audio) ** 2)

    gradient = jax.jit(jax.grad(loss), in_shardings=(everywhere, rows), out_shardings=everywhere)
    text = gradient.lower(model, audio).compile(ahead.COMPILER_OPTIONS["cuda"]).as_text() or ""
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 16
    assert ahead.collectives(text) == ["all-reduce"]  # of the gradients


@pytest.mark.parametrize("function", ["encode", "decode"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_large_batches_are_computed_in_parts_on_gpus(function: str, kind: tuple[str, str]):
    """At once, 64 clips of 30 s would make arrays of more than 2**31 elements."""
    model = ahead.make_model(*kind)
    program, shapes = ahead.make_program(model, function, 64, 30.0)
    text = jax.jit(program).trace(model, *shapes).lower(lowering_platforms=("cuda",)).as_text()
    arrays = [shape.split("x") for shape in re.findall(r"tensor<([\dx]+)x\w+>", text)]
    largest = max(math.prod(map(int, sizes)) for sizes in arrays)
    assert 2**28 < largest < 2**31


@pytest.mark.parametrize("function", ["encode", "decode"])
def test_the_operations_are_those_that_xla_counts(function: str):
    """Layer by layer. XLA counts one of the 32 codebooks, the others are 6 %, and what is not a product."""
    model = checkpoint.abstract_model(MimiConfig(), compute=policy.resolve({"network": "layers"}))
    program, shapes = ahead.make_program(model, function, 1, 2.0)
    cost: Any = jax.jit(program).lower(model, *shapes).cost_analysis()
    assert cost["flops"] == pytest.approx(count_flops(model.config, 2.0, 32)[function], rel=0.06)


def test_what_a_step_needs_is_added_up():
    """In bfloat16, per stream: 8 layers of 2 rings of 256 slots of 512 numbers, and 2 slots are new."""
    model = ahead.make_model(*KINDS[0], platform="tpu")
    for function in ahead.STEPS:
        one, two = (ahead.needed(model, function, batch, 0.08) for batch in (1, 2))
        rings = 8 * 2 * 256 * 512 * 2
        rest = one.state - rings
        assert 0 < rest < 0.01 * rings
        assert one.written == rings // 128 + rest
        assert (two.state, two.written) == (2 * one.state, 2 * one.written)
    codebooks = 4 * 32 * (2048 * 256 + 2048)
    half = jax.tree.leaves((model.encoder, model.encoder_transformer, model.downsample))
    projections = 4 * 2 * 512 * 256
    encoder = ahead.needed(model, "encode_step", 1, 0.08).weights
    assert encoder == 2 * sum(leaf.size for leaf in half) + codebooks + projections
    half = jax.tree.leaves((model.decoder, model.decoder_transformer, model.upsample))
    decoder = ahead.needed(model, "decode_step", 1, 0.08).weights
    assert decoder == 2 * sum(leaf.size for leaf in half) + 4 * 32 * 256 + projections


def test_collectives_are_found():
    """On any platform: a sum over the batch makes the devices exchange data."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    lowered = jax.jit(lambda x: x.sum(), in_shardings=rows).lower(jax.ShapeDtypeStruct((8, 3), "float32"))
    assert ahead.collectives(lowered.compile().as_text() or "") == ["all-reduce"]


@pytest.mark.parametrize(
    ("device", "kind", "flops", "moved", "expected"),
    [
        ("v5e", KINDS[0], 197e12, 0, 10.0),
        ("v5e", KINDS[1], 197e12, 0, 10 / 6),
        ("v5e", KINDS[1], 0, 2 * 819e9, 5.0),
        ("v5e", KINDS[0], 197e12, 2 * 819e9, 5.0),
        ("h100", KINDS[0], 989e12, 3.35e12 / 2, 10.0),
        ("h200", KINDS[1], 67e12, 2 * 4.8e12, 5.0),
    ],
)
def test_the_slower_of_products_and_memory_is_the_bound(
    device: str, kind: tuple[str, str], flops: int, moved: int, expected: float
):
    report = ahead.Program(0, flops, [DeviceKernel("", moved, "")], [], "", 0.0)
    assert ahead.bound(report, 10.0, ahead.DEVICES[device], kind) == pytest.approx(expected)
