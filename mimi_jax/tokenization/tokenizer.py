"""A model with its worker processes, which encodes shards on the devices of this process."""

import collections
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from mimi_jax.files.processes import default_num_workers
from mimi_jax.model import Mimi
from mimi_jax.tokenization.coding import Coder, Result
from mimi_jax.tokenization.inputs import Shard
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.programs import Programs
from mimi_jax.tokenization.progress import Progress
from mimi_jax.tokenization.records import Failure, TokenizedClip, Totals
from mimi_jax.tokenization.workers import ClipReader, Readers, Target

# Rows of a batch on each device, by platform.
BATCH_SIZE = {"cpu": 8}
OTHER_BATCH_SIZE = 64
# Frames in a chunk of a long clip, by platform. Each step has a fixed cost for the past of its rows, and on
# average half of a clip's last chunk is padding. On a CPU the fixed cost is small, so a chunk is only 1.28 s.
CHUNK_FRAMES = {"cpu": 16}
OTHER_CHUNK_FRAMES = 50
# Shards that are done and wait to be written. Several end together if each waited for a late clip.
MAX_WAITING = 8


@contextlib.contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Turn XLA's error about memory into one line that says what to do.

    Raises:
        ValueError: the device has too little memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError("the device has too little memory; lower batch_size (--batch-size)") from error


class Tokenizer:
    """A model and its workers.

    Args:
        coder: the model, for the channels and the sampling rate of the readers.
        readers: the workers. They are closed with the tokenizer.
        output: where the codes go.
        strict: as for `tokenize`.
    """

    def __init__(self, coder: Coder, readers: Readers, output: Output, strict: bool):
        self._coder, self._readers, self._output, self._strict = coder, readers, output, strict

    def __enter__(self) -> "Tokenizer":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()

    @explained_memory_errors()
    def run(self, shards: Sequence[Shard], progress: Progress, wait: bool = False) -> Totals:
        """Encode shards, except those that are done or reserved by another process.

        Args:
            shards: the shards, in the order in which they are read.
            progress: is told of everything that is done.
            wait: if another process has reserved a shard, wait for it, and do the shard if that one died.

        Returns:
            The totals of the shards that were written.

        Raises:
            ValueError: a clip cannot be encoded and `strict` was set, or the device has too little memory.
        """
        with contextlib.ExitStack() as claims, ThreadPoolExecutor(1) as writer:
            open_shards = _OpenShards(self._output, self._readers, progress, claims, writer)
            for result in self._coder.run(open_shards.read(shards, wait), progress.coded):
                if self._strict and result.codes is None:
                    raise ValueError(f"{open_shards.place(result.reader)}: {result.problem}")
                open_shards.add(result)
            open_shards.finish_writing()
        return open_shards.totals


@explained_memory_errors()
def make_tokenizer(
    model: Mimi, output: Output, batch_size: int | None, workers: int | None, strict: bool
) -> Tokenizer:
    """A tokenizer on all devices of this process.

    Args:
        model: its encoder, in float32.
        output: where the codes go. Its settings give the dtype, the number of codebooks and the longest clip.
        batch_size, workers, strict: as for `tokenize`.
    """
    settings, devices = output.settings, jax.local_devices()
    platform = devices[0].platform
    if batch_size is None:
        batch_size = BATCH_SIZE.get(platform, OTHER_BATCH_SIZE) * len(devices)
    if workers is None:
        workers = default_num_workers()
    if settings["dtype"] != "float32":
        model = model.astype(settings["dtype"])
    chunk_frames = CHUNK_FRAMES.get(platform, OTHER_CHUNK_FRAMES)
    coder = Coder(Programs(model, settings["num_quantizers"], devices), batch_size, chunk_frames)
    target = Target(settings["sampling_rate"], model.config.audio_channels, settings["max_seconds"])
    return Tokenizer(coder, Readers(target, workers), output, strict)


class _OpenShard:
    """A shard whose clips are being encoded."""

    def __init__(self, shard: Shard, release: Callable[[], object]):
        self.shard, self.release = shard, release
        self.results: dict[int, TokenizedClip | Failure] = {}  # by the position in the shard
        self.left_out: Counter[str] = Counter()
        self.num_items = self.num_bytes = 0
        self.is_read = False

    @property
    def is_done(self) -> bool:
        return self.is_read and len(self.results) == self.num_items


class _OpenShards:
    """All shards whose clips are being encoded, and to which of them each clip belongs.

    Shards are read one after the other. The next one is begun before all clips of the last are encoded, and
    while the last one is written: a device must not wait for a disk or a network.
    """

    def __init__(
        self,
        output: Output,
        readers: Readers,
        progress: Progress,
        claims: contextlib.ExitStack,
        writer: ThreadPoolExecutor,
    ):
        self._output, self._readers, self._progress, self._claims = output, readers, progress, claims
        self._writer = writer
        self._writing: collections.deque[Future[Totals]] = collections.deque()
        self._places: dict[int, tuple[_OpenShard, int]] = {}  # shard and position of each clip, by its key
        self.totals = Totals()

    def read(self, shards: Sequence[Shard], wait: bool) -> Iterator[ClipReader]:
        """Reserve shards and open their clips, one at a time."""
        for shard in shards:
            claim = contextlib.ExitStack()
            self._claims.push(claim)
            if not claim.enter_context(self._output.claim(shard.index, wait)):
                claim.close()
                continue
            opened = _OpenShard(shard, claim.close)
            for item in shard.read(opened.left_out):
                reader = self._readers.open(item)
                self._places[reader.key] = (opened, opened.num_items)
                opened.num_items += 1
                yield reader
            opened.is_read = True
            self._write_if_done(opened)

    def place(self, reader: ClipReader) -> str:
        """The source and the id of a clip, for an error."""
        source, name = self._places[reader.key][0].shard.source, reader.item.id
        return f"{source}: {name}" if name and name != source else source

    def add(self, result: Result) -> None:
        """Keep a result, and write its shard if it was the last one."""
        item = result.reader.item
        opened, position = self._places.pop(result.reader.key)
        source = opened.shard.source
        if result.codes is None:
            opened.results[position] = Failure(item.id, source, result.problem, result.is_transient)
            self._progress.error(item.num_bytes)
        else:
            opened.results[position] = TokenizedClip(item.id, source, result.num_samples, result.codes)
            self._progress.clip(item.num_bytes)
        opened.num_bytes += item.num_bytes
        self._write_if_done(opened)

    def _write_if_done(self, opened: _OpenShard) -> None:
        if opened.is_done:
            self._writing.append(self._writer.submit(self._write, opened))
            self.finish_writing(MAX_WAITING)
            self._progress.read(max(opened.shard.num_bytes - opened.num_bytes, 0))

    def finish_writing(self, num_waiting: int = 0) -> None:
        """Wait until at most `num_waiting` shards are to be written, and raise the error of a failed one."""
        while len(self._writing) > num_waiting:
            self.totals += self._writing.popleft().result()

    def _write(self, opened: _OpenShard) -> Totals:
        results = [opened.results[position] for position in range(opened.num_items)]
        clips = [result for result in results if isinstance(result, TokenizedClip)]
        failures = [result for result in results if isinstance(result, Failure)]
        totals = self._output.write(opened.shard.index, clips, failures, opened.left_out)
        opened.release()
        return totals
