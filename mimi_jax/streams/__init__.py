"""Streams outside the compiled functions: moved, saved, pushed, of hours, on pipes.

rows      start rows of a batch anew, and move them from batch to batch
saved     states on disk
push      `StreamingEncoder` and `StreamingDecoder`, which take pieces of any length
chunks    clips of any length in constant memory
wire      raw PCM and streams of codes on pipes
"""
