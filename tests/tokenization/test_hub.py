"""Jobs whose inputs and outputs are in a dataset of the Hugging Face Hub, of which there is a double here."""

from pathlib import Path

import pytest

from mimi_jax.files import remote
from mimi_jax.tokenization import Settings, read_codes, tokenize
from tests.hub import hub
from tests.tokenization.corpora import find_shards, ids, read
from tests.tokenization.test_buckets import check_same, write_corpus


def test_a_dataset_of_the_hub_is_tokenized_into_another_folder_of_it(tmp_path: Path, tiny: Path):
    write_corpus(tmp_path / "data", 15)
    settings = Settings(num_quantizers=3, clips_per_shard=3)
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, settings)
    with hub() as server:
        for path in (tmp_path / "data").rglob("*.*"):
            server.files[f"data/{path.relative_to(tmp_path / 'data').as_posix()}"] = path.read_bytes()
        root = "hf://datasets/me/speech"
        assert [file.size for file in remote.list_files(f"{root}/data/plain")] == [
            len(server.files[f"data/plain/{n:03}.wav"]) for n in range(0, 15, 3)
        ]
        for _ in range(2):
            summary = tokenize([f"{root}/data"], f"{root}@main/out", tiny, settings)
        assert (summary.now.clips, summary.total.clips, summary.total.errors) == (0, 15, 0)
        check_same(f"{root}/out", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="nothing matches it"):
            find_shards([f"{root}/none"])


def test_a_dataset_may_be_made_for_the_codes_alone(tmp_path: Path, tiny: Path):
    write_corpus(tmp_path / "data", 3)
    with hub() as server:
        tokenize([tmp_path / "data"], "hf://datasets/me/speech", tiny, Settings(num_quantizers=3))
        assert len(list(read_codes("hf://datasets/me/speech"))) == 3
        with pytest.raises(FileNotFoundError, match="no such bucket or repository; create it first"):
            remote.write_whole("hf://datasets/me/other/x", b"1")
        assert server.files[".gitattributes"] == b""


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "DELAYS", (0.01,))
    with hub() as server:
        url = f"hf://datasets/me/{server.server_port}"  # a name that nothing has asked for before
        server.is_gone = True
        with pytest.raises(ConnectionError, match=f"{url} cannot be reached"):
            find_shards([url])


@pytest.mark.network
def test_a_public_dataset_is_listed_and_read():
    url = "hf://datasets/hf-internal-testing/librispeech_asr_dummy"
    try:
        (shard,) = find_shards([f"{url}/**/*.parquet"])
    except ConnectionError as error:
        pytest.skip(f"NOT CHECKED against the public Hub: {error}")
    items = read(shard)
    assert len(items) == len(set(ids(items))) > 50
    assert items[0].data is not None
    assert items[0].data[:4] == b"fLaC"
