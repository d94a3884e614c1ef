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
# # Train the codec
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mimi-jax/mimi_jax/blob/main/notebooks/train_codec.ipynb)
#
# Kyutai released Mimi, but not the code that trained it. `mimi_jax.train` follows the paper: losses,
# discriminator, balancer, codebooks, distillation. Here only the decoder is tuned to a voice, in a minute.
# The encoder and the codebooks stay as they are. So existing codes keep their meaning, and so do the models
# that were trained on them.

# %%
# On a GPU: mimi_jax[cuda,plot,train], which brings the plugin that goes with its JAX.
# Before the first release on PyPI: "mimi_jax[plot,train] @ git+https://github.com/mimi-jax/mimi_jax"
# %pip install --quiet "mimi_jax[plot,train]"

# %%
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Audio

import mimi_jax
from mimi_jax.quality.picture import log_mel
from mimi_jax.quality.spectrum import mel_distance
from mimi_jax.train import Recipe, train
from mimi_jax.train.recipe import DataRecipe, LossRecipe, OptimizerRecipe

print(jax.devices())
MODEL = "mini"  # or "kyutai/mimi", on a GPU
FOLDER = None  # or a folder of speech
STEPS = 150

work = Path(tempfile.mkdtemp())
before = mimi_jax.Mimi.from_pretrained(MODEL)
rate = before.config.sampling_rate
clip = mimi_jax.load_audio(files(mimi_jax) / "samples" / "speech.flac")
if FOLDER is None:
    FOLDER = work / "speech"
    FOLDER.mkdir()
    mimi_jax.save_audio(FOLDER / "speech.flac", clip)

# %% [markdown]
# ## A recipe
#
# A recipe decides everything that a run does. `Recipe.from_toml("configs/decoder.toml")` reads one from a
# file, as `mimi-jax train` does. This recipe has no discriminator, so that a run takes a minute on a CPU. For
# a real run, which takes hours, set `adversarial` and `features` to 4.

# %%
recipe = Recipe(
    mode="decoder",
    init=MODEL,
    steps=STEPS,
    log_every=2,
    checkpoint_every=STEPS,
    data=DataRecipe(seconds=1.92, batch_size=4, gain=(-3.0, 0.0)),
    optimizer=OptimizerRecipe(
        learning_rate=3e-4, warmup_steps=20, schedule="cosine", max_norm=10.0, ema_decay=0.95
    ),
    losses=LossRecipe(adversarial=0.0, features=0.0, mel_power=1.0, mel_floor=1e-3),
)
tuned = train(recipe, FOLDER, work / "run")
print(sorted(path.name for path in (work / "run").iterdir()))

# %% [markdown]
# ## Curves

# %%
log = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
steps = np.array([line["step"] for line in log])
WIDTH = 15  # lines: a step uses a random number of codebooks, so the losses jump
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for axis, name, title in zip(axes, ("loss/mel", "loss/waveform"), ("mel loss", "waveform loss"), strict=True):
    values = np.array([line[name] for line in log])
    axis.plot(steps, values, color="tab:blue", alpha=0.3, label="as it is")
    mean = np.convolve(values, np.ones(WIDTH) / WIDTH, mode="valid")
    axis.plot(steps[WIDTH // 2 :][: len(mean)], mean, color="tab:blue", label=f"mean of {2 * WIDTH} steps")
    axis.set(xlabel="step", ylabel=title, title=title.capitalize(), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
plt.show()

# %% [markdown]
# ## Before and after
#
# The bundled sentence, decoded from the same codes. Without a `FOLDER` of yours, the decoder was tuned to
# this very sentence. To hear what a voice gains, listen to other sentences of it.

# %%
after = mimi_jax.Mimi.from_pretrained(tuned)
codes = mimi_jax.encode(before, clip[None]).audio_codes
np.testing.assert_array_equal(codes, mimi_jax.encode(after, clip[None]).audio_codes)  # frozen, bit for bit

heard = {"original": clip}
for name, model in {"before": before, "after": after}.items():
    heard[name] = np.asarray(mimi_jax.decode(model, codes).audio_values[0, :, : clip.shape[1]])
    print(f"{name}: mel distance {float(mel_distance(clip[None], heard[name][None], rate)):.2f} dB")


def player(name):
    mimi_jax.save_audio("clip.mp3", heard[name])
    return Audio("clip.mp3")


player("original")

# %%
player("before")

# %%
player("after")

# %%
mels = {name: log_mel(audio.mean(axis=0), rate).T for name, audio in heard.items()}
loudest = max(mel.max() for mel in mels.values())
figure, axes = plt.subplots(3, sharex=True, sharey=True, figsize=(10, 6), layout="constrained")
for axis, (name, mel) in zip(axes, mels.items(), strict=True):
    extent = (0, clip.shape[1] / rate, 0, len(mel))
    image = axis.imshow(
        mel - loudest, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent
    )
    axis.set_ylabel(f"{name}\nmel band")
axes[-1].set_xlabel("time (s)")
axes[0].set_title("Mel spectrograms")
figure.colorbar(image, ax=axes, label="power (dB, loudest = 0)")
plt.show()

# %% [markdown]
# `work / "run" / "model"` is an ordinary model: `Mimi.from_pretrained` reads it, here or in `transformers`.
# A run that was killed continues with `resume=True` and gives the same numbers.
# [docs/training.md](../docs/training.md) has the rest: training from scratch, distillation, several devices.
