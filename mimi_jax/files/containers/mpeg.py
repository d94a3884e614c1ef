"""MP3 files, and MPEG audio of layers I and II: a chain of MPEG frames, each with a header of 4 bytes.

Nothing states where such a chain ends. The first frame of many MP3 files is a note (named Xing or Info) that
says how many frames follow, but it can be wrong, for instance after two files were joined. Without the note,
libsndfile estimates the length from the bit rate, and stops there. So the frames are counted here, and a note
with that count is put in front of them.
"""

import functools
import os
from array import array
from typing import BinaryIO, NamedTuple

from mimi_jax.files.containers.spans import Container, is_padding, part_of, read_at, skip_tags

BLOCK = 1 << 20  # bytes that are read at once
MAX_FRAME = 4096  # bytes
MAX_ZEROS = 1 << 16  # bytes that may stand before the first frame
MARK = 32  # frames; see `_begin_at`
REMEMBERED = 64  # files whose frames are not searched again
PERIOD = 8  # frames; see `_begin_at`
NOTE_BYTES = 12  # a name, flags and the number of frames
DECODER_DELAY = 529  # samples, of mpg123
VBRI = 36  # where a note of this name stands in its frame
MPEG_1, LAYER_III = 3, 1  # as the bits of a header have them

# Indexed by the bits of the header. Version: 0 is MPEG 2.5, 2 is MPEG 2, 3 is MPEG 1. Layer: 1 is III.
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
KBITS = {
    (True, 3): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class Header(NamedTuple):
    """What the header of an MPEG frame says."""

    version: int
    layer: int
    sampling_rate: int  # Hz
    is_mono: bool
    samples: int  # of each channel, in a frame
    size: int  # bytes of the frame

    @property
    def kind(self) -> tuple[int, int, int, bool]:
        """What all frames of a stream have in common. mpg123 cannot go on where it changes."""
        return self.version, self.layer, self.sampling_rate, self.is_mono


def parse(header: bytes) -> Header | None:
    """Read the first 4 bytes of a frame; None if no frame begins like this."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer, kbits, rate = header[1] >> 3 & 3, header[1] >> 1 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 0 or kbits in (0, 15) or rate == 3:
        return None
    sampling_rate, padding = RATES[version][rate], header[2] >> 1 & 1
    if layer == 3:
        samples, unit = 384, 4  # the unit of the size, in bytes
    else:
        samples, unit = 1152 if version == 3 or layer == 2 else 576, 1
    bits = KBITS[version == 3, layer][kbits] * 1000
    size = (samples // 8 // unit * bits // sampling_rate + padding) * unit
    return Header(version, layer, sampling_rate, header[3] >> 6 == 3, samples, size)


class _Sizes(dict[bytes, int]):
    """The sizes of the frames of one kind, by their first 4 bytes; 0 for anything else."""

    def __init__(self, kind: tuple[int, int, int, bool]):
        self._kind = kind

    def __missing__(self, key: bytes) -> int:
        header = parse(key)
        self[key] = header.size if header is not None and header.kind == self._kind else 0
        return self[key]


class Chain(NamedTuple):
    """The frames of a file."""

    count: int
    end: int  # bytes; where the last one ends
    places: array  # uint64; where every MARK-th frame begins, the first one included


def open_mpeg(file: BinaryIO, start: int, end: int) -> Container:
    """Count the frames, and put a note with their number in front of them."""
    start = _skip_zeros(file, start, end)
    first = read_at(file, start, MAX_FRAME)
    header = parse(first)
    if header is None:
        raise ValueError("is not a WAV, AIFF, AU, CAF, W64, NIST, FLAC, OGG or MP3 file, or it is damaged")
    first = first[: header.size]
    if len(first) < header.size:
        raise ValueError(f"is cut short: it ends at {end} bytes, inside the first MPEG frame")
    if header.layer != LAYER_III:
        chain = _remembered(file, start, end, header)
        return Container(part_of(file, start, chain.end), num_samples=chain.count * header.samples)
    at = _place_of_note(header)
    has_note = first[at : at + 4] in (b"Xing", b"Info")
    # A note of another kind (VBRI) would be played by mpg123.
    is_note = has_note or first[VBRI : VBRI + 4] == b"VBRI"
    audio = start + header.size * is_note
    chain = _remembered(file, audio, end, header)
    if has_note and first[at + 7] & 1:
        head = _correct_note(first, header, chain, chain.end - start)
        skipped = DECODER_DELAY + _encoder_delay(first[at:])
    else:
        head, skipped = _make_note(first, header, chain.count), 0
    begin_at = functools.partial(_begin_at, file, first, header, chain, skipped)
    if head == first:
        return Container(part_of(file, start, chain.end), begin_at=begin_at)
    return Container(part_of(file, audio, chain.end, head), begin_at=begin_at)


def _correct_note(frame: bytes, header: Header, chain: Chain, num_bytes: int) -> bytes:
    """The note that is in a frame, with the true number of frames and bytes."""
    at = _place_of_note(header)
    stated = int.from_bytes(frame[at + 8 : at + NOTE_BYTES], "big")
    if stated > chain.count:
        raise ValueError(f"is cut short: it has {chain.count} MPEG frames, but states that it has {stated}")
    # mpg123 believes a note only if nothing but zeros stands before it.
    head = frame[:4].ljust(at, b"\0") + frame[at : at + 8]
    head += chain.count.to_bytes(4, "big") + frame[at + NOTE_BYTES :]
    if frame[at + 7] & 2:  # the number of bytes follows; mpg123 warns if it is wrong
        head = head[: at + 12] + num_bytes.to_bytes(4, "big") + head[at + 16 :]
    return head


def _encoder_delay(note: bytes) -> int:
    """How many samples a note asks to leave out at the beginning, besides those of the decoder."""
    flags = note[7]
    at = 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1) + 21
    return int.from_bytes(note[at : at + 3], "big") >> 12


def _begin_at(
    file: BinaryIO, frame: bytes, header: Header, chain: Chain, skipped: int, sample: int
) -> tuple[BinaryIO, int]:
    """A file that begins at a marked frame before a sample, and the sample where it begins.

    Its first frames are silent, since their audio would begin in frames before them.

    mpg123 rounds in one of several ways, which alternate from frame to frame with PERIOD, which divides MARK.
    The silent frame of `_make_note` counts too. If the whole file does not begin with one, there are more of
    them here, so that all samples are those of the whole file to the last bit.

    Args:
        file: all of it.
        frame, header: of its first frame.
        chain: its frames.
        skipped: samples that mpg123 leaves out at the beginning of the whole file.
        sample: of the whole file.
    """
    mark = (sample + skipped) // header.samples // MARK
    silent, begin = _silence(file, chain.places[mark], chain.end, header)
    more = PERIOD - 1 if skipped else 0
    head = _make_note(frame, header, chain.count - mark * MARK + more) + more * _fill(b"", frame, header)
    return part_of(file, begin, chain.end, head + silent), (mark * MARK - more) * header.samples - skipped


def _silence(file: BinaryIO, position: int, end: int, header: Header) -> tuple[bytes, int]:
    """Make the frames at a position silent until the next one finds its audio, and say where that begins.

    The audio of a frame may begin in frames before it, up to 511 bytes back (255 in MPEG 2), not counting
    headers. So what is after the side information is kept, and all of that is zeros but for how far back the
    audio begins: mpg123 forgets what lies before.
    """
    bits = 9 if header.version == MPEG_1 else 8  # of the distance, which comes first in the side information
    furthest, length, frames, num_bytes = (1 << bits) - 1, _place_of_note(header), b"", 0
    while num_bytes < furthest and position < end:
        frame = read_at(file, position, MAX_FRAME)
        found = parse(frame)
        if found is None or found.kind != header.kind:  # a tag, where files were joined
            break
        head = bytes([frame[0], frame[1] | 1, *frame[2:4]])  # without a checksum
        head += (num_bytes << 16 - bits).to_bytes(2, "big")
        after = length + (0 if frame[1] & 1 else 2)
        frames += head.ljust(after, b"\0") + frame[after : found.size]
        num_bytes += found.size - after
        position += found.size
    return frames, position


def _skip_zeros(file: BinaryIO, start: int, end: int) -> int:
    """Where zeros and tags end that stand before the first frame, if there are any."""
    if read_at(file, start, 1) == b"\0":
        zeros = read_at(file, start, min(MAX_ZEROS, end - start))
        start = skip_tags(file, start + len(zeros) - len(zeros.lstrip(b"\0")))
    return start


_chains: dict[tuple[int, ...], Chain] = {}  # of the files that were opened last


def _remembered(file: BinaryIO, position: int, end: int, header: Header) -> Chain:
    """`_find_frames`, but a file is not read again for each of its stretches that a manifest names."""
    try:
        status = os.fstat(file.fileno())
    except OSError:  # it is in memory, or in an archive
        return _find_frames(file, position, end, header)
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, position, end
    chain = _chains.get(key) or _find_frames(file, position, end, header)
    if len(_chains) == REMEMBERED:
        _chains.clear()
    _chains[key] = chain
    return chain


def _find_frames(file: BinaryIO, position: int, end: int, header: Header) -> Chain:
    """Find the frames from a position on. Tags may stand between them, where files were joined."""
    sizes, count, places = _Sizes(header.kind), 0, array("Q")
    while position < end:
        block = read_at(file, position, min(BLOCK, end - position))
        at, last = 0, len(block) - 3
        while at < last and (size := sizes[block[at : at + 4]]):
            if count % MARK == 0:
                places.append(position + at)
            at += size
            count += 1
        position += at
        if position > end:
            raise ValueError(f"is cut short: it ends at {end} bytes, inside an MPEG frame")
        if at < last or last <= 0:
            if is_padding(file, position, end):
                break
            if (after := skip_tags(file, position)) == position:
                raise ValueError(f"is damaged: no MPEG frame of the same kind begins at byte {position}")
            position = after
    return Chain(count, position, places)


def _place_of_note(header: Header) -> int:
    """Where the note would be in a frame: after the side information, as if there were no checksum."""
    mono, others = (17, 32) if header.version == MPEG_1 else (9, 17)
    return 4 + (mono if header.is_mono else others)


def _make_note(frame: bytes, header: Header, count: int) -> bytes:
    """Two frames of the same kind: a note that says how many frames follow, and a silent frame.

    A note makes mpg123 leave out its own delay at the beginning. So this note asks for a longer delay, which
    is just the silent frame, and nothing of the audio is left out.
    """
    silence = _fill(b"", frame, header)
    delay = (header.samples - DECODER_DELAY) << 12  # 12 bits, before 12 bits for what is left out at the end
    note = b"Xing\0\0\0\1" + (count + 1).to_bytes(4, "big") + b"mimi_jax".ljust(21, b"\0")
    note += delay.to_bytes(3, "big") + bytes(12)
    return _fill(note, frame, header) + silence


def _fill(content: bytes, frame: bytes, header: Header) -> bytes:
    """A frame of the same kind as another, with this in the place of a note, at the lowest bit rate."""
    for kbits in range(1, 15):
        start = bytes([0xFF, frame[1] | 1, kbits << 4 | frame[2] & 0x0C, frame[3]])  # without a checksum
        start = start.ljust(_place_of_note(header), b"\0") + content
        if (size := _Sizes(header.kind)[start[:4]]) >= len(start):
            return start.ljust(size, b"\0")
    raise AssertionError("a frame of the highest bit rate has room for a note")
