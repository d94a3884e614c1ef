"""Tokenization of corpora: audio in, Parquet files of codes out.

Every clip is encoded exactly once, or listed as an error with the reason.

    settings    what decides the codes, and which clips share an output file
    sources     the kinds of files that hold clips: audio, tar archives, Parquet files, manifests
    fetching    clips in a bucket, fetched before their turn
    inputs      what there is to tokenize, divided into shards
    plan        the shards of a job as a file, from which each process reads the clips of its own
    sharing     handing arrays from one process to another in memory
    workers     worker processes that read and resample audio
    programs    the compiled programs of a model on all devices of this process
    coding      encoding many clips at once, with a handful of these programs
    records     codes of clips, clips that failed, and counts of both
    output      the output folder: Parquet files, errors, the manifest, locks on shards
    progress    a progress bar, or a line in the log every minute
    tokenizer   a model with its workers, which encodes shards
    processes   how several processes share the work
    job         a whole job: `tokenize`
    on_ray      the same on a Ray cluster: `tokenize_on_ray`
    dataset     reading the codes, clip by clip or by number
    packed      files of rows into which clips were packed, and rows by number
    packing     clips of unequal length packed into rows of equal length
    text        codes as text

`__init__.pyi` lists the public names. Each is imported when it is first used, so that the worker processes
can do without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
