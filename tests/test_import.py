"""`import mimi_jax` stays light: what is slow or optional is imported where it is used."""

import subprocess
import sys

import pytest

OPTIONAL = {
    "grain",
    "jax_triton",
    "matplotlib",
    "moshi",
    "optax",
    "qwix",
    "ray",
    "torch",
    "transformers",
    "triton",
}
HEAVY = OPTIONAL | {"huggingface_hub", "orbax", "tensorstore"}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import mimi_jax", set()),
        # flax.nnx itself imports optax, on which flax depends.
        ("from mimi_jax import Mimi, MimiConfig, encode, decode", {"optax"}),
    ],
)
def test_import_brings_in_nothing_heavy(statement: str, allowed: set[str]):
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) & HEAVY <= allowed
