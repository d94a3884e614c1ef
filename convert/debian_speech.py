"""Add the speech of three Debian packages to a folder of speech with a manifest.

    apt-get download festvox-ru asterisk-core-sounds-it-g722 asterisk-core-sounds-ru-g722
    for package in *.deb; do dpkg-deb -x $package packages; done
    pip install av  # decodes G.722
    python -m convert.debian_speech packages speech

`festvox-ru` is 99 minutes of one Russian speaker, (c) 2005 Nickolay V. Shmyrev, under a BSD-like licence. The
prompts of Asterisk are 48 minutes of two speakers, Italian (c) 2012 Carlo Flora and Russian (c) 2010 Maxim,
under CC BY 3.0. All of it is at 16 kHz. Prompts are short, so neighbours become one clip.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from mimi_jax.files.atomic import atomic_path

RATE = 16_000
SECONDS = 10  # that prompts are joined to
SOURCES = {
    "festvox-ru": ("usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav", "*.wav"),
    "asterisk-it": ("usr/share/asterisk/sounds/it_IT_m_Carlo", "*.g722"),
    "asterisk-ru": ("usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU", "*.g722"),
}


def read(path: Path) -> np.ndarray:
    """A file as int16 [samples]."""
    if path.suffix == ".wav":
        return soundfile.read(path, dtype="int16")[0]
    import av

    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def clips(paths: list[Path], seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Names and clips of at least so many seconds, except for the last one."""
    parts: list[np.ndarray] = []
    for path in tqdm(paths, disable=None):
        parts.append(read(path))
        if sum(map(len, parts)) >= seconds * RATE or path == paths[-1]:
            yield path.stem, np.concatenate(parts)
            parts = []


def main() -> None:
    parser = argparse.ArgumentParser(description="Add speech of Debian packages to a folder of speech.")
    parser.add_argument("packages", type=Path, help="the folder that the packages were unpacked into")
    parser.add_argument("speech", type=Path, help="a folder with manifest.jsonl and train/")
    options = parser.parse_args()
    manifest = options.speech / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [line for line in lines if line["source"] not in SOURCES]  # a second call adds nothing
    for source, (folder, pattern) in SOURCES.items():
        found = sorted((options.packages / folder).rglob(pattern))
        paths = [path for path in found if path.parent.name != "silence" and path.stat().st_size]
        if not paths:
            raise ValueError(f"{options.packages / folder} has no {pattern}; unpack the packages of {source}")
        for name, audio in clips(paths, 0 if source == "festvox-ru" else SECONDS):
            path = f"train/{source}_{name}.flac"
            soundfile.write(options.speech / path, audio, RATE)
            fields = {"path": path, "source": source, "speaker": source, "sampling_rate": RATE}
            lines.append(fields | {"seconds": round(len(audio) / RATE, 2)})
    with atomic_path(manifest) as file:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source in SOURCES:
        added = [line["seconds"] for line in lines if line["source"] == source]
        print(f"{source}: {len(added)} clips, {sum(added) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
