"""WAV, AIFF, W64, CAF, AU and NIST SPHERE files: a header that states how long the samples are, and samples.

libsndfile believes the header. It plays what is left of a file that was cut short, and leaves out what
follows the stated end. So the header is compared with the file.
"""

import math
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from mimi_jax.config import ceil_div
from mimi_jax.files.containers import mpeg
from mimi_jax.files.containers.spans import Container, is_padding, part_of, read_at

PCM, MP3_IN_WAV = (1, 3, 0xFFFE), 0x55  # format tags of WAV files: samples that are not compressed, and MP3
UNKNOWN = 8192  # bytes around 2 and 4 GiB: lengths that programs write which cannot know the length
# Sections that may follow the audio, even if their stated length is wrong.
NOTES = (b"LIST", b"id3 ", b"ID3 ", b"JUNK", b"bext", b"iXML", b"_PMX", b"cue ", b"afsp")
FILES = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff")  # what a second file begins with


class Style(NamedTuple):
    """How a file is divided into sections, each with a name and a length."""

    prefix: int  # bytes before the first section
    name_size: int  # bytes
    length_size: int  # bytes
    byteorder: Literal["little", "big"]
    alignment: int  # bytes; sections begin at multiples of it
    data: bytes  # what the name of the section with the samples begins with
    includes_header: bool = False  # whether the length counts the name and the length


WAV = Style(12, 4, 4, "little", 2, b"data")
WAV_BIG_ENDIAN = WAV._replace(byteorder="big")
AIFF = Style(12, 4, 4, "big", 2, b"SSND")
W64 = Style(40, 16, 8, "little", 8, b"data", includes_header=True)
CAF = Style(8, 4, 8, "big", 1, b"data")


class WavFormat(NamedTuple):
    """The section of a WAV file that describes its samples."""

    tag: int
    channels: int
    sampling_rate: int  # Hz
    byte_rate: int  # bytes per second
    block_align: int  # bytes of one sample in all channels
    bits: int  # of a sample


class Section(NamedTuple):
    name: bytes
    start: int  # of its content
    length: int  # of its content

    @property
    def end(self) -> int:
        return self.start + self.length


def open_wav(file: BinaryIO, start: int, end: int) -> Container:
    big = read_at(file, start, 4) == b"RIFX"
    return _open_sections(file, start, end, WAV_BIG_ENDIAN if big else WAV)


def open_aiff(file: BinaryIO, start: int, end: int) -> Container:
    return _open_sections(file, start, end, AIFF)


def open_w64(file: BinaryIO, start: int, end: int) -> Container:
    return _open_sections(file, start, end, W64)


def open_caf(file: BinaryIO, start: int, end: int) -> Container:
    return _open_sections(file, start, end, CAF)


def open_au(file: BinaryIO, start: int, end: int) -> Container:
    order = "big" if read_at(file, start, 4) == b".snd" else "little"
    header, length = (int.from_bytes(read_at(file, start + at, 4), order) for at in (4, 8))
    if length == 2**32 - 1:
        return Container(part_of(file, start, end))
    check_end(file, start + header + length, end)
    return Container(part_of(file, start, start + header + length), num_bytes=length)


def open_nist(file: BinaryIO, start: int, end: int) -> Container:
    header = read_at(file, start, 1024)
    size = int(header[8:16]) if header[8:16].strip().isdigit() else 1024
    header = read_at(file, start, min(size, 1 << 20))
    fields = dict(re.findall(rb"(\w+) -i (\d+)", header))
    if b"shorten" in header:
        raise ValueError("is compressed with shorten, which cannot be read; unpack it with sph2pipe")
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    if not fields.keys() >= {*names}:
        raise ValueError("is damaged: its header does not state how long it is")
    length = math.prod(int(fields[name]) for name in names)
    check_end(file, start + size + length, end)
    return Container(part_of(file, start, start + size + length), num_bytes=length)


def check_not_cut(stated: int, end: int) -> None:
    """Refuse a file that ends before the stated end of its audio."""
    if stated > end:
        raise ValueError(
            f"is cut short: its audio should end at {stated} bytes, but the file ends at {end} bytes"
        )


def check_end(file: BinaryIO, stated: int, end: int) -> None:
    """Refuse a file whose audio should end elsewhere than at `end`, but for tags and padding after it."""
    check_not_cut(stated, end)
    if not is_padding(file, stated, end):
        limit = " (32 bits cannot state more than 4 GiB)" if end - stated > 2**32 - 2**16 else ""
        raise ValueError(
            f"goes on for {end - stated} bytes after the end that its header states: the header is"
            f" wrong{limit}, or there are several streams in one file; convert it to FLAC with a program that"
            " reads all of it"
        )


