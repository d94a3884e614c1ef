"""Tokenization at scale: shards of audio in, Parquet files of codes out, nothing lost and nothing twice.

    inputs      what there is to do: folders, tar archives, Parquet files, manifests
    workers     worker processes that read and resample
    coding      many clips at once, in a handful of compiled programs
    output      Parquet files, errors, the manifest; claims on shards
    progress    a bar, or a line a minute
    job         all of it: `tokenize`
    on_ray      the same on a cluster
    dataset     what was written: clip by clip, for Grain, as text

`__init__.pyi` lists the public names. A name is imported when it is first used: the workers do without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
