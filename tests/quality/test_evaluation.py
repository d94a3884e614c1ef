"""The quality of a model on clips: the numbers, the table and `mimi-jax evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest

from mimi_jax import Mimi, cli, save_audio
from mimi_jax.files.corpus import find_clips
from mimi_jax.quality import evaluation, picture
from mimi_jax.quality.evaluation import Evaluation, Quality
from mimi_jax.quality.metrics import si_sdr

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "mimi_jax" / "samples" / "speech.flac"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mimi_jax import load_audio

    folder = tmp_path_factory.mktemp("clips")
    speech = load_audio(SAMPLE)
    for number in range(2):
        save_audio(folder / f"{number}.flac", speech[:, 24_000 * number : 24_000 * number + 40_000])
    return folder


@pytest.fixture(scope="module")
def result(clips: Path) -> Evaluation:
    return evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(clips), [1, 8])


def test_numbers_are_means_over_clips(result: Evaluation, clips: Path):
    from mimi_jax import decode, encode, load_audio

    model = Mimi.from_pretrained("mini")
    assert (result.num_clips, result.seconds) == (2, pytest.approx(80_000 / 24_000))
    assert [row.num_quantizers for row in result.qualities] == [1, 8]
    expected, usage = [], np.zeros((model.config.num_quantizers, model.config.codebook_size))
    for path in sorted(clips.iterdir()):
        audio = load_audio(path)
        codes = encode(model, audio[None]).audio_codes
        for level in range(len(usage)):
            usage[level] += np.bincount(np.asarray(codes)[0, level], minlength=model.config.codebook_size)
        decoded = np.asarray(decode(model, codes[:, :8]).audio_values)[0, :, : audio.shape[1]]
        expected.append(si_sdr(audio, decoded))
    assert result.qualities[-1].si_sdr == pytest.approx(np.mean(expected), abs=0.05)
    shares = usage / usage.sum(axis=1, keepdims=True)
    entropy = [-np.sum(row[row > 0] * np.log(row[row > 0])) for row in shares]
    np.testing.assert_allclose(result.perplexities, np.exp(entropy), rtol=1e-6)


def test_only_the_clips_of_a_manifest_count(clips: Path, tmp_path: Path):
    entries = [{"path": str(clips / "0.flac"), "start": start, "end": start + 0.75} for start in (0.25, 0.5)]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, entries)))
    result = evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(tmp_path / "two.jsonl"), [1])
    assert (result.num_clips, result.seconds) == (2, pytest.approx(1.5))


def test_measures_tell_good_from_bad():
    from mimi_jax import load_audio

    speech, visqol = load_audio(SAMPLE)[:, :72_000], evaluation._make_visqol()
    noise = 0.02 * np.random.default_rng(0).standard_normal(speech.shape).astype(np.float32)
    scores = [
        evaluation._compare(speech, fake, 24_000, visqol)
        for fake in (speech + 1e-4 * noise, speech + noise, noise)
    ]
    si_sdrs, distances, stois, visqols = zip(*scores, strict=True)
    assert sorted(si_sdrs, reverse=True) == list(si_sdrs)
    assert sorted(distances) == list(distances)
    assert sorted(stois, reverse=True) == list(stois) and stois[0] > 0.99 and stois[2] < 0.5
    assert sorted(visqols, reverse=True) == list(visqols) and visqols[0] > 4 and visqols[2] < 2


@pytest.mark.parametrize(
    ("num_quantizers", "num_semantic", "counts"),
    [(32, 1, [1, 2, 4, 8, 16, 32]), (8, 1, [1, 2, 4, 8]), (6, 2, [2, 3, 4, 6]), (2, 1, [1, 2])],
)
def test_default_counts(num_quantizers: int, num_semantic: int, counts: list[int]):
    assert evaluation.default_counts(num_quantizers, num_semantic) == counts


def test_table():
    row = Quality(8, 1.1, -3.25, 5.0, 0.85, 2.5)
    text = evaluation.table(Evaluation(1, 2.0, 16, [row], [4.0]))
    assert text.splitlines()[-1] == "| 8 | 1.10 | -3.2 | 5.00 | 0.850 | 2.50 |"


def test_the_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "quality.json"
    words = [
        "evaluate",
        "mini",
        str(clips),
        "--include",
        "0*",
        "--num-quantizers",
        "1",
        "2",
        "-o",
        str(output),
    ]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "| codebooks | kbit/s |" in printed and "1 clips, 2 s; perplexity of the codebooks: " in printed
    fields = json.loads(output.read_text())
    assert [row["num_quantizers"] for row in fields["qualities"]] == [1, 2]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["mini", "missing"], "there is no folder or manifest missing"),
        (["mini", ".", "--include", "*.opus"], "no audio files"),
        (["mini", ".", "--num-quantizers", "99"], "num_quantizers must be an integer from 1 to"),
        (["mini", ".", "-o", "missing/q.json"], "cannot write missing/q.json: there is no folder"),
    ],
)
def test_errors(clips: Path, monkeypatch, capsys: pytest.CaptureFixture, words: list[str], error: str):
    monkeypatch.chdir(clips)
    before = sorted(clips.iterdir())
    assert cli.main(["evaluate", *words]) in (1, 2)
    stderr = capsys.readouterr().err
    assert stderr.startswith("mimi-jax evaluate: error: ") and error in stderr and stderr.count("\n") == 1
    assert sorted(clips.iterdir()) == before


def test_the_picture_is_drawn(result: Evaluation):
    assert picture.draw_evaluation(result, "mini").startswith(b"\x89PNG")
