"""Which part of the network a device kernel belongs to, from the text of the compiled program.

Each operation of a program says from which lines of Python it comes. The innermost of them in
`mimi_jax/nn` tells the layer, and the operation itself what is done there.
"""

import re
from typing import NamedTuple

from benchmarks.gpu.trace import Launch
from benchmarks.hlo import Operation, device_kernels, parse

CONVOLUTIONS, STAGES, PASSES = "convolutions", "fused stages", "passes"
TRANSFORMER, ATTENTION, RVQ = "Transformer", "attention", "RVQ"
COPIES, OTHER = "copies", "other"
GROUPS = (CONVOLUTIONS, STAGES, PASSES, TRANSFORMER, ATTENTION, RVQ, COPIES, OTHER)
# The groups in whose time the products of a part of the network are computed, see `count_parts`.
PRODUCTS = {CONVOLUTIONS: (CONVOLUTIONS, STAGES), TRANSFORMER: (TRANSFORMER, ATTENTION), RVQ: (RVQ,)}

LAYERS = {
    "quantizer.py": RVQ,
    "attention.py": TRANSFORMER,
    "transformer.py": TRANSFORMER,
    "seanet.py": PASSES,
    "conv.py": PASSES,
}
# What the name of an operation or of a device kernel says by itself, in this order.
TELLING = {
    COPIES: r"memcpy|memset|^copy|^wrapped_transpose|^transpose",
    STAGES: r"triton_kernel_call|^(encoder|decoder)_(front|stage|back)|^residual_block",
    ATTENTION: r"fmha|flash|sdpa",
}
PRODUCT = re.compile(r"\$conv|cublas|gemm|convolution|dot_general|conv_general_dilated")


class Program(NamedTuple):
    """What is known about the operations of a program."""

    groups: dict[str, str]  # by the name of the operation
    bytes: dict[str, int]  # moved in all its runs; empty if they cannot be counted
    kernels: dict[str, str]  # groups by the name that XLA gives to the device kernel of an operation

    def group_of(self, launch: Launch) -> str:
        """The group of a launch: that of its operation, or what the name of the device kernel says.

        Kernels that a CUDA graph launches bear only their own names.
        """
        if launch.operation in self.groups:
            return self.groups[launch.operation]
        return self.kernels.get(launch.name) or _telling(launch.name) or OTHER


def read_program(text: str) -> Program:
    """Read the text of an executable, from `jax.stages.Compiled.as_text`."""
    files = read_files(text)
    operations = [op for part in parse(text)[0].values() for op in part.operations.values()]
    groups = {operation.name: _group(operation, files) for operation in operations}
    try:
        moved = {kernel.name: kernel.bytes for kernel in device_kernels(text)}
    except ValueError:  # it says why, but the times are worth a table without this column
        moved = {}
    return Program(groups, moved, {re.sub(r"\W", "_", name): group for name, group in groups.items()})


def read_files(text: str) -> dict[str, list[str]]:
    """The files of each stack frame of a program by its number, innermost first."""

    def table(name: str) -> dict[str, str]:
        lines = text.partition(f"\n{name}\n")[2].partition("\n\n")[0].splitlines()
        return dict(line.split(" ", 1) for line in lines)

    names, places, frames = table("FileNames"), table("FileLocations"), table("StackFrames")
    files: dict[str, list[str]] = {}
    for number, frame in frames.items():
        place = re.findall(r"file_location_id=(\d+)", frame)[0]
        # Numbers of parents are one too high, so that 1 stands for none.
        parent = str(int(re.findall(r"parent_frame_id=(\d+)", frame)[0]) - 1)
        file = names[re.findall(r"file_name_id=(\d+)", places[place])[0]].strip('"')
        files[number] = [file, *files.get(parent, [])]
    return files


def _group(operation: Operation, files: dict[str, list[str]]) -> str:
    target = "".join(re.findall(r'custom_call_target="([^"]*)"', operation.text))
    if group := _telling(target) or _telling(operation.name):
        return group
    frames = re.findall(r"stack_frame_id=(\d+)", operation.text)
    for file in files.get(frames[0], []) if frames else []:
        folder, _, name = file.rpartition("/")
        if folder.endswith("mimi_jax/nn") and (group := LAYERS.get(name)):
            source = "".join(re.findall(r'op_name="[^"]*?([^"/]*)"', operation.text))
            is_product = PRODUCT.search(f"{target} {operation.kind} {source}")
            return CONVOLUTIONS if group == PASSES and is_product else group
    # XLA gives no line to what it makes itself, such as other layouts of the weights.
    return PASSES if frames else COPIES


def _telling(name: str) -> str:
    return next((group for group, pattern in TELLING.items() if re.search(pattern, name, re.I)), "")
