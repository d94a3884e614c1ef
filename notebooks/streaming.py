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
# # Streams
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mimi-jax/mimi_jax/blob/main/notebooks/streaming.ipynb)
#
# Mimi is causal: a frame of codes needs 80 ms of audio and what came before it. So Mimi can encode live
# audio. What came before is the state, an ordinary value that goes into a step and comes out of it.

# %%
# On a GPU: mimi_jax[cuda,plot], which brings the plugin that goes with its JAX.
# Before the first release on PyPI: "mimi_jax[plot] @ git+https://github.com/mimi-jax/mimi_jax"
# %pip install --quiet "mimi_jax[plot]"

# %%
import itertools
import time
from importlib.resources import files

import jax
import matplotlib.pyplot as plt
import numpy as np
import psutil
from IPython.display import Audio

import mimi_jax
from mimi_jax.streams.chunks import encode_chunks

print(jax.devices())
MODEL = "mini"  # or "kyutai/mimi"

model = mimi_jax.Mimi.from_pretrained(MODEL)
rate, frame_size = model.config.sampling_rate, model.config.frame_size
clip = mimi_jax.load_audio(files(mimi_jax) / "samples" / "speech.flac")  # float32 [channels, samples]
speech = np.tile(clip[0], 4)
print(f"{len(speech) / rate:.1f} s; a frame is {frame_size} samples, {1000 * frame_size / rate:.0f} ms")

# %% [markdown]
# ## Piece by piece
#
# A microphone gives pieces of any length. `push` returns the codes of the frames that are complete now. The
# decoder turns them into audio at once.

# %%
encoder = mimi_jax.StreamingEncoder(model, num_quantizers=8)
decoder = mimi_jax.StreamingDecoder(model)
encoder.warmup()  # compile now, not with the first piece
decoder.warmup(num_quantizers=8)

pieces, codes, audio, latencies = np.split(speech, range(441, len(speech), 441)), [], [], []
for piece in pieces:
    start = time.perf_counter()
    new = encoder.push(piece)
    if new is not None:
        codes.append(new)
        audio.append(decoder.push(new))
        latencies.append(1000 * (time.perf_counter() - start))
codes.append(encoder.flush())
audio.append(decoder.push(codes[-1]))
streamed, heard = np.concatenate(codes, axis=2), np.concatenate(audio, axis=2)
print(
    f"{len(pieces)} pieces of 441 samples -> {streamed.shape[2]} frames; median {np.median(latencies):.1f} ms"
)

# %% [markdown]
# ## The same as the whole clip
#
# In float32 the codes are those of the whole clip, however it is cut. The tests of this project check this
# everywhere.

# %%
whole = mimi_jax.encode(model, speech[None, None], num_quantizers=8).audio_codes
np.testing.assert_array_equal(streamed, whole)
decoded = mimi_jax.decode(model, whole).audio_values
print(f"codes equal; audio differs by at most {np.abs(heard - decoded).max():.1e}")
assert np.abs(heard - decoded).max() < 1e-5

mimi_jax.save_audio("heard.mp3", heard[0, :, : clip.shape[1]])
Audio("heard.mp3")

# %% [markdown]
# ## How long a frame takes
#
# The time of the encoder and the decoder together, from samples in NumPy to samples in NumPy. If it is less
# than 80 ms, the stream keeps up.

# %%
figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
axis.hist(latencies, bins=np.geomspace(min(latencies), 100, 60))
axis.axvline(1000 * frame_size / rate, color="tab:red", linestyle="--", label="a frame of audio: 80 ms")
axis.axvline(np.median(latencies), color="tab:orange", label=f"median: {np.median(latencies):.1f} ms")
axis.set(xscale="log", xlabel="encode + decode of one frame (ms)", ylabel="frames", title="Latency")
axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
axis.legend()
plt.show()
# %% [markdown]
# ## State is a pytree
#
# Underneath is `encode_step(model, state, audio) -> state, codes`, which works inside `jit` and `lax.scan`.
# Every array of the state has the batch on its first axis and is zero in a fresh stream. So JAX can do with
# streams what it does with arrays.

# %%
state = model.init_encoder_state(batch_size=4)
leaves = jax.tree.leaves(state)
print(f"{len(leaves)} arrays, {sum(leaf[0].nbytes for leaf in leaves) / 1e6:.2f} MB a stream")
jax.tree.map(jax.numpy.shape, state[1][0])  # the first Transformer layer: keys, values, position

# %% [markdown]
# ## Many sessions in one batch
#
# A server keeps one state of many rows. Rows pause, start again, leave and come back. The other rows do not
# change.

# %%
step = jax.jit(mimi_jax.encode_step, static_argnames="num_quantizers")
frame = [np.stack([speech[None, i * frame_size :][:, :frame_size]] * 4) for i in range(10)]

for i in range(5):  # row 1 pauses all the time, row 2 from the third frame on
    active = np.array([True, False, i < 2, True])
    state, codes = step(model, state, frame[i], num_quantizers=8, active=active)

session = mimi_jax.take_rows(state, 2)  # row 2 as a state of one stream: to save, or to move elsewhere
state = mimi_jax.reset_rows(state, np.array([False, False, True, False]))  # row 2 is free for somebody else
state, codes = step(model, state, frame[0], num_quantizers=8)
np.testing.assert_array_equal(codes[2], whole[0, :, :1])  # a fresh stream

state = mimi_jax.put_rows(state, 1, session)  # the session comes back, as row 1, at its third frame
state, codes = step(model, state, frame[2], num_quantizers=8)
np.testing.assert_array_equal(codes[1], whole[0, :, 2:3])
print("row 2 started anew, and the session went on where it was")

# %% [markdown]
# ## An hour in constant memory
#
# A file that lasts for hours is a stream too. `encode_chunks` takes pieces from any iterable, here an hour of
# them, and yields codes in chunks of four seconds.

# %%
MINUTES = 60

process, memory, samples = psutil.Process(), [], 0
hour = itertools.islice(
    itertools.cycle(np.split(clip, range(rate, clip.shape[1], rate), axis=1)), 10 * MINUTES * 7
)
start = time.perf_counter()
for _, num_samples in encode_chunks(model, hour, num_quantizers=8):
    samples += num_samples
    memory.append((samples / rate / 60, process.memory_info().rss / 2**20))
    if samples >= MINUTES * 60 * rate:
        break
seconds = time.perf_counter() - start
print(f"{samples / rate / 60:.0f} min in {seconds:.1f} s, {samples / rate / seconds:,.0f} x realtime")

# %%
minutes, megabytes = np.array(memory).T
figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
axis.plot(minutes, megabytes)
axis.set(
    xlabel="audio that is encoded (min)",
    ylabel="memory of this process (MiB)",
    ylim=(0, 1.3 * megabytes.max()),
    title="An hour takes the memory of a minute",
)
axis.grid(alpha=0.3)
plt.show()
grown = megabytes[-1] - megabytes[minutes >= 1][0]
print(f"{grown:+.0f} MiB since the first minute")
assert grown < 50

# %% [markdown]
# [docs/streaming.md](../docs/streaming.md) has the rest: `lax.scan`, gradients through streams, saved
# sessions, pipes.
#
# ## Hear yourself
#
# ```sh
# pip install 'mimi_jax[serve]'
# mimi-jax serve  # then open http://127.0.0.1:8000/ and speak
# ```
#
# On your own machine, this page shows and plays what the codec makes of your voice
# ([docs/serving.md](../docs/serving.md)):
#
# ![The page of live streams](../docs/serving.png)
