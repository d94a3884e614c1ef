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
# # mimi_jax in two minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mimi-jax/mimi_jax/blob/main/notebooks/quickstart.ipynb)
#
# Mimi turns 24 kHz speech into 12.5 frames a second of discrete codes, and back. Here you hear and see what
# it does to a clip: the clip that comes with the package, one of yours, or one that you record now.

# %%
# On a GPU: mimi_jax[cuda,plot], which brings the plugin that goes with its JAX.
# Before the first release on PyPI: "mimi_jax[plot] @ git+https://github.com/mimi-jax/mimi_jax"
# %pip install --quiet "mimi_jax[plot]"

# %%
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Audio, Image, display

import mimi_jax
from mimi_jax.quality.picture import draw, log_mel

jax.devices()

# %% [markdown]
# ## A model
#
# `"mini"` comes with the package. It is small, was trained for hours on two CPU cores, and sounds like it.
# `"kyutai/mimi"` is Kyutai's own model, 400 MB from the Hugging Face Hub.

# %%
MODEL = "mini"  # or "kyutai/mimi"

model = mimi_jax.Mimi.from_pretrained(MODEL)
config = model.config
frame_rate = config.sampling_rate / config.frame_size  # Hz
print(f"{MODEL}: {config.num_quantizers} codebooks of {config.codebook_size}, {frame_rate} frames a second")

# %% [markdown]
# ## A clip

# %%
SOURCE = "bundled"  # or "upload" a file, or "record" some seconds: both in Colab


def record(seconds: float) -> str:
    """Record with the browser's microphone; returns the name of a WAV file."""
    import base64
    import subprocess

    from google.colab import output  # pyright: ignore[reportMissingImports]

    script = """
    (async () => {
      const stream = await navigator.mediaDevices.getUserMedia({audio: true});
      const recorder = new MediaRecorder(stream), pieces = [];
      recorder.ondataavailable = event => pieces.push(event.data);
      const stopped = new Promise(resolve => recorder.onstop = resolve);
      recorder.start();
      await new Promise(resolve => setTimeout(resolve, %d));
      recorder.stop();
      await stopped;
      stream.getTracks().forEach(track => track.stop());
      const bytes = new Uint8Array(await new Blob(pieces).arrayBuffer());
      return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
    })()
    """
    with open("recorded.webm", "wb") as file:
        file.write(base64.b64decode(output.eval_js(script % (1000 * seconds))))
    subprocess.run(["ffmpeg", "-y", "-loglevel", "error", "-i", "recorded.webm", "recorded.wav"], check=True)
    return "recorded.wav"


if SOURCE == "upload":
    from google.colab import files  # pyright: ignore[reportMissingImports]

    path = next(iter(files.upload()))
elif SOURCE == "record":
    path = record(seconds=5)
else:
    from importlib.resources import files

    path = files(mimi_jax) / "samples" / "speech.flac"

clip = mimi_jax.load_audio(path)  # float32 [channels, samples], at 24 kHz


# %%
def player(audio) -> Audio:
    """MP3, which is small enough to be kept in a notebook."""
    mimi_jax.save_audio("clip.mp3", np.asarray(audio))
    return Audio("clip.mp3")


player(clip)

# %% [markdown]
# ## Encode
#
# `encode` is jitted: the first call with a shape compiles, and the next ones run.

# %%
for run in ("cold", "warm"):
    start = time.perf_counter()
    codes = jax.block_until_ready(mimi_jax.encode(model, clip[None]).audio_codes)
    seconds = time.perf_counter() - start
    print(
        f"{run}: {seconds * 1000:,.0f} ms, {clip.shape[1] / config.sampling_rate / seconds:,.1f} x realtime"
    )

batch, codebooks, frames = codes.shape
print(f"{clip.shape[1]:,} samples -> {codebooks} codebooks x {frames} frames")
codes[0, :8, :10]  # the first row is the semantic codebook

# %% [markdown]
# ## Decode

# %%
decoded = mimi_jax.decode(model, codes).audio_values[0, :, : clip.shape[1]]
player(decoded)

# %% [markdown]
# ## See it
#
# Waveforms, mel spectrograms, and the codes in between. A column is a frame of 80 ms, and a row is a
# codebook. Colours only show which codes are equal.

# %%
picture = draw(
    clip,
    np.asarray(decoded),
    np.asarray(codes[0]),
    sampling_rate=config.sampling_rate,
    frame_size=config.frame_size,
    codebook_size=config.codebook_size,
    title=f"{MODEL}, {codebooks} codebooks",
)
Image(picture, width=900)

# %% [markdown]
# ## How many codebooks?
#
# The first codebook is the semantic one. Each of the others refines what those before it left over. So the
# first codebooks alone can be decoded too, and their number decides the bit rate. Moshi uses eight.

# %%
counts = sorted({1, 2, 4, 8, codebooks})
versions = {
    n: np.asarray(mimi_jax.decode(model, codes[:, :n]).audio_values)[0, :, : clip.shape[1]] for n in counts
}
bits = frame_rate * np.log2(config.codebook_size)  # a second, of each codebook
for n, audio in versions.items():
    display(HTML(f"<b>{n} of {codebooks} codebooks, {n * bits / 1000:.2f} kbit/s</b>"), player(audio))

# %%
shown = {
    "original": clip,
    **{f"{n} codebook{'s' * (n > 1)}\n{n * bits / 1000:.2f} kbit/s": versions[n] for n in counts},
}
mels = {name: log_mel(audio.mean(axis=0), config.sampling_rate).T for name, audio in shown.items()}
loudest = max(mel.max() for mel in mels.values())
figure, axes = plt.subplots(len(mels), sharex=True, sharey=True, figsize=(8, 7), layout="constrained")
for axis, (name, mel) in zip(axes, mels.items(), strict=True):
    extent = (0, clip.shape[1] / config.sampling_rate, 0, len(mel))
    image = axis.imshow(
        mel - loudest, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent
    )
    axis.set_ylabel(f"{name}\nmel band", fontsize=8)
axes[-1].set_xlabel("time (s)")
axes[0].set_title("Mel spectrograms of what comes back")
figure.colorbar(image, ax=axes, label="power (dB, loudest = 0)")
plt.show()

# %% [markdown]
# Next: [streaming](streaming.ipynb) goes frame by frame, [tokenize_dataset](tokenize_dataset.ipynb) encodes
# a corpus, [speech_lm](speech_lm.ipynb) trains a language model on the codes, and
# [train_codec](train_codec.ipynb) trains the codec.
