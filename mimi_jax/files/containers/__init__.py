"""The containers that audio is read from, each with a check that the file is whole.

libsndfile reads them all, but it plays what is left of a file that was cut short, leaves out what follows a
wrong length, and estimates lengths. Each module here compares what a file states with what is in it, and says
which bytes libsndfile should get.

spans     a part of a file as a file of its own; the tags of music players before and after the audio
mpeg      MP3, and MPEG audio of layers I and II
samples   WAV, AIFF, W64, CAF, AU and NIST SPHERE: a header, and samples
flac      FLAC
ogg       Ogg: Vorbis and Opus
"""

from collections.abc import Callable
from typing import BinaryIO

from mimi_jax.files.containers import flac, mpeg, ogg, samples
from mimi_jax.files.containers.spans import Container, read_at, skip_tags

# By the first bytes of a file. Each function takes the file, and where the audio begins and ends in it.
CONTAINERS: dict[bytes, Callable[[BinaryIO, int, int], Container]] = {
    b"RIFF": samples.open_wav,
    b"RIFX": samples.open_wav,
    b"RF64": samples.open_wav,
    b"FORM": samples.open_aiff,
    b"riff": samples.open_w64,
    b"caff": samples.open_caf,
    b".snd": samples.open_au,
    b"dns.": samples.open_au,
    b"NIST": samples.open_nist,
    b"fLaC": flac.open_flac,
    b"OggS": ogg.open_ogg,
}


def open_container(file: BinaryIO) -> Container:
    """Find out what a file contains, and check that it is whole, as far as this shows without decoding it.

    Args:
        file: binary and seekable.

    Raises:
        ValueError: the file is not audio, is damaged, or was cut short. The message goes on after the name of
            the file.
    """
    end = file.seek(0, 2)
    start = skip_tags(file, 0)
    if start >= end:
        raise ValueError(f"is cut short: it ends at {end} bytes, inside a tag before the audio")
    return CONTAINERS.get(read_at(file, start, 4), mpeg.open_mpeg)(file, start, end)
