"""Tokenization on a Ray cluster that loses a machine, and other libraries reading its files."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimi_jax import Mimi, cli
from mimi_jax.files.audio import to_int16
from mimi_jax.tokenization import Settings, Summary, read_codes, to_unicode, tokenize, tokenize_on_ray
from tests.models import load_fixture
from tests.tokenization.corpora import codes_alone, codes_by_id, noise_clip, write_folder

pytestmark = pytest.mark.parity

NUM_SHARDS = 40
LENGTHS = [4000 + number % 3 for number in range(2 * NUM_SHARDS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_fixture("base").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_folder(folder, LENGTHS)
    return folder


@pytest.fixture(scope="module")
def tokens(tiny: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tokens"
    tokenize([corpus], folder, tiny, Settings(clips_per_shard=30))
    return folder


# Ray forks its processes, which JAX warns about, and leaves open files to the garbage collector.
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_loses_a_machine_codes_each_clip_once(
    tiny: Path, corpus: Path, tmp_path: Path, tokens: Path
):
    from ray.cluster_utils import Cluster

    # Each of the two machines has room for one actor.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"seat": 1}})
    node = cluster.add_node(num_cpus=1, resources={"seat": 1})
    out, summaries = tmp_path / "out", []

    def run() -> None:
        options: dict[str, Any] = {
            "address": cluster.address,
            "actors": 2,
            "settings": Settings(clips_per_shard=2),
        }
        options["resources"] = {"seat": 1}
        summaries.append(tokenize_on_ray([corpus], out, tiny, batch_size=2, workers=1, **options))

    job = threading.Thread(target=run)
    job.start()
    try:
        while job.is_alive() and len(list(out.glob("codes/*.parquet"))) < 6:
            time.sleep(0.05)
        before = len(list(out.glob("codes/*.parquet")))
        cluster.remove_node(node, allow_graceful=False)
        job.join(300)
        assert not job.is_alive()
    finally:
        cluster.shutdown()
    assert 0 < before < NUM_SHARDS
    (summary,) = summaries
    assert isinstance(summary, Summary)
    assert (summary.num_done, summary.total.clips, summary.total.errors) == (NUM_SHARDS, len(LENGTHS), 0)
    found, expected = codes_by_id(out), codes_by_id(tokens)
    assert found.keys() == expected.keys()
    for name, codes in found.items():
        np.testing.assert_array_equal(codes, expected[name])


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_runs_ray_and_goes_on_without(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jax.config.update", lambda *_: None)  # these tests have their devices already
    write_folder(tmp_path / "data", LENGTHS[:6])
    words = ["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--model", str(tiny)]
    words += ["--clips-per-shard", "2"]
    ray = ["--engine", "ray", "--ray-actors", "1", "--ray-resources", "num_cpus=1"]
    assert cli.main([*words, *ray]) == 0
    assert "6 clips, 0.00 h, 0 errors" in capfd.readouterr().out
    (tmp_path / "out" / "codes" / "00001-of-00003.parquet").unlink()
    assert cli.main(words) == 0
    assert "2 clips, 0.00 h, 0 errors" in capfd.readouterr().out
    (tmp_path / "data" / "bad.wav").write_bytes(b"")
    words[3] = str(tmp_path / "strict")
    assert cli.main([*words, *ray, "--strict"]) == 1
    assert "bad.wav: the file is empty" in capfd.readouterr().err


def test_every_clip_has_its_own_codes(tokens: Path):
    model: Mimi = load_fixture("base").model
    found = codes_by_id(tokens)
    for number in (0, 1, 41):
        name = f"speaker {number % 2}/clip_{number // 2:03}.wav"
        clip = to_int16(noise_clip(LENGTHS[number], seed=number)) / np.float32(32768)
        np.testing.assert_array_equal(found[name], codes_alone(model, clip))


def test_polars_reads_the_shards(tokens: Path):
    import polars

    frame = polars.read_parquet(tokens / "codes" / "*.parquet")
    clips = list(read_codes(tokens))
    assert frame["id"].to_list() == [clip.id for clip in clips]
    assert frame.schema["codes"] == polars.List(polars.UInt16)
    for codes, clip in zip(frame["codes"], clips, strict=True):
        np.testing.assert_array_equal(codes.to_numpy(), clip.codes.ravel())


def test_pyarrow_reads_the_shards_as_one_dataset(tokens: Path):
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(tokens / "codes").to_table(columns=["id", "num_frames"])
    assert table.num_rows == len(LENGTHS)


def test_hugging_face_datasets_reads_the_shards(tokens: Path, tmp_path: Path):
    import datasets

    dataset = datasets.load_dataset("parquet", data_dir=str(tokens / "codes"), cache_dir=str(tmp_path))[
        "train"
    ]
    clips = list(read_codes(tokens))
    assert dataset["id"] == [clip.id for clip in clips]
    assert dataset[5]["codes"] == clips[5].codes.ravel().tolist()


@pytest.mark.parametrize(("codebooks", "size"), [(8, 2048), (4, 256), (1, 1024)])
def test_text_is_that_of_codec_bpe(codebooks: int, size: int):
    import codec_bpe

    codes = np.random.default_rng(0).integers(0, size, (codebooks, 50), np.uint16)
    assert to_unicode(codes, size) == codec_bpe.codes_to_chars(codes.astype(np.int64), size)
