# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A corpus, tokenized
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mimi-jax/mimi_jax/blob/main/notebooks/tokenize_dataset.ipynb)
#
# A folder of audio becomes Parquet files of codes. Every clip is in them once, with the codes that it gets
# alone, or it is listed as an error with the reason. Then a loader reads them for training, on all devices.

# %%
# On a GPU: mimi_jax[cuda,plot,tokenize,train], which brings the plugin that goes with its JAX.
# Before the first release on PyPI: "mimi_jax[plot,tokenize,train] @ git+https://github.com/mimi-jax/mimi_jax"
# %pip install --quiet "mimi_jax[plot,tokenize,train]"

# %%
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import grain
import jax
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.dataset
from jax.sharding import NamedSharding, PartitionSpec

import mimi_jax
from mimi_jax.tokenization import CodeSource, Settings, read_manifest, tokenize

print(jax.devices())
MODEL = "mini"  # or "kyutai/mimi"
FOLDER = None  # or a folder of WAV, FLAC, OGG, MP3, of .tar or .parquet shards

work = Path(tempfile.mkdtemp())
model = mimi_jax.Mimi.from_pretrained(MODEL)
rate = model.config.sampling_rate

# %% [markdown]
# ## A folder
#
# If you do not name one of yours, it contains parts of the bundled clip with different loudnesses and
# sampling rates, a long clip, and two files that are broken.

# %%
FOLDER = work / "corpus" if FOLDER is None else Path(FOLDER)
if not FOLDER.exists():
    generator = np.random.default_rng(0)
    speech = mimi_jax.load_audio(files(mimi_jax) / "samples" / "speech.flac")[0]
    for number in range(60):
        start, stop = np.sort(generator.integers(0, len(speech), 2))
        gain = 10 ** generator.uniform(-1, 0)
        path = FOLDER / f"speaker_{number % 3}" / f"{number:03}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        mimi_jax.save_audio(path, gain * speech[start : stop + rate // 4], [16_000, 24_000][number % 2])
    mimi_jax.save_audio(FOLDER / "long.flac", np.tile(speech, 8))
    mimi_jax.save_audio(FOLDER / "silent.flac", np.zeros(rate, np.float32))
    (FOLDER / "broken.flac").write_bytes(path.read_bytes()[:1000])

print(f"{sum(1 for path in FOLDER.rglob('*') if path.is_file())} files")

# %% [markdown]
# ## Tokenize
#
# This is the same as `mimi-jax tokenize FOLDER -o tokens --num-quantizers 8`. Worker processes read and
# resample the audio. Short clips of about the same length are encoded together, and long ones as streams,
# on all devices.

# %%
summary = tokenize([FOLDER], work / "tokens", MODEL, Settings(num_quantizers=8, clips_per_shard=16))
print(f"{summary.now.clips} clips and {summary.now.errors} errors, {60 * summary.hours:.1f} min of audio")
print(f"in {summary.seconds:.1f} s, {summary.realtime:.0f} x realtime,")
print(f"with the compilation of {summary.compilations} programs, which a long run does only once")

# %% [markdown]
# pyarrow, Polars and Hugging Face `datasets` open the result directly.

# %%
table = pyarrow.dataset.dataset(work / "tokens" / "codes", format="parquet").to_table()
print(f"{'id':<24}{'seconds':>8}{'frames':>8}   the first codes")
for row in table.slice(0, 6).to_pylist():
    seconds = row["num_samples"] / rate
    print(f"{row['id']:<24}{seconds:>8.2f}{row['num_frames']:>8}   {row['codes'][:6]}")
print("\nwhat could not be coded:")
for row in pyarrow.dataset.dataset(work / "tokens" / "errors", format="parquet").to_table().to_pylist():
    print(f"{row['id']:<24}{row['reason']}")

# %%
manifest = read_manifest(work / "tokens")
(
    {name: manifest["settings"][name] for name in ("model_id", "num_quantizers", "dtype", "num_shards")},
    manifest["totals"],
)

