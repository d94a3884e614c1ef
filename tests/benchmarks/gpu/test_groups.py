"""Device kernels of a synthetic trace, and the groups that a synthetic program puts them in."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.gpu import groups
from benchmarks.gpu.trace import Launch, launches
from mimi_jax.nn.transformer import Transformer

TRACE = Path(__file__).with_name("trace.json")
PROGRAM = Path(__file__).with_name("program.txt").read_text()


def read_trace() -> list[Launch]:
    return launches(json.loads(TRACE.read_text())["traceEvents"])


def test_launches_are_those_of_the_streams_in_order():
    """Not the host's events, and not what the profiler derives from the launches."""
    found = read_trace()
    assert len(found) == 10
    assert found[:2] == [
        Launch("sm90_xmma_fprop_implicit_gemm", "cudnn-conv.1", 10.0, 20.0),
        Launch("loop_pad_fusion_2", "loop_pad_fusion.2", 32.0, 4.0),
    ]
    assert found[-1] == Launch("MemcpyD2H", "", 68.0, 6.0)


def test_without_a_gpu_launches_are_the_operations_of_the_cpu():
    events = json.loads(TRACE.read_text())["traceEvents"]
    on_cpu = [event for event in events if event["pid"] == 701]
    operation = {"ph": "X", "pid": 701, "tid": 5, "ts": 3.0, "dur": 1.0, "name": "dot.1"}
    assert launches([*on_cpu, {**operation, "args": {"hlo_op": "dot.1"}}]) == [
        Launch("dot.1", "dot.1", 3.0, 1.0)
    ]


def test_every_launch_has_its_group():
    program = groups.read_program(PROGRAM)
    assert [program.group_of(launch) for launch in read_trace()] == [
        "convolutions",
        "passes",
        "Transformer",
        "attention",
        "RVQ",
        "fused stages",
        "copies",
        "passes",  # in a CUDA graph: known by its own name
        "other",  # in a CUDA graph, and a library's: not known
        "copies",
    ]
    # A convolution as a product, and what the model itself does around its layers.
    assert program.groups["product.6"] == "convolutions"
    assert program.groups["cast"] == "passes"


def test_bytes_are_those_of_the_operations():
    moved = groups.read_program(PROGRAM).bytes
    assert moved["loop_pad_fusion.2"] == 4 * (8 + 10)
    assert moved["custom-call.5"] == 4 * (8 + 8)


def test_programs_that_cannot_be_counted_still_have_groups():
    text = PROGRAM.replace('custom-call(%x), custom_call_target="triton', 'conditional(%x), target="triton')
    program = groups.read_program(text)
    assert program.bytes == {}
    assert program.groups["cudnn-conv.1"] == "convolutions"


def test_this_version_of_jax_says_where_operations_come_from():
    """The text of a compiled program is no interface, so a new version may change it."""
    from benchmarks.inputs import SMALL
    from tests.models import random_module

    layer = random_module(lambda rngs: Transformer(SMALL, rngs=rngs))
    compiled = jax.jit(lambda x: layer(x)).lower(jnp.ones((1, 4, 16))).compile()
    found = groups.read_program(compiled.as_text() or "").groups.values()
    assert "Transformer" in found and "passes" not in found and "RVQ" not in found
