"""Count the bytes that the device kernels of a compiled program move, from the text of the program.

XLA does not count them for NVIDIA GPUs. Every operation of a scheduled program is a device kernel or a call
of a library, which reads its operands once and writes its result once. If a device kernel reads only slices
or rows of an operand, only these count. If it writes its result into an operand, only the part that it writes
counts. Caches make the true number smaller, and libraries that need scratch memory make it larger. Programs
whose device kernels run conditionally are refused. So are those with operations that run at the same time,
unless these are fusions or copies.

For TPUs, XLA counts what goes to and from any memory, and a loop once. Here each round of a loop counts, and
what lies in the memory of the chip itself (VMEM, `S(1)` in a layout) counts nothing: an array that is fetched
there ahead of its use is read once. Arrays are as large as the tiles that hold them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
OPERATION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z0-9-]+)\((?P<operands>[^)]*)\)"
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
TILES = re.compile(r"(?P<order>[\d,]+):T\((?P<tile>[\d,]+)\)")
FUSIONS = ("fusion", "fusion-start")  # the second runs beside others
COPIES = ("copy-start", "slice-start")  # on TPUs, from one memory to another, beside other operations
# They move nothing.
FREE = (
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "fusion-done",
    "copy-done", "slice-done",
)  # fmt: skip
PARTS = ("bitcast", "slice", "dynamic-slice", "gather")  # they read a part of their first operand
ELEMENTWISE = ("add", "convert", "exponential", "maximum", "minimum", "multiply", "select", "subtract")
NUMBER = re.compile(r" parameter\((\d+)\)")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they write this operand into their first one


class Operation(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    sizes: list[int]  # bytes of the arrays of the result
    moved: list[int]  # of those that are not in the memory of a chip itself, 0 for the others
    operands: list[str]
    text: str

    def called(self, role: str) -> str:
        """The name of the computation in this role: "calls", "body" or "condition"."""
        return re.findall(rf" {role}=%([^\s,]+)", self.text)[0]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def size_moved(self) -> int:
        return sum(self.moved)


class DeviceKernel(NamedTuple):
    """A device kernel, or a call of a library."""

    source: str  # the JAX name of its last operation
    bytes: int  # read and written, in all its runs
    name: str  # of the operation in the program


class Computation(NamedTuple):
    """A function of a program: the program itself, the body of a loop, or a device kernel."""

    operations: dict[str, Operation]
    root: Operation

    def parts_read(self, computations: "Computations") -> dict[str, float]:
        """How much of each operation's result the others read, from 0 to 1."""
        read = dict.fromkeys(self.operations, 0.0) | {self.root.name: 1.0}
        for user in reversed(self.operations.values()):
            inner = [1.0] * len(user.operands)
            if user.kind in FUSIONS:
                inner = computations[user.called("calls")].parameters_read(computations)
            for position, name in enumerate(user.operands):
                part = inner[position]
                if user.kind in PARTS and position == 0:
                    part = read[user.name] * user.size / max(self.operations[name].size, 1)
                elif user.kind in UPDATES and position == 0:
                    part = 0.0
                elif user.kind in ELEMENTWISE:
                    part = read[user.name]
                read[name] = min(1.0, read[name] + part)
        return read

    def parameters_read(self, computations: "Computations") -> list[float]:
        """`parts_read` of the parameters, in their order."""
        read = self.parts_read(computations)
        numbers = {
            int(NUMBER.findall(p.text)[0]): p.name for p in self.operations.values() if p.kind == "parameter"
        }
        return [read[numbers[number]] for number in sorted(numbers)]

    def bytes_written(self, result: Operation, computations: "Computations") -> int:
        """How many bytes of a result are new."""
        if result.kind in FUSIONS and result.size_moved:  # inside another one
            inner = computations[result.called("calls")]
            return inner.bytes_written(inner.root, computations)
        operands = [self.operations[name] for name in result.operands]
        if result.kind == "tuple" or (result.kind == "bitcast" and result.size_moved):
            return sum(self.bytes_written(operand, computations) for operand in operands)
        if result.kind in UPDATES and result.size_moved:
            return operands[UPDATES[result.kind]].size
        return result.size_moved


