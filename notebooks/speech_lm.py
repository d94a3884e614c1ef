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
# # A language model that speaks
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mimi-jax/mimi_jax/blob/main/notebooks/speech_lm.ipynb)
#
# This is a small Transformer that models Mimi's codes, in Flax NNX and optax. There is no dataset of codes:
# `encode` runs inside the jitted training step. So each step sees other parts of the audio, shifted by less
# than a frame and with other loudnesses.
#
# The model learns the bundled sentence, since that is all the speech that comes with the package, and then
# says something close to it. With hours of speech (`FOLDER`), a larger model and a GPU, it is a recipe to
# start from.

# %%
# On a GPU: mimi_jax[cuda,plot,train], which brings the plugin that goes with its JAX.
# Before the first release on PyPI: "mimi_jax[plot,train] @ git+https://github.com/mimi-jax/mimi_jax"
# %pip install --quiet "mimi_jax[plot,train]"

# %%
import time
from importlib.resources import files

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Audio

import mimi_jax
from mimi_jax.files.audio import FORMATS
from mimi_jax.tokens import delay, undelay

print(jax.devices())
MODEL = "mini"  # or "kyutai/mimi"
FOLDER = None  # or a folder of speech
DELAYS = (0, 1, 1, 1)  # in frames, of the first codebooks: the semantic one, then acoustic ones
STEPS = 250

codec = mimi_jax.Mimi.from_pretrained(MODEL)
rate, frame_size, size = codec.config.sampling_rate, codec.config.frame_size, codec.config.codebook_size
if FOLDER is None:
    clips = [mimi_jax.load_audio(files(mimi_jax) / "samples" / "speech.flac")[0]]
else:
    from pathlib import Path

    clips = [
        mimi_jax.load_audio(path)[0] for path in sorted(Path(FOLDER).rglob("*")) if path.suffix in FORMATS
    ]
    assert clips, f"{FOLDER} holds no audio"
print(f"{len(clips)} clips, {sum(map(len, clips)) / rate:.1f} s")

# %% [markdown]
# ## The model
#
# As in Moshi, the acoustic codes come one frame after the semantic one: `delay` makes the tokens, and
# `undelay` the codes. So what is said stands in the past when the model chooses how it sounds.
#
# A frame enters as the sum of the embeddings of its tokens. The Transformer sees the frames so far and
# predicts the tokens of the next frame, one codebook after the other. Each codebook is given the tokens of
# those before it, since the acoustic codes of a frame depend on each other.

