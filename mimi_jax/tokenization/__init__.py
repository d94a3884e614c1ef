"""Tokenization at scale: shards of audio in, Parquet files of codes out, nothing lost and nothing twice.

    inputs      what there is to do: folders, tar archives, Parquet files, manifests
    decoding    worker processes that read and resample
    coding      many clips at once, in a handful of compiled programs
    output      Parquet files, errors, the manifest; claims on shards
    progress    a bar, or a line a minute
    job         all of it: `tokenize`
    on_ray      the same on a cluster
    reading     what was written: clip by clip, for Grain, as text

Names are imported when they are first used: the workers do without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimi_jax.tokenization.job import Summary as Summary
    from mimi_jax.tokenization.job import tokenize as tokenize
    from mimi_jax.tokenization.on_ray import tokenize_on_ray as tokenize_on_ray
    from mimi_jax.tokenization.reading import CodeSource as CodeSource
    from mimi_jax.tokenization.reading import TokenizedClip as TokenizedClip
    from mimi_jax.tokenization.reading import from_unicode as from_unicode
    from mimi_jax.tokenization.reading import read_codes as read_codes
    from mimi_jax.tokenization.reading import read_manifest as read_manifest
    from mimi_jax.tokenization.reading import to_unicode as to_unicode

_MODULES = {
    "job": ("Summary", "tokenize"),
    "on_ray": ("tokenize_on_ray",),
    "reading": ("CodeSource", "TokenizedClip", "from_unicode", "read_codes", "read_manifest", "to_unicode"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
