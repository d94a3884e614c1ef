"""Mimi, Kyutai's streaming neural audio codec, in JAX.

    config        the architecture, and the three clocks
    ops           what is computed in one of several ways, and who chooses
    nn            the layers
    boundary      where users' arrays enter and leave the model
    model         `Mimi`, `encode`, `decode`, `encode_step`, `decode_step`
    files         what is read from disk and written there
    checkpoint    models on disk, in several layouts
    streams       streams outside of compiled functions
    export        the codec in one file, without the layers
    tokens        codes in the orders that language models of speech want
    quality       how good decoded audio is, in numbers and pictures
    tokenization  corpora of audio into Parquet files of codes
    train         the training of a codec
    serve         live streams over WebSockets, and a page
    cli           the command line, `mimi-jax`

Reading order is import order, here and inside each folder. `__init__.pyi` lists the public names. A name is
imported when it is first used: `import mimi_jax` alone loads neither JAX nor Flax.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
