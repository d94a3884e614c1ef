"""Streams, for the code around the compiled functions.

rows      rows of a batch of streams: reset them, and move them between batches
saved     states of streams in files
push      `StreamingEncoder` and `StreamingDecoder`, which take pieces of any length
chunks    clips of any length in constant memory
sniff     what is not raw PCM, by its first bytes
batch     rows that sessions take, and their steps
stepping  when these steps run
pool      `Pool`, many sessions on one model, for asyncio
wire      raw PCM and code streams on pipes
"""
