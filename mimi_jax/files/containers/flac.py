"""FLAC files. The header states how many samples there are, or 0 if the program could not know it.

libFLAC stops after the stated number. Without the number it reads all of the file, and refuses everything
that is not FLAC. So it does not get to see the number, and the number is compared with what was read. But
without the number it cannot look for a place by halves, and may read the file many times over.
"""

from typing import BinaryIO

from mimi_jax.files.containers.spans import Container, part_of, read_at, trim_tags

STATED = slice(21, 26)  # the bytes of the header whose last 36 bits are the number of samples


def open_flac(file: BinaryIO, start: int, end: int) -> Container:
    head = bytearray(read_at(file, start, STATED.stop))
    if len(head) < STATED.stop:
        raise ValueError("is cut short inside its header")
    num_samples = int.from_bytes(head[STATED], "big") & (1 << 36) - 1
    head[STATED] = bytes([head[STATED.start] & 0xF0, 0, 0, 0, 0])
    end = trim_tags(file, start + len(head), end)
    part = part_of(file, start + len(head), end, bytes(head))
    if num_samples == 0:
        return Container(part)
    return Container(part, num_samples=num_samples, file_to_seek=part_of(file, start, end))
