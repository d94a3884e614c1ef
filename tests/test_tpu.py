"""The codec of full size compiles for TPUs, fits, and needs no communication: ahead of time, without one."""

import jax
import pytest
from jax.sharding import Mesh

from benchmarks import tpu

BATCH = 8  # rows on each chip
SECONDS = 10.0
CHIP_BYTES = 16e9  # the memory of a v5e chip
FLOPS_PER_SECOND_OF_AUDIO = 5.6e9  # of either half


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    pytest.importorskip("libtpu", reason="needs libtpu, which compiles for TPUs: see benchmarks/tpu.py")
    return tpu.make_mesh()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "default"), ("float32", "highest")])
@pytest.mark.parametrize("function", tpu.FUNCTIONS)
def test_compiles_for_eight_chips(mesh: Mesh, function: str, dtype: str, precision: str):
    model = tpu.make_model(dtype, precision)
    seconds = SECONDS
    if function == "encode_step":
        seconds = model.config.frame_size / model.config.sampling_rate
    report = tpu.compile_for(mesh, model, function, BATCH, seconds)
    assert report.collectives == []
    assert report.memory < CHIP_BYTES
    assert report.flops == pytest.approx(BATCH * seconds * FLOPS_PER_SECOND_OF_AUDIO, rel=0.1)
    half = (model.encoder, model.encoder_transformer, model.downsample)
    if function == "decode":
        half = (model.decoder, model.decoder_transformer, model.upsample)
    assert report.bytes_accessed > sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(half))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["encode", "decode"])
def test_compiles_with_the_splash_kernel(mesh: Mesh, function: str):
    """In bfloat16, each chip with a program of its own."""
    model = tpu.make_model("bfloat16", "default", "splash")
    report = tpu.compile_for(mesh, model, function, BATCH, SECONDS, "splash")
    assert report.collectives == []
    assert report.memory < CHIP_BYTES


def test_collectives_would_be_seen():
    """On any platform: a sum over the batch makes the devices talk."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    lowered = jax.jit(lambda x: x.sum(), in_shardings=rows).lower(jax.ShapeDtypeStruct((8, 3), "float32"))
    assert tpu.collectives(lowered.compile().as_text() or "") == ["all-reduce"]


@pytest.mark.parametrize(
    ("flops", "bytes_accessed", "passes", "expected"),
    [(197e12, 0, 1, 10.0), (197e12, 0, 6, 10 / 6), (0, 2 * 819e9, 6, 5.0), (197e12, 2 * 819e9, 1, 5.0)],
)
def test_the_bound_is_that_of_the_slower(flops: float, bytes_accessed: float, passes: int, expected: float):
    report = tpu.Report(0, flops, bytes_accessed, [])
    assert tpu.bound(report, 10.0, passes) == pytest.approx(expected)
