"""The architecture, checked on the source.

The docstring of each package lists its modules in reading order, and a module imports only what stands
before it. Files and functions stay short, and the core can be read in one sitting.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure import arrows, code_lines, function_lines, imported_names, upward

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mimi_jax"
# One step back, inside functions only: `Mimi.from_pretrained` and `Mimi.save_pretrained`.
BACKWARD = ("mimi_jax.model", "mimi_jax.checkpoint")
# The package never imports the first, and the second only inside functions, because they are slow to import.
FORBIDDEN = {"moshi", "torch", "transformers"}
# fmt: off
LAZY = {
    "array_record", "fsspec", "grain", "jax_triton", "matplotlib", "optax", "orbax", "prometheus_client",
    "pyarrow", "pystoi", "qwix", "ray", "starlette", "tensorboardX", "triton", "uvicorn", "uvloop", "visqol",
    "websockets",
}
# fmt: on
WITH_TRITON = "mimi_jax.ops.triton_kernels"  # its decorators need Triton, so importing it is slow too
# What computes the numbers of the reference path. What chooses, device kernels of accelerators, and what is
# written such that their compiler makes few, are counted apart.
CORE = [PACKAGE / "ops", PACKAGE / "nn", PACKAGE / "model.py"]
# fmt: off
APART = {
    "eigen.py", "few_passes.py", "few_rows.py", "fused_attention.py", "fusible.py", "lanes.py",
    "pallas_stages.py", "parts.py", "policy.py", "polyphase.py", "tensor_cores.py", "transformer_step.py",
    "triton_kernels.py", "triton_stages.py",
}
# fmt: on
MAX_CORE_LINES = 1050  # of code; docstrings, comments and blank lines do not count
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50  # its docstring does not count
MAX_ARROWS = 78

SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted(file for folder in ("benchmarks", "convert") for file in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """`mimi_jax/nn/conv.py` is "mimi_jax.nn.conv", and `mimi_jax/nn/__init__.py` is "mimi_jax.nn"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def listed(docstring: str) -> list[str]:
    """The modules that a docstring lists, one an indented line: its name, and what it is."""
    return re.findall(r"^(?:    )?(\w+)  +\S", docstring, flags=re.MULTILINE)


FACES = {
    module_of(path): listed(ast.get_docstring(ast.parse(path.read_text()), clean=False) or "")
    for path in SOURCES
    if path.name == "__init__.py"
}


def imported_module(name: str) -> str:
    """The module that an imported name is in: "mimi_jax.nn.conv" for "mimi_jax.nn.conv.Conv1d"."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def rank(module: str, parent: str) -> int:
    """The place of a module, or of the folder that it is in, in the face of a package."""
    child = module.removeprefix(f"{parent}.").split(".")[0]
    names = FACES[parent]
    return names.index(child) if child in names else len(names)  # the face itself comes last


def common_package(first: str, second: str) -> str:
    """The innermost package that two modules are in."""
    parts: list[str] = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    package = ".".join(parts)
    return package if package in FACES else package.rpartition(".")[0]


def import_errors(source: str, module: str) -> Iterator[str]:
    """Every import in a source, as one of `module`, that breaks a rule."""
    for name, is_deferred in imported_names(ast.parse(source)):
        root = name.split(".")[0]
        if not root:
            yield f"relative import of {name}; write mimi_jax.<module>"
        elif root in FORBIDDEN:
            yield f"{root} may be imported only in convert/, benchmarks/ and tests/parity/"
        elif (root in LAZY or name == WITH_TRITON) and not is_deferred and module != WITH_TRITON:
            yield f"{root} is slow to import; import it in the function that needs it"
        elif root == "mimi_jax":
            target = imported_module(name)
            if target == module or (is_deferred and (module, target) == BACKWARD):
                continue
            package = common_package(module, target)
            if rank(target, package) > rank(module, package):
                yield f"{module} imports {target}, which stands after it in {package}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str):
    assert list(import_errors(MODULES[module].read_text(), module)) == []


@pytest.mark.parametrize("package", FACES)
def test_a_package_lists_its_modules(package: str):
    folder = MODULES[package].parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert sorted(FACES[package]) == sorted(modules | packages)


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path):
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    assert {name: n for name, n in function_lines(source) if n > MAX_FUNCTION_LINES} == {}


def test_the_core_reads_in_one_sitting():
    paths = [path for part in CORE for path in ([part] if part.is_file() else part.rglob("*.py"))]
    lines = {path.name: code_lines(path.read_text()) for path in paths if path.name not in APART}
    assert sum(lines.values()) <= MAX_CORE_LINES, lines


def test_few_arrows_and_none_upwards_but_one():
    found = arrows(ROOT)
    assert len(found) <= MAX_ARROWS
    assert [(arrow.source, arrow.target) for arrow in upward(found)] == [
        ("mimi_jax/model", "mimi_jax/checkpoint")
    ]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("from mimi_jax.model import Mimi", "mimi_jax.nn.conv imports mimi_jax.model, which stands after it"),
        ("import mimi_jax.files.audio", "mimi_jax.nn.conv imports mimi_jax.files.audio, which stands after"),
        ("from mimi_jax.nn import seanet", "mimi_jax.nn.conv imports mimi_jax.nn.seanet, which stands after"),
        ("from mimi_jax.nn.seanet import Encoder", "mimi_jax.nn.conv imports mimi_jax.nn.seanet, which"),
        ("import mimi_jax", "mimi_jax.nn.conv imports mimi_jax, which stands after it in mimi_jax"),
        ("from mimi_jax import Mimi", "mimi_jax.nn.conv imports mimi_jax, which stands after it in mimi_jax"),
        ("from .config import MimiConfig", "relative import of .config.MimiConfig; write"),
        ("def f():\n    import torch", "torch may be imported only in"),
        ("from transformers import MimiModel", "transformers may be imported only in"),
        ("import orbax.checkpoint as ocp", "orbax is slow to import"),
        ("from mimi_jax.ops import triton_kernels", "mimi_jax is slow to import"),
    ],
)
def test_the_check_sees_bad_imports(source: str, error: str):
    (found,) = import_errors(source, "mimi_jax.nn.conv")
    assert found.startswith(error)


@pytest.mark.parametrize(
    "source",
    [
        "import jax",
        "from mimi_jax.config import MimiConfig",
        "from mimi_jax.nn.conv import Conv1d",
        "def f():\n    import optax",
        "def f():\n    from mimi_jax import checkpoint\n    checkpoint.load('mini')",
    ],
)
def test_the_check_lets_good_imports_pass(source: str):
    assert list(import_errors(source, "mimi_jax.model")) == []


def test_docstrings_comments_and_blank_lines_do_not_count():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    # Why.\n\n    x = 1  # Why.\n    return x\n'
    assert list(function_lines(source)) == [("f", 5)]
    assert code_lines(source) == 3
