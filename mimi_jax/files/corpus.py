"""Corpora of audio: folders of audio files, and manifests. Tokenization, training and evaluation share this.

A manifest is a JSONL file: one JSON object per line, for one clip.

    path      audio file, relative to the folder of the manifest, or a URL
    id        name of the clip in what tokenization writes
    start     seconds; where the clip begins in the file
    end       seconds; where it ends
    source    corpus that the clip belongs to; training can weight sources
    speaker   training draws a speaker before it draws a clip
    features  .npy file with a teacher's features of the clip, for distillation in training

Only the path is required. A field that is null counts as absent, and other fields are ignored. A line of an
NVIDIA NeMo manifest is read too: `audio_filepath` is the path, `offset` the start, and `offset + duration`
the end.
"""

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from mimi_jax.config import MimiConfig, ceil_div
from mimi_jax.files import remote
from mimi_jax.files.audio import FORMATS, AudioReader
from mimi_jax.files.blocks import ARCHIVE, CROP, open_binary
from mimi_jax.files.remote import canonical, is_remote, join

AUDIO_SUFFIXES = (
    *FORMATS,
    *(".aif", ".aiff", ".aifc", ".au", ".bwf", ".caf", ".mp1", ".mp2", ".nist", ".oga", ".rf64"),
    *(".snd", ".sph", ".w64", ".wave"),
)
# Audio and video that cannot be read.
UNREADABLE_SUFFIXES = (
    *(".3g2", ".3gp", ".aac", ".ac3", ".adts", ".amr", ".ape", ".avi", ".awb", ".dff", ".dsf", ".dts"),
    *(".eac3", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4", ".mpc", ".mpeg", ".mpg"),
    *(".ra", ".rm", ".shn", ".spx", ".tak", ".tta", ".weba", ".webm", ".wma", ".wmv", ".wv"),
)
MAX_SECONDS = 1e9  # of a time in a manifest; a larger one is a mistake
SILENCE = 1e-4  # -80 dBFS; 16-bit audio has three steps below it
MARGIN = 64  # samples around a crop, for the filter of the resampler


class Entry(NamedTuple):
    """A clip as a manifest or a folder names it. Its file may be missing."""

    name: str  # the path as the manifest has it, or relative to the folder
    path: str  # to open the file with
    id: str | None = None
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None for the end of the file
    source: str = ""
    speaker: str = ""
    features: str | None = None  # a path to open


class LeftOut(NamedTuple):
    """A clip that cannot be used."""

    name: str
    reason: str


class Clip(NamedTuple):
    """A stretch of an audio file, with what the header of the file says about it."""

    path: str  # or URL
    source: str
    speaker: str
    start: int  # samples at the file's own rate
    num_samples: int  # at the file's own rate
    sampling_rate: int  # Hz, of the file
    features: str | None  # path or URL of a .npy file with a teacher's features of the clip

    @property
    def name(self) -> str:
        return _name(self.path, self.start / self.sampling_rate)


def find_files(
    folder: str | os.PathLike[str],
    suffixes: Sequence[str] = ("",),
    without: str | os.PathLike[str] | None = None,
) -> Iterator[str]:
    """Yield the paths of the files at any depth in a folder whose names end in one of the suffixes.

    The order is always the same. Links to folders are followed, but no folder is read twice.

    Args:
        folder: where to look.
        suffixes: in lower case, such as ".wav"; the case of the names does not matter. By default all files
            are found.
        without: a folder that is left out.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:  # os.walk would leave the folder out silently
        raise error

    seen = {os.path.realpath(without)} if without is not None else set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(tuple(suffixes)):
                yield os.path.join(root, name)


def read_entries(manifest: str | os.PathLike[str]) -> Iterator[Entry]:
    """Read a manifest, which may be remote. Empty lines are skipped.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: a line is not such an object; the error names the line.
    """
    folder = os.path.dirname(manifest)
    with open_binary(manifest, ARCHIVE) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = _entry(os.fspath(folder), line)
            except ValueError as error:
                raise ValueError(f"{printable(manifest)}, line {number}: {error}") from None
            yield entry


def _entry(folder: str, line: bytes) -> Entry:
    fields = _fields(line)
    name = fields.get("path", fields.get("audio_filepath"))
    if not isinstance(name, str):
        text = line[:80].decode("utf-8", "backslashreplace").strip()
        raise ValueError(f"must be a JSON object with a path, got {text!r}")
    if "path" in fields:
        start, end = _seconds(fields, "start"), _seconds(fields, "end")
    else:
        start, duration = _seconds(fields, "offset"), _seconds(fields, "duration")
        end = None if duration is None else (start or 0) + duration
    start = float(start or 0)
    if not 0 <= start < (float("inf") if end is None else end):
        raise ValueError(f"start must be at least 0 and lie before end, got {start:g} and {end}")
    features = fields.get("features")
    if features is not None and not isinstance(features, str):
        raise ValueError(f"features must be the path of a .npy file, got {features!r}")
    texts = {name: str(fields[name]) for name in ("id", "source", "speaker") if name in fields}
    return Entry(
        name=name,
        path=join(folder, name),
        start=start,
        end=end,
        features=features if features is None else join(folder, features),
        **texts,
    )


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of a line that are not null; none if the line is not a JSON object."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {name: value for name, value in fields.items() if value is not None}


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is not None and (type(value) not in (int, float) or not abs(value) < MAX_SECONDS):
        raise ValueError(f"{name} must be seconds, got {value!r}")
    return value


class Clips(NamedTuple):
    """The clips of a corpus, and the files that are none."""

    clips: list[Clip]
    left_out: list[LeftOut]


def find_clips(data: str | os.PathLike[str], include: str = "*") -> Clips:
    """List the clips of a folder or a manifest, and read the headers of their files.

    A file that is missing, that cannot be read or is damaged as far as its header shows, or that is shorter
    than the manifest says is left out, by name and with the reason.

    Args:
        data: a folder, a manifest or one audio file, or the URL of one. In a folder, audio files are found at
            any depth, and each subfolder is a source.
        include: a pattern that the path must match, as the manifest has it or relative to the folder.

    Raises:
        FileNotFoundError: the folder, the manifest or the file is missing.
        ConnectionError: a service cannot be reached.
        ValueError: a line of the manifest is wrong, nothing was found, or all files are left out.
    """
    data = os.fspath(data)
    entries = [entry for entry in _entries_of(data) if fnmatch.fnmatch(entry.name, include)]
    if not entries:
        raise ValueError(f"{data}: no audio files ({', '.join(AUDIO_SUFFIXES)}) match include={include!r}")
    clips, left_out = [], []
    for clip in tqdm(_clips(entries), "reading headers", len(entries), disable=None, leave=False):
        (clips if isinstance(clip, Clip) else left_out).append(clip)
    if not clips:
        first = left_out[0]
        raise ValueError(f"{data}: none of {len(left_out)} clips can be used; {first.name}: {first.reason}")
    return Clips(clips, left_out)


def _name(path: str, start: float) -> str:
    """The file of a clip, and the second where the clip begins, if not at the beginning of the file."""
    return f"{path}, from {start:g} s" if start else path


def _entries_of(data: str) -> list[Entry]:
    is_folder = remote.is_folder(data) if is_remote(data) else os.path.isdir(data)
    if is_folder:
        return _entries_of_folder(data)
    if not is_remote(data) and not os.path.exists(data):
        raise FileNotFoundError(f"there is no folder or manifest {data}")
    if os.path.splitext(data)[1].lower() in AUDIO_SUFFIXES:
        return [Entry(os.path.basename(data), data)]
    with open_binary(data, CROP) as file:
        if b"\0" in file.read(4096):
            raise ValueError(f"{data} is neither an audio file ({', '.join(AUDIO_SUFFIXES)}) nor a manifest")
    return list(read_entries(data))


def _entries_of_folder(folder: str) -> list[Entry]:
    suffixes = (*AUDIO_SUFFIXES, *UNREADABLE_SUFFIXES)
    if is_remote(folder):
        folder = canonical(folder)
        found = (file.url for file in remote.list_files(folder) if file.url.lower().endswith(suffixes))
    else:
        found = find_files(folder, suffixes)
    entries = []
    for path in sorted(found):
        name = path[len(os.path.join(folder, "")) :]
        source, separator, _ = name.partition("/")
        entries.append(Entry(name, path, source=source if separator else ""))
    return entries


def _clips(entries: Sequence[Entry]) -> Iterator[Clip | LeftOut]:
    """Read the headers of files: of remote ones many at a time, so that delays do not add up."""
    if not any(is_remote(entry.path) for entry in entries):
        yield from map(_clip_or_reason, entries)
        return
    with ThreadPoolExecutor(remote.AT_ONCE) as pool:
        yield from pool.map(_clip_or_reason, entries)


def _clip_or_reason(entry: Entry) -> Clip | LeftOut:
    try:
        return _clip(entry)
    except ConnectionError:  # without a part of the corpus, the results would be others
        raise
    except (OSError, ValueError) as error:
        return LeftOut(_name(entry.path, entry.start), reason_of(error))


def _clip(entry: Entry) -> Clip:
    for path in (entry.path, entry.features):
        if path is not None and not is_remote(path) and not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path}")
    with open_binary(entry.path, CROP) as file:
        reader = AudioReader(file, "the file", None, start=entry.start, end=entry.end)
        num_samples, rate = reader.num_samples, reader.sampling_rate
        if num_samples is None:  # the header does not state it
            num_samples = sum(piece.shape[1] for piece in reader)
    if num_samples == 0:
        raise ValueError("the file has no samples")
    start = round(entry.start * rate)
    return Clip(entry.path, entry.source, entry.speaker, start, num_samples, rate, entry.features)


def read_crop(clip: Clip, start: float, num_samples: int, config: MimiConfig) -> np.ndarray:
    """Read a part of a clip, at the rate and with the channels of a model.

    Args:
        clip: the clip.
        start: seconds from the beginning of the clip.
        num_samples: how many samples to return, at `config.sampling_rate`.
        config: of the model.

    Returns:
        float32 [channels, num_samples]; zeros after the end of the clip.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged here, or its channels cannot be mixed to those of the model.
    """
    rate, end = clip.sampling_rate, clip.start + clip.num_samples
    first = clip.start + round(start * rate)
    before = max(first - MARGIN, clip.start)
    after = min(first + ceil_div(num_samples * rate, config.sampling_rate) + MARGIN, end)
    with open_binary(clip.path, CROP) as file:
        reader = AudioReader(file, "the file", rate, config.audio_channels, before / rate, after / rate)
        samples = np.concatenate(list(reader), axis=1)
    if samples.shape[1] != after - before:
        raise ValueError(f"the file has changed: it ends before {after / rate:g} s")
    if rate != config.sampling_rate:
        samples = soxr.resample(samples.T, rate, config.sampling_rate).T
    skip = round((first - before) * config.sampling_rate / rate)
    crop = samples[:, skip : skip + num_samples]
    return np.pad(crop, [(0, 0), (0, num_samples - crop.shape[1])]).astype(np.float32)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif not isinstance(error, OSError | ValueError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def is_transient(error: Exception) -> bool:
    """Whether an error is transient: a network or a disk failed, and not the file itself."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return False
    # pyarrow raises OSError without a number for damaged files.
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno is not None)


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be written in UTF-8, whatever bytes are in it."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may have and no file system does
        return as_utf8(path)
    return encoded.decode("utf-8", "backslashreplace")


def as_utf8(value: object) -> str:
    """A value as text that can be written in UTF-8, which does not have half of a surrogate pair."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def expand_home(path: str | os.PathLike[str]) -> str:
    """Replace `~` or `~user` at the start of a path by the home folder, as a shell does.

    A file or folder of that name in the current folder has precedence.
    """
    path = os.fspath(path)
    return path if os.path.lexists(path.split(os.sep)[0]) else os.path.expanduser(path)
