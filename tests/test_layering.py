"""The architecture, checked on the source: imports go one way, and the core stays readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mimi_jax"
CORE = ["config", "streaming", "conv", "attention", "transformer", "seanet", "quantizer", "model"]
# Reading order is import order: a module imports only modules that stand before it.
FILES = ["atomic", "weight_names", "int8", "checkpoint", "audio", "codes"]
STREAMS = ["rows", "state_files", "sessions", "blocks", "pipes", "export"]
# The kernels stand before the layers that call them, and are read by those who wonder how these are fast.
MODEL = [*CORE[:2], "kernels", *CORE[2:]]
LAYERS = [
    *MODEL,
    *FILES,
    *STREAMS,
    "tokenization",
    "mel",
    "metrics",
    "train",
    "evaluation",
    "picture",
    "__init__",
    "cli",
]
# One step back, inside functions only: `Mimi.from_pretrained` and `Mimi.save_pretrained`.
BACKWARD = {("model", "checkpoint")}
# Never imported by the package, or only inside functions because they are slow to import.
FORBIDDEN = {"moshi", "torch", "transformers"}
LAZY = {"grain", "matplotlib", "optax", "orbax", "pyarrow", "pystoi", "qwix", "ray", "tensorboardX", "visqol"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
MAX_FUNCTION_LINES = 50
MAX_CORE_LINES = 1340  # docstrings count, blank lines do not

SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """`mimi_jax/nn/conv.py` and `mimi_jax/conv/anything.py` are both the layer `conv`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that an import statement asks for; a relative import starts with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def own_layer(name: str) -> str:
    """The layer that a `mimi_jax...` import reaches; public names come from `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


def import_errors(source: str, layer: str) -> Iterator[str]:
    """Every import in `source`, a module of `layer`, that breaks a rule."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]
    deferred = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in imported_names(node):
            root = name.split(".")[0]
            if not root:
                yield f"relative import of {name}; write mimi_jax.<module>"
            elif root in FORBIDDEN:
                yield f"{root} may be imported only in convert/, benchmarks/ and tests/parity/"
            elif root in LAZY and id(node) not in deferred:
                yield f"{root} is slow to import; import it in the function that needs it"
            elif root == "mimi_jax":
                target = own_layer(name)
                if id(node) in deferred and (layer, target) in BACKWARD:
                    continue
                if LAYERS.index(target) > LAYERS.index(layer):
                    yield f"{layer} imports {target}, which stands after it in LAYERS"


def function_lines(source: str) -> Iterator[tuple[str, int]]:
    """Name and length of every function, its docstring not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTION):
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = span(node) - (span(docstring) if docstring else 0)
            yield node.name, lines


def span(node: ast.stmt) -> int:
    """Lines from the first to the last of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    layer = layer_of(path)
    assert layer in LAYERS, f"{layer} is not in LAYERS; add it at its place in the reading order"
    assert list(import_errors(path.read_text(), layer)) == []


@pytest.mark.parametrize("layer", MODEL)
def test_core_functions_are_short(layer: str):
    lengths = dict(function_lines((PACKAGE / f"{layer}.py").read_text()))
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_core_reads_in_one_sitting():
    sources = {layer: (PACKAGE / f"{layer}.py").read_text() for layer in CORE}
    lines = {layer: sum(map(bool, map(str.strip, source.splitlines()))) for layer, source in sources.items()}
    assert sum(lines.values()) <= MAX_CORE_LINES, lines


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("from mimi_jax.model import Mimi", "conv imports model, which stands after it in LAYERS"),
        ("import mimi_jax.files.audio", "conv imports audio, which stands after it in LAYERS"),
        ("from mimi_jax import seanet", "conv imports seanet, which stands after it in LAYERS"),
        ("import mimi_jax", "conv imports __init__, which stands after it in LAYERS"),
        ("from mimi_jax import Mimi", "conv imports __init__, which stands after it in LAYERS"),
        ("from .config import MimiConfig", "relative import of .config.MimiConfig; write"),
        ("def f():\n    import torch", "torch may be imported only in"),
        ("from transformers import MimiModel", "transformers may be imported only in"),
        ("import orbax.checkpoint as ocp", "orbax is slow to import"),
    ],
)
def test_the_check_sees_bad_imports(source: str, error: str):
    (found,) = import_errors(source, "conv")
    assert found.startswith(error)


@pytest.mark.parametrize(
    "source",
    [
        "import jax",
        "from mimi_jax.config import MimiConfig",
        "def f():\n    import optax",
        "def f():\n    from mimi_jax.checkpoint import load",
    ],
)
def test_the_check_lets_good_imports_pass(source: str):
    assert list(import_errors(source, "model")) == []


def test_docstrings_do_not_count_as_function_lines():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert list(function_lines(source)) == [("f", 3)]
