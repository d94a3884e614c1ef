"""What a device did, from a trace of JAX's profiler: one `Launch` for each device kernel and copy.

The profiler writes its trace as JSON, in the Trace Event Format of Chrome and Perfetto.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# A GPU's own time, without what tools derive from it, is in the threads of its streams.
DEVICE, STREAM = "/device:GPU", "Stream"


class Launch(NamedTuple):
    """One run of a device kernel, or one copy."""

    name: str  # of the device kernel
    operation: str  # of the program, "" if the profiler does not know it
    start: float  # microseconds
    duration: float  # microseconds


def trace(run: Callable[[], Any], folder: Path) -> list[Launch]:
    """Run a function that waits for its result, and return what the device did meanwhile."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        run()
    [file] = folder.rglob("*.trace.json.gz")
    with gzip.open(file) as lines:
        return launches(json.load(lines)["traceEvents"])


def launches(events: list[dict[str, Any]]) -> list[Launch]:
    """The launches among the events of a trace, in order. Without a GPU, the operations of the CPU."""
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    has_gpu = any(DEVICE in name for name in processes.values())

    def is_launch(event: dict[str, Any]) -> bool:
        if event.get("ph") != "X":
            return False
        if not has_gpu:
            return "hlo_op" in event.get("args", {})
        thread = threads.get((event["pid"], event["tid"]), "")
        return DEVICE in processes.get(event["pid"], "") and STREAM in thread

    found = [
        Launch(event["name"], event.get("args", {}).get("hlo_op", ""), event["ts"], event.get("dur", 0.0))
        for event in events
        if is_launch(event)
    ]
    return sorted(found, key=lambda launch: launch.start)
