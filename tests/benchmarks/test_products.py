"""The products of a model, and the time of each."""

import pytest

from benchmarks import products
from mimi_jax.ops import tensor_cores


def test_products_of_the_model_are_found():
    found = products.calls(batch=2, seconds=4.0)
    assert len(set(found)) == len(found)
    # 100 steps of 25 Hz with two more before them, 16 taps, stride 8.
    downsample = products.Call(
        "convolution", ((2, 808, 512), (16, 512, 1024)), (("dilation", 1), ("stride", 8)), ""
    )
    assert downsample._replace(chosen="tensor_cores") in found
    assert downsample.flops == 2 * 2 * 101 * 16 * 512 * 1024
    search = products.Call("search", ((2, 50, 256), (2048, 256), (2048,)), (), "tensor_cores")
    assert search in found
    assert search.flops == 2 * 2 * 50 * 256 * 2048


def test_a_product_is_timed_both_ways(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_cores, "ALGORITHM", "BF16_BF16_F32_X6")  # which CPUs take for float32
    options = (("dilation", 1), ("stride", 2))
    row = products.table_row(products.Call("convolution", ((1, 8, 4), (4, 4, 3)), options, "plain"))
    assert row[:3] == ["convolution", "(1, 8, 4) x (4, 4, 3)", "stride=2"]
    assert all(float(cell) >= 0 for cell in row[3:7])
    row = products.table_row(products.Call("convolution", ((1, 8, 4), (3, 4, 3)), options, "plain"))
    assert row[5:] == ["-", "-", "plain"]
