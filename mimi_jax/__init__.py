"""Mimi, Kyutai's streaming neural audio codec, in JAX.

`__init__.pyi` lists the public names. A name is imported when it is first used: `import mimi_jax` alone
loads neither JAX nor Flax.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
