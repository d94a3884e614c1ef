"""How many bytes the kernels of a compiled program move, from its text: XLA counts none for NVIDIA GPUs.

Every operation of a scheduled program is a kernel or a call of a library, which reads its operands and writes
its result once. Of an operand that a kernel takes slices or rows of, only those count; of a result that it
writes into an operand, only what it writes. Caches make it less, libraries that want scratch make it more.
Programs whose kernels run conditionally, or beside each other, are refused.
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
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # they only name what is there
PARTS = ("bitcast", "slice", "dynamic-slice", "gather")  # they take a part of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they write this operand into their first


class Operation(NamedTuple):
    name: str
    kind: str
    size: int  # bytes of its result
    operands: list[str]
    text: str

    def called(self, role: str) -> str:
        """The name of the computation that it "calls", or that is its "body"."""
        return re.findall(rf" {role}=%([^\s,]+)", self.text)[0]


class DeviceKernel(NamedTuple):
    source: str  # its last operation, as it was called in JAX
    bytes: int  # read and written, in all its runs


class Computation(NamedTuple):
    operations: dict[str, Operation]
    root: Operation

    def bytes_read(self, operation: Operation) -> int:
        """How much of an operation's result the others read."""
        users = [user for user in self.operations.values() if operation.name in user.operands]
        parts = [
            user for user in users if user.kind in (*PARTS, *UPDATES) and user.operands[0] == operation.name
        ]
        if len(parts) < len(users) or operation is self.root:
            return operation.size
        return min(operation.size, sum(self.bytes_read(part) for part in parts if part.kind in PARTS))

    def bytes_written(self, result: Operation) -> int:
        """How much of a result is new."""
        operands = [self.operations[name] for name in result.operands]
        if result.kind in ("tuple", "bitcast"):
            return sum(map(self.bytes_written, operands))
        return operands[UPDATES[result.kind]].size if result.kind in UPDATES else result.size


def device_kernels(text: str) -> list[DeviceKernel]:
    """All that moves bytes between kernels and memory.

    Args:
        text: of an executable, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: for loops of unknown length, and for what does not run one after the other.
    """
    computations, entry = parse(text)
    return list(_kernels(computations, entry, times=1))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by their names, and the name of the one that is the program."""
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
                raise ValueError(f"cannot count a loop whose number of rounds is not known: {operation.name}")
            yield from _kernels(computations, operation.called("body"), times * int(trips[0]))
        elif operation.kind in ("call", "conditional") or operation.kind.endswith(("-start", "-done")):
            raise ValueError(f"cannot count an operation of the kind {operation.kind}: {operation.name}")
        elif operation.kind not in FREE:
            [source, *_] = [*re.findall(r'op_name="([^"]*)"', operation.text), operation.kind]
            yield DeviceKernel(source.rpartition("/")[2], times * _moved(computations, name, operation))


def _moved(computations: dict[str, Computation], name: str, operation: Operation) -> int:
    """What one kernel, an operation of the computation `name`, reads and writes."""
    if operation.kind == "fusion":
        kernel = computations[operation.called("calls")]
        parameters = [inner for inner in kernel.operations.values() if inner.kind == "parameter"]
        return kernel.bytes_written(kernel.root) + sum(map(kernel.bytes_read, parameters))
    operands = [computations[name].operations[operand].size for operand in operation.operands]
    if operation.kind in PARTS:
        operands[0] = operation.size
    if operation.kind in UPDATES:
        return 2 * operands[UPDATES[operation.kind]]
    return operation.size + sum(operands)