# %% [markdown]
# ## Killed, and run again
#
# A job may be killed at any moment. The same command continues it: a shard is written completely or not at
# all, and only the missing shards are done.

# %%
line = [
    sys.executable,
    "-m",
    "mimi_jax.cli",
    "tokenize",
    str(FOLDER),
    "-o",
    str(work / "again"),
    "--model",
    MODEL,
]
line += ["--num-quantizers", "8", "--clips-per-shard", "4"]
job = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
done = work / "again" / "codes"
while job.poll() is None and len(list(done.glob("*.parquet"))) < 1:
    time.sleep(0.01)
job.send_signal(signal.SIGKILL)
job.wait()
before = {path.name: path.stat().st_mtime_ns for path in done.glob("*.parquet")}
print(f"killed after {len(before)} shards")

again = subprocess.run(line, capture_output=True, text=True)
assert again.returncode == 1, again.stderr  # since two clips are broken
print(again.stdout.rpartition("wrote")[0])
after = {path.name: path.stat().st_mtime_ns for path in done.glob("*.parquet")}
assert all(after[name] == moment for name, moment in before.items())
print(f"{len(after)} shards, {len(before)} of them from before")

# %%
first, second = ({clip.id: clip.codes for clip in CodeSource(work / name)} for name in ("tokens", "again"))
assert first.keys() == second.keys()
assert all((first[name] == second[name]).all() for name in first)
print(f"all {len(first)} clips are there once, with equal codes")

# %% [markdown]
# ## A loader
#
# `CodeSource` is a data source for Grain. It reads clips in any order, without reading the rest. A batch is
# padded and divided among all local devices, each of which gets its own rows. Then it is ready for a jitted
# training step.

# %%
BATCH, FRAMES = 8 * jax.local_device_count(), 50

mesh = jax.make_mesh((jax.local_device_count(),), ("data",))
by_row = NamedSharding(mesh, PartitionSpec("data"))


def crop(clip, rng):
    """Codes [codebooks, FRAMES] from a random start, and which of them are real."""
    start = rng.integers(0, max(clip.codes.shape[1] - FRAMES, 0) + 1)
    codes = clip.codes[:, start : start + FRAMES]
    padding = FRAMES - codes.shape[1]
    return {
        "codes": np.pad(codes, [(0, 0), (0, padding)]).astype(np.int32),
        "mask": np.arange(FRAMES) < FRAMES - padding,
    }


loader = (
    grain.MapDataset.source(CodeSource(work / "tokens"))
    .seed(0)
    .shuffle()
    .repeat()
    .random_map(crop)
    .batch(BATCH)
    .to_iter_dataset()
)
batches = iter(loader)
batch = jax.device_put(next(batches), by_row)
jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), batch)

# %%
start, count = time.perf_counter(), 100
for _ in range(count):
    batch = jax.device_put(next(batches), by_row)
seconds = (time.perf_counter() - start) / count
audio = BATCH * FRAMES * model.config.frame_size / rate
print(f"{1000 * seconds:.1f} ms a batch: {audio / seconds:,.0f} s of audio a second, on the host")

# %% [markdown]
# ## What is in it
#
# How often each code of a codebook is used. A codec that wastes its codes has a steep curve.

# %%
usage = [
    np.bincount(
        np.concatenate([codes[book] for codes in first.values()]), minlength=model.config.codebook_size
    )
    for book in range(8)
]
figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
for book, counts in enumerate(usage):
    axis.plot(
        np.sort(counts)[::-1] / counts.sum(), color=plt.cm.viridis(book / 8), label=f"codebook {book + 1}"
    )
axis.set(
    yscale="log", xlabel="codes, most frequent first", ylabel="share of frames", title="Use of the codes"
)
axis.legend(ncols=2)
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# [docs/tokenization.md](../docs/tokenization.md) has the rest: several machines, SLURM, TPUs, Ray, and what
# 100,000 hours would cost. [speech_lm](speech_lm.ipynb) trains a language model, with `encode` inside its
# step.
