"""Find audio files that were cut short, in the formats where libsndfile does not report it.

libsndfile plays what is left of such a file, and that must not pass for a whole clip. A WAV, RF64 or AIFF
file announces the length of its audio. An Ogg file marks its last page. FLAC and MP3 files have no such sign:
`AudioReader` compares the length of a FLAC file with its header, and an MP3 file that was cut short is a
shorter MP3 file.
"""

import os
from typing import BinaryIO, Literal

MAX_TRAILING = 4096  # bytes of tags that may follow the last audio of a file
MAX_OGG_PAGE = 65_307  # bytes


def is_cut_short(file: BinaryIO) -> bool:
    """Whether a seekable file ends too early, as far as its format can tell. Moves the file's position."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    match file.read(12)[:4]:
        case b"RIFF" | b"RF64":
            return _data_is_cut_short(file, size, "little")
        case b"RIFX" | b"FORM":
            return _data_is_cut_short(file, size, "big")
        case b"OggS":
            return _ogg_is_cut_short(file, size)
    return False


def _data_is_cut_short(file: BinaryIO, size: int, byteorder: Literal["little", "big"]) -> bool:
    """Whether the audio of a WAV, RF64 or AIFF file goes on beyond the end of the file.

    The file consists of sections, each with a name of 4 bytes and a length of 4 bytes.
    """
    rf64_length = None
    while len(header := file.read(8)) == 8:
        name, length = header[:4], int.from_bytes(header[4:], byteorder)
        start = file.tell()
        if name == b"ds64":  # lengths that 32 bits cannot hold
            rf64_length = int.from_bytes(file.read(16)[8:], byteorder)
        if name in (b"data", b"SSND"):
            # A program that writes to a pipe cannot know the length. It writes about 2 or 4 GiB instead.
            if not rf64_length and min(abs(length - 2**31), abs(length - 2**32)) <= 8192:
                return False
            return start + (rf64_length or length) > size
        file.seek(start + length + length % 2)
    return False


def _ogg_is_cut_short(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg file is incomplete, or is not marked as the last one."""
    file.seek(max(0, size - MAX_OGG_PAGE - MAX_TRAILING))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return True
    flags, num_segments = page[5], page[26]
    return not flags & 4 or len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments])
