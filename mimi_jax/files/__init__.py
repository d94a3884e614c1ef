"""What the package reads from disk and writes there.

atomic        files that appear whole or not at all, and locks between processes
remote        files with a URL, and requests that are made again if they fail
arrays        named arrays: in safetensors files and Orbax folders, compared with what is expected
containers    the containers that audio is read from, checked for being whole
blocks        remote files that are read in blocks
sound         libsndfile as a reader of files in Python
batches       clips of different lengths in one array
audio         audio files, whole or in pieces
codes         code files
processes     worker processes, without JAX
corpus        corpora of audio: folders and manifests
folders       folders of files that appear whole or not at all, local or with a URL
changes       recorded settings of a run, compared with new ones
"""
