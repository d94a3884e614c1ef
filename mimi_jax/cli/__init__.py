"""The command line, `mimi-jax`."""

from mimi_jax.cli.main import main

__all__ = ["main"]