def _open_sections(file: BinaryIO, start: int, end: int, style: Style) -> Container:
    sections: dict[bytes, Section] = {}
    for section in _sections(file, start, start + style.prefix, end, style):
        sections[section.name[:4]] = section
        if section.name[:4] == style.data:
            break
    else:
        raise ValueError("is damaged: it has no section with samples, or the length of a section is wrong")
    data = sections[style.data]
    length = _length_of_data(file, start, end, sections, style)
    stated = end if length is None else data.start + length
    if length is not None:
        _check_after(file, start, stated, end, style)
    if b"fmt " in sections and style is not W64:
        form = _wav_format(file, sections[b"fmt "], style)
        if form.tag == MP3_IN_WAV:
            return mpeg.open_mpeg(file, data.start, stated)
    if style is CAF and length is None:  # libsndfile needs the length
        head = read_at(file, start, data.start - start - 8) + (end - data.start).to_bytes(8, "big")
        return Container(part_of(file, data.start, end, head))
    if length is None:
        return Container(part_of(file, start, end))
    end = stated if style is W64 else end  # libsndfile reads a W64 file to its end
    return Container(part_of(file, start, end), num_bytes=length - _before_samples(file, data, style))


def _sections(file: BinaryIO, base: int, position: int, end: int, style: Style) -> Iterator[Section]:
    """The sections of a file that begins at `base`, from a position on.

    The last one may claim to go on after the end.
    """
    size = style.name_size + style.length_size
    while position + size <= end and len(header := read_at(file, position, size)) == size:
        length = int.from_bytes(header[style.name_size :], style.byteorder)
        length -= size if style.includes_header else 0
        yield Section(header[: style.name_size], position + size, length)
        position += size + max(length, 0)
        position += (base - position) % style.alignment


def _length_of_data(
    file: BinaryIO, start: int, end: int, sections: dict[bytes, Section], style: Style
) -> int | None:
    """The stated length of the section with the samples; None for a file that a program wrote to a pipe."""
    data = sections[style.data]
    if (ds64 := sections.get(b"ds64")) and data.length == 2**32 - 1:  # RF64 has lengths of 64 bits
        return int.from_bytes(read_at(file, ds64.start + 8, 8), "little") or None
    if style is CAF and data.length == 2**64 - 1:
        return None
    nearest = min(abs(data.length - 2**31), abs(data.length - 2**32))
    if style.length_size == 4 and nearest <= UNKNOWN and data.end >= end:
        return None
    is_unfinished = style is WAV and data.length == 0 and read_at(file, start + 4, 4) == b"\x08\0\0\0"
    return None if is_unfinished else data.length


def _before_samples(file: BinaryIO, data: Section, style: Style) -> int:
    """How many bytes stand in front of the samples in their section."""
    if style is AIFF:
        return 8 + int.from_bytes(read_at(file, data.start, 4), "big")
    return 4 if style is CAF else 0


def _wav_format(file: BinaryIO, section: Section, style: Style) -> WavFormat:
    order = "<" if style.byteorder == "little" else ">"
    data = read_at(file, section.start, 16)
    if len(data) < 16:
        raise ValueError("is cut short inside its header")
    form = WavFormat(*struct.unpack(f"{order}HHIIHH", data))
    if form.tag in PCM and form.block_align != form.channels * ceil_div(form.bits, 8):
        raise ValueError(
            f"has a wrong header: it states {form.channels} channels of {form.bits} bits in blocks of"
            f" {form.block_align} bytes"
        )
    return form


def _check_after(file: BinaryIO, start: int, stated: int, end: int, style: Style) -> None:
    """Compare the stated end of the samples with the file. Other sections may follow them."""
    check_not_cut(stated, end)
    position = stated
    padding = (start - stated) % style.alignment
    if not read_at(file, stated, padding).strip(b"\0"):  # some programs leave the padding out
        position += padding
    for section in _sections(file, start, position, end, style):
        is_note = section.name[:4] in NOTES
        is_text = section.name[:4].isascii() and section.name[:4].decode("ascii", "replace").isprintable()
        if section.name[:4] in (*FILES, style.data) or not (is_note or (is_text and section.end <= end)):
            break
        position = section.end + (start - section.end) % style.alignment
    check_end(file, min(position, end), end)
