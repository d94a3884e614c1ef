"""The parts of the ten minutes: what each runs, how long it may take, and what of it the summary keeps."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Folders(NamedTuple):
    """Where the parts find and leave files."""

    models: Path  # the weights, in the layouts of all systems
    output: Path  # what is kept


class Part(NamedTuple):
    """One process."""

    title: str
    seconds: int  # the most that it may take
    words: Callable[[Folders, bool], list[str]]  # after `python`; the second argument is `small`
    keeps: str = r"[|#]|- "  # a pattern for the lines of the summary

    def command(self, folders: Folders, small: bool) -> list[str]:
        return [sys.executable, "-u", *self.words(folders, small)]


# The recipe that `small` trains.
SMALL_RECIPE = """
[model]
num_filters = 2
upsampling_ratios = [5, 4]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 16
sliding_window = 5
upsample_groups = 16
num_quantizers = 4
codebook_size = 16
codebook_dim = 8
vector_quantization_hidden_dimension = 8
[data]
seconds = 0.5
batch_size = 2
[losses]
mel = 0.0
adversarial = 0.0
features = 0.0
"""


# Where all tests with the marker are: to look for them in all files takes longer.
GPU_TESTS = ["tests/test_gpu.py", "tests/ops/test_attention.py", "tests/ops/test_tensor_cores.py"]


def tests(folders: Folders, small: bool) -> list[str]:
    """In four processes where that is possible, since most of the time goes into compiling. A warning is no
    reason to lose a test there.
    """
    workers = str(min(8, (os.cpu_count() or 2) // 2))
    parallel = ["-p", "xdist.plugin", "--numprocesses", workers] if importlib.util.find_spec("xdist") else []
    options = [
        "-v",
        "-W",
        "default",
        "-rsfE",
        "--durations",
        "20",
    ]  # -v, so that each result is there at once
    return ["-m", "pytest", "-m", "gpu", *options, *parallel, *GPU_TESTS]


def profile(folders: Folders, small: bool) -> list[str]:
    files = ["--models", str(folders.models), "--csv", str(folders.output / "kernels.csv")]
    return ["-m", "benchmarks.gpu.profile", *files, *small_option(small)]


def sweep(folders: Folders, small: bool) -> list[str]:
    return ["-m", "benchmarks.gpu.sweep", *small_option(small)]


def training(folders: Folders, small: bool) -> list[str]:
    recipe, steps = "configs/mini.toml", "10"
    if small:
        file = folders.models / "small.toml"
        file.parent.mkdir(exist_ok=True)  # not there if the weights could not be made
        file.write_text(SMALL_RECIPE)
        recipe, steps = str(file), "1"
    return ["-m", "benchmarks.training", recipe, "--steps", steps, "--precisions", "bfloat16", "highest"]


def compare(folders: Folders, small: bool) -> list[str]:
    return ["-m", "benchmarks.gpu.cases", "--models", str(folders.models), *small_option(small)]


def small_option(small: bool) -> list[str]:
    return ["--small"] if small else []


# In this order, the most important ones first: in ten minutes, the last ones get what time is left.
PARTS = {
    "tests": Part(
        "Tests on the GPU", 120, tests, r".*(PASSED|FAILED|ERROR|SKIPPED)|=.* (passed|failed|skipped|error)"
    ),
    "profile": Part("Where the time goes", 110, profile),
    "compare": Part("Beside other implementations", 240, compare),
    "training": Part("A step of training", 60, training),
    "sweep": Part("Sizes of the device kernels", 120, sweep, r"[|#]|- |    "),
}
