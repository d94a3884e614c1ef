"""What was tokenized, read one by one, at random through Grain, and as text."""

from pathlib import Path

import numpy as np
import pytest

from mimi_jax.tokenization import CodeSource, from_unicode, read_codes, read_manifest, to_unicode
from mimi_jax.tokenization.output import Output, Row


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 clips in three shards, the second of which is empty; clip n holds the code n."""
    folder = tmp_path_factory.mktemp("made") / "tokens"
    output = Output(folder, {"num_shards": 3, "sampling_rate": 24_000}, {})
    rows = [Row(f"{n}", "s", 1920, np.full((4, n % 3 + 1), n, np.uint16)) for n in range(300)]
    for shard, some in enumerate((rows[:130], [], rows[130:])):
        output.write(shard, some, [])
    return folder


def test_clips_come_in_order(tokens: Path):
    clips = list(read_codes(tokens))
    assert [clip.id for clip in clips] == [str(n) for n in range(300)]
    assert all(clip.codes.shape == (4, n % 3 + 1) for n, clip in enumerate(clips))
    assert all((clip.codes == n).all() for n, clip in enumerate(clips))


def test_processes_read_different_shards(tokens: Path):
    parts = [[clip.id for clip in read_codes(tokens, index, 3)] for index in range(3)]
    assert [len(part) for part in parts] == [130, 0, 170]


def test_a_source_is_a_list(tokens: Path):
    source = CodeSource(tokens)
    assert len(source) == 300
    for n in np.random.default_rng(0).permutation(300):
        assert source[int(n)].id == str(n)
    assert repr(source) == "CodeSource(3 files, 300 clips)"
    for index in (-1, 300):
        with pytest.raises(IndexError, match="there are 300 clips"):
            source[index]


def test_grain_shuffles_and_batches_a_source(tokens: Path):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(CodeSource(tokens)).shuffle(seed=0)
    dataset = dataset.map(lambda clip: clip.codes[:, :1]).batch(50)
    batches = list(dataset)
    assert [batch.shape for batch in batches] == [(50, 4, 1)] * 6
    seen = np.concatenate([batch[:, 0, 0] for batch in batches])
    assert sorted(seen) == list(range(300)) != list(seen)


def test_another_folder_is_refused(tmp_path: Path):
    for read in (read_manifest, CodeSource, lambda folder: next(read_codes(folder))):
        with pytest.raises(FileNotFoundError, match="no folder of `mimi-jax tokenize`"):
            read(tmp_path)


def test_text_has_a_character_a_code_frame_by_frame():
    codes = np.array([[0, 1], [2, 3]], np.uint16)
    text = to_unicode(codes, codebook_size=256)
    assert [ord(character) - 0x4E00 for character in text] == [0, 256 + 2, 1, 256 + 3]
    np.testing.assert_array_equal(from_unicode(text, 2, 256), codes)


def test_any_codes_survive_as_text():
    codes = np.random.default_rng(0).integers(0, 2048, (8, 100), np.uint16)
    np.testing.assert_array_equal(from_unicode(to_unicode(codes, 2048), 8, 2048), codes)
    large = np.random.default_rng(0).integers(0, 2048, (32, 100), np.uint16)
    with pytest.raises(ValueError, match="begin at unicode_offset=0xE000"):
        to_unicode(large, 2048)
    np.testing.assert_array_equal(from_unicode(to_unicode(large, 2048, 0xE000), 32, 2048, 0xE000), large)


def test_what_is_no_such_text_is_refused():
    text = to_unicode(np.zeros((2, 3), np.uint16), 256)
    for broken, error in ((text[1:], "no whole frames"), (text[1:] + text[0], "other codebooks")):
        with pytest.raises(ValueError, match=error):
            from_unicode(broken, 2, 256)
    with pytest.raises(ValueError, match=r"must lie in \[0, 256\), got 0 to 300"):
        to_unicode(np.array([[0, 300]]), 256)
    with pytest.raises(ValueError, match=r"must be integers \[codebooks, frames\]"):
        to_unicode(np.zeros(3), 256)
