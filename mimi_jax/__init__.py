"""Mimi, Kyutai's streaming neural audio codec, in JAX.

Names are imported when they are first used: `import mimi_jax` alone loads neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimi_jax.audio import bucket_length as bucket_length
    from mimi_jax.audio import load_audio as load_audio
    from mimi_jax.audio import pad_batch as pad_batch
    from mimi_jax.audio import save_audio as save_audio
    from mimi_jax.codes import CodeFile as CodeFile
    from mimi_jax.codes import load_codes as load_codes
    from mimi_jax.codes import save_codes as save_codes
    from mimi_jax.config import MimiConfig as MimiConfig
    from mimi_jax.model import Mimi as Mimi
    from mimi_jax.model import decode as decode
    from mimi_jax.model import decode_step as decode_step
    from mimi_jax.model import encode as encode
    from mimi_jax.model import encode_step as encode_step
    from mimi_jax.model import pad_to_frame as pad_to_frame
    from mimi_jax.rows import put_rows as put_rows
    from mimi_jax.rows import reset_rows as reset_rows
    from mimi_jax.rows import take_rows as take_rows
    from mimi_jax.sessions import StreamingDecoder as StreamingDecoder
    from mimi_jax.sessions import StreamingEncoder as StreamingEncoder
    from mimi_jax.state_files import load_state as load_state
    from mimi_jax.state_files import save_state as save_state

_MODULES = {
    "audio": ("bucket_length", "load_audio", "pad_batch", "save_audio"),
    "codes": ("CodeFile", "load_codes", "save_codes"),
    "config": ("MimiConfig",),
    "model": ("Mimi", "decode", "decode_step", "encode", "encode_step", "pad_to_frame"),
    "rows": ("put_rows", "reset_rows", "take_rows"),
    "state_files": ("load_state", "save_state"),
    "sessions": ("StreamingDecoder", "StreamingEncoder"),
}
_HOMES = {name: f"mimi_jax.{module}" for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mimi_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