# %%
CODEBOOKS = len(DELAYS)
PAD = size  # a token that is no code: it stands before the first frame, and where a codebook is late


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        causal = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=causal)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class SpeechLM(nnx.Module):
    def __init__(self, width: int, depth: int, frames: int, *, rngs: nnx.Rngs):
        self.embed = nnx.List([nnx.Embed(size + 1, width, rngs=rngs) for _ in range(CODEBOOKS)])
        self.position = nnx.Embed(frames, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, 4, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(width, size, rngs=rngs) for _ in range(CODEBOOKS)])

    def __call__(self, past, tokens):
        """Logits [batch, codebooks, frames, size] of tokens [batch, codebooks, frames]; `past` are those one
        frame before."""
        x = sum(embed(past[:, book]) for book, embed in enumerate(self.embed))
        x = x + self.position(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        x, logits = self.norm(x), []
        for book, head in enumerate(self.heads):
            logits.append(head(x))
            x = x + self.embed[book](tokens[:, book])  # the next codebook is told this one
        return jnp.stack(logits, axis=1)


def shift(tokens):
    """What stands one frame before."""
    return jnp.pad(tokens, [(0, 0), (0, 0), (1, 0)], constant_values=PAD)[:, :, :-1]


# %% [markdown]
# ## A training step, with `encode` inside
#
# The codec is an argument, as any other pytree. No gradient goes through it. A batch is audio. The logits of
# the tokens are undelayed to those of the codes, so the pads have no loss.

# %%
SECONDS, BATCH = 6, 4
frames = codec.encoded_length(SECONDS * rate)
lm = SpeechLM(width=128, depth=2, frames=frames + max(DELAYS), rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(
    lm, optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=0.01), wrt=nnx.Param
)
print(f"{sum(x.size for x in jax.tree.leaves(nnx.state(lm, nnx.Param))) / 1e6:.1f} million parameters")


@nnx.jit
def train_step(lm, optimizer, codec, audio, mask):
    out = mimi_jax.encode(codec, audio, mask, num_quantizers=CODEBOOKS)
    codes, real = out.audio_codes, out.audio_codes_mask[:, None]
    tokens = delay(jnp.where(real, codes, PAD), DELAYS, PAD)

    def loss_of(lm):
        logits = undelay(lm(shift(tokens), tokens), DELAYS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        return jnp.sum(losses * real, axis=(0, 2)) / jnp.sum(real)  # by codebook

    loss, gradients = nnx.value_and_grad(lambda lm: loss_of(lm).mean())(lm)
    optimizer.update(lm, gradients)
    return loss


def batch_of(generator):
    """Stretches of clips, each begun less than a frame from the start of one or anywhere in a long one."""
    rows = []
    for _ in range(BATCH):
        clip = clips[generator.integers(len(clips))]
        start = generator.integers(0, max(len(clip) - SECONDS * rate, min(len(clip), frame_size)))
        rows.append(10 ** generator.uniform(-0.3, 0) * clip[start : start + SECONDS * rate])
    audio, mask = mimi_jax.pad_batch([*rows, np.zeros(SECONDS * rate, np.float32)])  # to one length
    return audio[:BATCH], mask[:BATCH]


# %%
generator, losses, start = np.random.default_rng(0), [], time.perf_counter()
for step in range(STEPS):
    losses.append(float(train_step(lm, optimizer, codec, *batch_of(generator))))
    if step % 50 == 0 or step == STEPS - 1:
        print(f"step {step:4}: loss {losses[-1]:.3f}, {time.perf_counter() - start:5.1f} s")

# %%
figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
axis.plot(losses)
axis.axhline(
    np.log(size), color="tab:gray", linestyle="--", label=f"guessing: ln {size} = {np.log(size):.2f}"
)
axis.set(xlabel="step", ylabel="cross-entropy (nats a code)", title="The loss falls", ylim=(0, None))
axis.grid(alpha=0.3)
axis.legend()
plt.show()
assert np.mean(losses[-20:]) < 0.5 * losses[0]

# %% [markdown]
# ## Let it speak
#
# It starts from nothing and draws each token from the model's distribution, frame after frame and codebook
# after codebook. Where `delay` puts a pad, nothing is drawn. `decode` turns the codes into audio. (Each frame
# computes all frames before it again, which is simple. A real implementation keeps keys and values.)

# %%
TEMPERATURE = 0.7


@nnx.jit
def speak(lm, key):
    tokens = delay(jnp.zeros((1, CODEBOOKS, frames), jnp.int32), DELAYS, PAD)

    def step(tokens, place):
        frame, book = place // CODEBOOKS, place % CODEBOOKS
        logits = lm(shift(tokens), tokens)[0, book, frame] / TEMPERATURE
        drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
        is_pad = tokens[0, book, frame] == PAD
        return tokens.at[0, book, frame].set(jnp.where(is_pad, PAD, drawn)), None

    tokens, _ = jax.lax.scan(step, tokens, jnp.arange(CODEBOOKS * tokens.shape[2]))
    return undelay(tokens, DELAYS)


def player(audio, name):
    mimi_jax.save_audio(name, np.asarray(audio))
    return Audio(name)


spoken = [speak(lm, jax.random.key(seed)) for seed in range(2)]
player(mimi_jax.decode(codec, spoken[0]).audio_values[0], "sample.mp3")

# %%
player(mimi_jax.decode(codec, spoken[1]).audio_values[0], "other.mp3")

# %% [markdown]
# The sentence that it learned, through the same four codebooks:

# %%
taught = mimi_jax.encode(codec, clips[0][None, None, : SECONDS * rate], num_quantizers=CODEBOOKS).audio_codes
player(mimi_jax.decode(codec, taught).audio_values[0], "taught.mp3")

# %%
figure, axes = plt.subplots(3, sharex=True, figsize=(9, 4.5), layout="constrained")
for axis, (name, codes) in zip(
    axes, {"taught": taught, "sample": spoken[0], "other": spoken[1]}.items(), strict=True
):
    codes = np.asarray(codes[0])
    axis.imshow(
        codes,
        aspect="auto",
        interpolation="nearest",
        cmap="turbo",
        extent=(0, codes.shape[1] * frame_size / rate, 4.5, 0.5),
    )
    axis.set_ylabel(f"{name}\ncodebook")
axes[-1].set_xlabel("time (s)")
axes[0].set_title("Codes: equal colours are equal codes")
plt.show()
