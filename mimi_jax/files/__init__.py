"""What the package reads from disk and writes there.

atomic        files that appear whole or not at all, and locks between processes
arrays        named arrays: in safetensors files and Orbax folders, compared with what is expected
containers    the containers that audio is read from, checked for being whole
batches       clips of different lengths in one array
audio         audio files, whole or in pieces
codes         code files
processes     worker processes, without JAX
corpus        corpora of audio: folders and manifests
folders       folders, local or with a URL
changes       recorded settings of a run, compared with new ones
"""
