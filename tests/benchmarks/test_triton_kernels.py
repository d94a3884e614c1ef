"""The device kernels compile for GPUs from Ampere on, and keep everything in registers."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs mimi_jax[triton]"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_device_kernel_spills_registers(dtype: str):
    """In a process of its own, since other tests run Triton's interpreter in theirs."""
    command = [sys.executable, "-m", "benchmarks.triton_kernels", "--dtype", dtype]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(run.stdout)
    heads, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    assert {row["GPU"] for row in rows} == {"sm_80", "sm_89", "sm_90"}
    assert {row["device kernel"].split(",")[0] for row in rows} == {
        "encoder_front",
        "decoder_back",
        "residual_block",
    }
    # With Triton 3.7, `decoder_back` has 16 bytes too many for sm_89, and none with 3.6 and 3.9.
    assert {row["bytes of spills"] for row in rows if row["GPU"] != "sm_89"} == {"0"}
    assert all(int(row["bytes of spills"]) <= 16 for row in rows)
