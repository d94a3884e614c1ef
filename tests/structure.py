"""The structure of the source, in numbers: modules, imports, and the longest files and functions.

    python -m tests.structure [CHECKOUT]

A place is a folder with modules, or a module beside such folders. An arrow leads from one place to another if
a module of the first imports from the second. What is imported at the top of modules puts the places in an
order. An arrow leads upwards if it goes against that order. This needs the standard library only, and works
on any checkout, older ones too.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("mimi_jax", "benchmarks", "convert", "notebooks")
PACKAGE = "mimi_jax"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = ast.Module | ast.ClassDef | FUNCTION


class Arrow(NamedTuple):
    source: str
    target: str


def modules(checkout: Path) -> list[Path]:
    """All modules, relative to the checkout."""
    files = (file for folder in FOLDERS for file in (checkout / folder).rglob("*.py*"))
    return sorted(file.relative_to(checkout) for file in files if file.suffix in (".py", ".pyi"))


def place_of(module: Path) -> str:
    """`mimi_jax/nn/conv.py` is in the place `mimi_jax/nn`, and `mimi_jax/model.py` is one of its own."""
    if module.parts[0] != PACKAGE:
        return module.parts[0]
    return "/".join(module.with_suffix("").parts[:2])


def imported_names(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The dotted names that a source imports, and whether it imports them inside a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]
    deferred = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", id(node) in deferred) for alias in node.names)


def target_of(name: str, module: Path, places: set[str]) -> str | None:
    """The place that a name belongs to which a module imports; None outside of the checkout."""
    if name.startswith("."):  # in `__init__.pyi`, relative to its folder
        name = ".".join(module.parent.parts) + name
    first, *rest = name.split(".")
    if first != PACKAGE:
        return first if first in places else None
    inside = f"{PACKAGE}/{rest[0]}" if rest else ""
    return inside if inside in places else f"{PACKAGE}/__init__"


def arrows(checkout: Path) -> dict[Arrow, bool]:
    """Which places import which, and whether they do so inside functions only."""
    found = modules(checkout)
    places = {place_of(module) for module in found}
    result: dict[Arrow, bool] = {}
    for module in found:
        source = place_of(module)
        for name, is_deferred in imported_names(ast.parse((checkout / module).read_text())):
            target = target_of(name, module, places)
            if target is not None and target != source:
                arrow = Arrow(source, target)
                result[arrow] = result.get(arrow, True) and is_deferred
    return result


def upward(found: dict[Arrow, bool]) -> list[Arrow]:
    """The arrows that go against the order in which places import each other at the top of their modules."""
    before = defaultdict(set)
    for arrow, is_deferred in found.items():
        if not is_deferred:
            before[arrow.source].add(arrow.target)
    below: dict[str, set[str]] = {}

    def all_below(place: str) -> set[str]:
        if place not in below:
            below[place] = set()  # for circles
            below[place] = before[place].union(*map(all_below, before[place]))
        return below[place]

    return sorted(arrow for arrow in found if arrow.source in all_below(arrow.target))


def span(node: ast.stmt) -> int:
    """Lines from the first to the last of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstring_of(node: DOCUMENTED) -> ast.stmt | None:
    return node.body[0] if ast.get_docstring(node, clean=False) is not None else None


def function_lines(source: str) -> Iterator[tuple[str, int]]:
    """Each function and its lines, without those of its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTION):
            docstring = docstring_of(node)
            yield node.name, span(node) - (span(docstring) if docstring else 0)


def code_lines(source: str) -> int:
    """Lines of code: no docstrings, comments and blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (docstring := docstring_of(node)):
            docstrings |= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.split("#")[0].strip()) for number, line in lines if number not in docstrings)


def main() -> None:
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    found, all_arrows = modules(checkout), arrows(checkout)
    sources = {module: (checkout / module).read_text() for module in found}
    print("| folder | modules | lines |\n|---|---|---|")
    folders = Counter(module.parent for module in found)
    for folder, count in sorted(folders.items()):
        lines = sum(source.count("\n") for module, source in sources.items() if module.parent == folder)
        print(f"| {folder} | {count} | {lines:,} |")
    functions = [
        (length, f"{module}:{name}")
        for module, source in sources.items()
        for name, length in function_lines(source)
    ]
    longest_file = max((source.count("\n"), str(module)) for module, source in sources.items())
    longest_function = max(functions)
    backward = ", ".join(f"{arrow.source} -> {arrow.target}" for arrow in upward(all_arrows)) or "none"
    print(f"\nplaces: {len({place_of(module) for module in found})}")
    print(f"arrows: {len(all_arrows)}\narrows upwards: {backward}")
    print(f"longest file: {longest_file[1]}, {longest_file[0]} lines")
    print(f"longest function: {longest_function[1]}, {longest_function[0]} lines without its docstring")


if __name__ == "__main__":
    main()
