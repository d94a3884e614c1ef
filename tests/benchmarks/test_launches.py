"""What a step launches on NVIDIA GPUs. No GPU is needed, only their compiler."""

import pytest

from benchmarks import launches

SEQUENCE = """\
000: kCommandBuffer  [source       | next=004 (1) ]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kCustomKernel [prev=001 (1) | sink        ] loop_slice_fusion grid: [1, 1, 1] threads: [6, 1, 1]
003: kConvolution    [prev=000 (1) | next=004 (1) ] kConvolution
000: kCommandBuffer  [prev=066 (1) | next=072 (1) ]
    004: kCublasLtMatmul [prev=003 (1)   | next=005 (1)] kCublasLtMatmul
005: kWhile          [prev=000 (1) | next=262 (1) ]
condition:
    006: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    007: kCustomKernel       [source       | next=256 (1)] input_reduce_fusion grid: [256, 1, 1]
    008: kDynamicSliceFusion [prev=257 (2) | sink        ] params=1, results=1
        009: kCopy [source | sink] kCopy
010: kCuDnn [prev=010 (1) | sink ] kCuDnn
"""


def test_launches_are_counted_by_kind():
    result = launches.parse(SEQUENCE)
    assert (result.graphs, result.loops, len(result.launches)) == (2, 1, 8)
    columns = ("kernels", "products", "copies", "convolutions", "others")
    assert [result.count(column) for column in columns] == [3, 1, 2, 1, 1]
    assert [launch.name for launch in result.launches if launch.is_recorded] == [
        "kCopy",
        "loop_slice_fusion",
        "kCublasLtMatmul",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("function", launches.FUNCTIONS)
def test_a_step_of_one_stream_is_one_graph_of_few_launches(function: str):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs JAX's CUDA plugin: see benchmarks/ahead.py")
    result = launches.compile_step("h100", "bfloat16", function, batch=1, codebooks=8)
    assert len(result.launches) <= 120
    assert (result.graphs, result.loops) == (1, 0)
    assert all(launch.is_recorded for launch in result.launches)
    assert [result.count(column) for column in ("copies", "convolutions", "others")] == [0, 0, 0]
