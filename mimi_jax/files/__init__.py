"""What the package reads from disk and writes there.

atomic    files that appear whole or not at all, and locks
audio     audio files, and clips into batches
codes     code files
"""
