"""Tokenized clips are read one after the other, by number, and through Grain."""

import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mimi_jax.tokenization import CodeSource, read_codes, read_manifest
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.records import TokenizedClip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 clips in three shards, the second of which is empty; clip n holds the code n."""
    folder = tmp_path_factory.mktemp("made") / "tokens"
    output = Output(folder, {"num_shards": 3, "sampling_rate": 24_000}, {})
    rows = [TokenizedClip(f"{n}", "s", 1920, np.full((4, n % 3 + 1), n, np.uint16)) for n in range(300)]
    for shard, some in enumerate((rows[:130], [], rows[130:])):
        output.write(shard, some, [], Counter())
    return folder


@pytest.fixture
def url(tokens: Path) -> Iterator[str]:
    """The same folder in a file system that only fsspec knows."""
    url = "memory://test_dataset/tokens"
    memory = fsspec.filesystem("memory")
    memory.put(str(tokens / "codes"), f"{url}/codes", recursive=True)
    memory.put(str(tokens / "manifest.json"), f"{url}/manifest.json")
    yield url
    memory.rm("memory://test_dataset", recursive=True)


def test_a_url_reads_as_the_local_folder_does(tokens: Path, url: str):
    assert read_manifest(url) == read_manifest(tokens)
    for here, there in zip(read_codes(tokens), read_codes(url), strict=True):
        assert here[:3] == there[:3]
        np.testing.assert_array_equal(here.codes, there.codes)
    source = pickle.loads(pickle.dumps(CodeSource(url)))
    assert len(source) == 300
    assert [source[n].id for n in (0, 129, 130, 299)] == ["0", "129", "130", "299"]


def test_shards_that_come_later_are_seen(tokens: Path, url: str):
    clips = len(CodeSource(url))
    memory = fsspec.filesystem("memory")
    (name, *_) = sorted(path.name for path in (tokens / "codes").iterdir())
    memory.cp_file(f"{url}/codes/{name}", f"{url}/codes/9-of-9.parquet")
    assert len(CodeSource(url)) == clips + 130


def test_a_url_without_a_manifest_is_refused():
    with pytest.raises(FileNotFoundError, match=r"memory://test_dataset/none must be an output"):
        read_manifest("memory://test_dataset/none")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"s3://unknown/tokens .* pip install 'mimi_jax\[remote\]'"):
        read_manifest("s3://unknown/tokens")


def test_clips_come_in_order(tokens: Path):
    clips = list(read_codes(tokens))
    assert [clip.id for clip in clips] == [str(n) for n in range(300)]
    assert all(clip.codes.shape == (4, n % 3 + 1) for n, clip in enumerate(clips))
    assert all((clip.codes == n).all() for n, clip in enumerate(clips))


def test_each_process_reads_its_own_shards(tokens: Path):
    parts = [[clip.id for clip in read_codes(tokens, index, 3)] for index in range(3)]
    assert [len(part) for part in parts] == [130, 0, 170]


def test_a_source_gives_clips_by_number(tokens: Path):
    source = CodeSource(tokens)
    assert len(source) == 300
    for n in np.random.default_rng(0).permutation(300):
        assert source[int(n)].id == str(n)
    assert repr(source) == "CodeSource(3 files, 300 clips)"
    for index in (-1, 300):
        with pytest.raises(IndexError, match=r"index must lie in \[0, 300\)"):
            source[index]


def test_grain_shuffles_and_batches_a_source(tokens: Path):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(CodeSource(tokens)).shuffle(seed=0)
    dataset = dataset.map(lambda clip: clip.codes[:, :1]).batch(50)
    batches = list(dataset)
    assert [batch.shape for batch in batches] == [(50, 4, 1)] * 6
    seen = np.concatenate([batch[:, 0, 0] for batch in batches])
    assert sorted(seen) == list(range(300)) != list(seen)


def test_a_folder_without_manifest_is_refused(tmp_path: Path):
    for read in (read_manifest, CodeSource, lambda folder: next(read_codes(folder))):
        with pytest.raises(FileNotFoundError, match="must be an output of `mimi-jax tokenize`"):
            read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "mimi_jax.packed"}')
    with pytest.raises(FileNotFoundError, match=r"but its manifest\.json is of mimi_jax\.packed"):
        CodeSource(tmp_path)
