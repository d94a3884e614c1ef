"""Count the bytes that the device kernels of a compiled program move, from the text of the program.

XLA does not count them for NVIDIA GPUs. Every operation of a scheduled program is a device kernel or a call
of a library, which reads its operands once and writes its result once. If a device kernel reads only slices
or rows of an operand, only these count. If it writes its result into an operand, only the part that it writes
counts. Caches make the true number smaller, and libraries that need scratch memory make it larger. Programs
whose device kernels run conditionally are refused. So are those with operations that run at the same time,
unless these are fusions.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
OPERATION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z0-9-]+)\((?P<operands>[^)]*)\)"
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")
FUSIONS = ("fusion", "fusion-start")  # the second runs beside others
# They move nothing.
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "fusion-done")
PARTS = ("bitcast", "slice", "dynamic-slice", "gather")  # they read a part of their first operand
ELEMENTWISE = ("add", "convert", "exponential", "maximum", "minimum", "multiply", "select", "subtract")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they write this operand into their first one


class Operation(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    size: int  # bytes of the result
    operands: list[str]
    text: str

    def called(self, role: str) -> str:
        """The name of the computation in this role: "calls" or "body"."""
        return re.findall(rf" {role}=%([^\s,]+)", self.text)[0]


class DeviceKernel(NamedTuple):
    """A device kernel, or a call of a library."""

    source: str  # the JAX name of its last operation
    bytes: int  # read and written, in all its runs
    name: str  # of the operation in the program


class Computation(NamedTuple):
    """A function of a program: the program itself, the body of a loop, or a device kernel."""

    operations: dict[str, Operation]
    root: Operation

    def parts_read(self) -> dict[str, float]:
        """How much of each operation's result the others read, from 0 to 1."""
        read = dict.fromkeys(self.operations, 0.0) | {self.root.name: 1.0}
        for user in reversed(self.operations.values()):
            for position, name in enumerate(user.operands):
                part = 1.0
                if user.kind in PARTS and position == 0:
                    part = read[user.name] * user.size / max(self.operations[name].size, 1)
                elif user.kind in UPDATES and position == 0:
                    part = 0.0
                elif user.kind in ELEMENTWISE:
                    part = read[user.name]
                read[name] = min(1.0, read[name] + part)
        return read

    def bytes_written(self, result: Operation) -> int:
        """How many bytes of a result are new."""
        operands = [self.operations[name] for name in result.operands]
        if result.kind in ("tuple", "bitcast"):
            return sum(map(self.bytes_written, operands))
        return operands[UPDATES[result.kind]].size if result.kind in UPDATES else result.size


def device_kernels(text: str) -> list[DeviceKernel]:
    """Everything in a program that moves bytes to or from memory.

    Args:
        text: of an executable, from `jax.stages.Compiled.as_text`.

    Raises:
        ValueError: a loop has an unknown number of rounds, or operations are conditional or asynchronous.
    """
    computations, entry = parse(text)
    return list(_kernels(computations, entry, times=1))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that is the whole program."""
    computations, entry, operations, name = {}, "", {}, ""
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            operations, name = {}, start["name"]
            entry = name if start["entry"] else entry
        elif match := OPERATION.match(line):
            operands = re.findall(r"%([^\s,]+)", match["operands"])
            operation = Operation(match["name"], match["kind"], _size(match["result"]), operands, line)
            operations[operation.name] = operation
            if match["root"]:
                computations[name] = Computation(operations, operation)
    return computations, entry


def _size(result: str) -> int:
    total = 0
    for array in ARRAY.finditer(result):
        sizes = [int(size) for size in array["shape"].split(",") if size]
        total += math.prod(sizes) * int(array["bits"] or 8) // 8
    return total


def _kernels(computations: dict[str, Computation], name: str, times: int) -> Iterator[DeviceKernel]:
    for operation in computations[name].operations.values():
        if operation.kind == "while":
            trips = re.findall(r'"known_trip_count":\{"n":"(\d+)"', operation.text)
            if not trips:
                raise ValueError(f"cannot count a loop with an unknown number of rounds: {operation.name}")
            yield from _kernels(computations, operation.called("body"), times * int(trips[0]))
        elif operation.kind in FREE:
            continue
        elif operation.kind in ("call", "conditional") or (
            operation.kind.endswith(("-start", "-done")) and operation.kind not in FUSIONS
        ):
            raise ValueError(f"cannot count an operation of the kind {operation.kind}: {operation.name}")
        else:
            [source, *_] = [*re.findall(r'op_name="([^"]*)"', operation.text), operation.kind]
            moved = times * _moved(computations, name, operation)
            yield DeviceKernel(source.rpartition("/")[2], moved, operation.name)


def _moved(computations: dict[str, Computation], name: str, operation: Operation) -> int:
    """The bytes that one operation of the computation `name` reads and writes."""
    if operation.kind in FUSIONS:
        kernel = computations[operation.called("calls")]
        read = kernel.parts_read()
        parameters = [inner for inner in kernel.operations.values() if inner.kind == "parameter"]
        return kernel.bytes_written(kernel.root) + round(sum(read[p.name] * p.size for p in parameters))
    operands = [computations[name].operations[operand].size for operand in operation.operands]
    if operation.kind in PARTS:
        operands[0] = operation.size
    if operation.kind in UPDATES:
        return 2 * operands[UPDATES[operation.kind]]
    return operation.size + sum(operands)