Computations = dict[str, Computation]


def device_kernels(text: str) -> list[DeviceKernel]:
    """Everything in a program that moves bytes to or from memory.

    Args:
        text: of an executable, from `jax.stages.Compiled.as_text`.

    Raises:
        ValueError: a loop has an unknown number of rounds, or operations are conditional or asynchronous.
    """
    computations, entry = parse(text)
    return list(_kernels(computations, entry, times=1))


def parse(text: str) -> tuple[Computations, str]:
    """All computations by name, and the name of the one that is the whole program."""
    computations, entry, operations, name = {}, "", {}, ""
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            operations, name = {}, start["name"]
            entry = name if start["entry"] else entry
        elif match := OPERATION.match(line):
            operands = re.findall(r"%([^\s,]+)", match["operands"])
            sizes, moved = _sizes(match["result"])
            operation = Operation(match["name"], match["kind"], sizes, moved, operands, line)
            operations[operation.name] = operation
            if match["root"]:
                computations[name] = Computation(operations, operation)
    return computations, entry


def _sizes(result: str) -> tuple[list[int], list[int]]:
    """The bytes of the arrays of a result: of all, and of those outside the memory of a chip itself."""
    sizes, moved = [], []
    for array in ARRAY.finditer(result):
        shape, layout = [int(size) for size in array["shape"].split(",") if size], array["layout"] or ""
        if tiles := TILES.match(layout):
            order, tile = ([int(n) for n in tiles[part].split(",")] for part in ("order", "tile"))
            for axis, length in zip(order, reversed(tile), strict=False):
                shape[axis] = -(-shape[axis] // length) * length
        sizes.append(math.prod(shape) * int(array["bits"] or 8) // 8)
        moved.append(0 if "S(" in layout else sizes[-1])
    return sizes, moved


def _kernels(computations: Computations, name: str, times: int) -> Iterator[DeviceKernel]:
    for operation in computations[name].operations.values():
        if operation.kind == "while":
            rounds = _rounds(computations, operation)
            yield from _kernels(computations, operation.called("body"), times * rounds)
        elif operation.kind in FREE:
            continue
        elif operation.kind in ("call", "conditional") or (
            operation.kind.endswith(("-start", "-done")) and operation.kind not in FUSIONS + COPIES
        ):
            raise ValueError(f"cannot count an operation of the kind {operation.kind}: {operation.name}")
        else:
            [source, *_] = [*re.findall(r'op_name="([^"]*)"', operation.text), operation.kind]
            moved = times * _moved(computations, name, operation)
            yield DeviceKernel(source.rpartition("/")[2], moved, operation.name)


def _rounds(computations: Computations, loop: Operation) -> int:
    if trips := re.findall(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(trips[0])
    # TPUs' programs do not say it. Loops of JAX count from 0 to the only constant of their condition.
    condition = computations.get(loop.called("condition")) if " condition=" in loop.text else None
    operations = condition.operations.values() if condition else ()
    limits = [c for operation in operations for c in re.findall(r" constant\((\d+)\)", operation.text)]
    if len(limits) != 1:
        raise ValueError(f"cannot count a loop with an unknown number of rounds: {loop.name}")
    return int(limits[0])


def _moved(computations: Computations, name: str, operation: Operation) -> int:
    """The bytes that one operation of the computation `name` reads and writes."""
    operands = [computations[name].operations[operand] for operand in operation.operands]
    if operation.kind in FUSIONS:
        kernel = computations[operation.called("calls")]
        read = kernel.parameters_read(computations)
        parts = [part * operand.size_moved for part, operand in zip(read, operands, strict=True)]
        return kernel.bytes_written(kernel.root, computations) + round(sum(parts))
    if operation.kind in COPIES:  # the result is where they go to, where from, and a counter
        return min(operation.sizes[:2]) * sum(size > 0 for size in operation.moved[:2])
    sizes = [operand.size_moved for operand in operands]
    if operation.kind in PARTS:
        sizes[0] = min(sizes[0], operation.size)
    if operation.kind in UPDATES:
        return 2 * operands[UPDATES[operation.kind]].size
    return operation.size_moved + sum(sizes)
