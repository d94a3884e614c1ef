"""The quality of a model on clips: the numbers, the table and `mimi-jax evaluate`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from mimi_jax import Mimi, cli, load_audio, save_audio
from mimi_jax.files.corpus import find_clips
from mimi_jax.quality import evaluation, picture
from mimi_jax.quality.evaluation import Evaluation, Quality
from mimi_jax.quality.metrics import si_sdr

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "mimi_jax" / "samples" / "speech.flac"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    speech = load_audio(SAMPLE)
    for number in range(2):
        save_audio(folder / f"{number}.flac", speech[:, 24_000 * number : 24_000 * number + 40_000])
    return folder


@pytest.fixture(scope="module")
def result(clips: Path) -> Evaluation:
    return evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(clips), [1, 8])


def test_numbers_are_means_over_clips(result: Evaluation, clips: Path):
    from mimi_jax import decode, encode

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


@pytest.mark.parametrize(
    ("num_quantizers", "num_semantic", "counts"),
    [(32, 1, [1, 2, 4, 8, 16, 32]), (8, 1, [1, 2, 4, 8]), (6, 2, [2, 3, 4, 6]), (2, 1, [1, 2])],
)
def test_default_counts(num_quantizers: int, num_semantic: int, counts: list[int]):
    assert evaluation.default_counts(num_quantizers, num_semantic) == counts


def test_table():
    rows = [Quality(8, 1.1, -3.25, 5.0, 0.85, 2.5), Quality(8, 1.1, -3.25, 5.0, 0.85, None)]
    one, other = (evaluation.table(Evaluation(1, 2.0, 16, [row], [4.0], [])).splitlines() for row in rows)
    assert one[1:] == ["|---|---|---|---|---|---|", "| 8 | 1.10 | -3.2 | 5.00 | 0.850 | 2.50 |"]
    assert other == [
        "| codebooks | kbit/s | SI-SDR (dB) | mel distance (dB) | STOI |",
        "|---|---|---|---|---|",
        "| 8 | 1.10 | -3.2 | 5.00 | 0.850 |",
    ]


@pytest.fixture
def bad(tmp_path: Path, clips: Path) -> Path:
    """The two clips, with a bad one before, between and after them."""
    speech = load_audio(SAMPLE)
    for path in clips.iterdir():
        (tmp_path / f"good{path.name}").write_bytes(path.read_bytes())
    save_audio(tmp_path / "a_silent.wav", np.zeros((1, 48_000), np.float32))
    save_audio(tmp_path / "good0_short.wav", speech[:, 24_000:33_600])
    (tmp_path / "z_cut.wav").write_bytes((tmp_path / "a_silent.wav").read_bytes()[:50_000])
    with_nan = speech[0, :48_000].copy()
    with_nan[100] = np.nan
    soundfile.write(tmp_path / "z_nan.wav", with_nan, 24_000, subtype="FLOAT")
    # A whole header, and damage behind it.
    damaged = (tmp_path / "good0.flac").read_bytes()
    (tmp_path / "z_damaged.flac").write_bytes(damaged[:9000] + bytes(len(damaged) - 9000))
    click = np.zeros((1, 48_000), np.float32)
    click[0, 40_000:40_010] = 0.5
    save_audio(tmp_path / "a_click.wav", click)
    return tmp_path


REASONS = {
    "z_cut.wav": "the file is cut short",
    "a_click.wav": "STOI needs 0.41 s of sound",
    "a_silent.wav": "it is silent: no sample is above -80 dBFS",
    "good0_short.wav": "it is 0.40 s long; the measures need 0.65 s",
    "z_damaged.flac": "the file is damaged",
    "z_nan.wav": "the file has samples that are NaN or infinite",
}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_bad_clip_costs_one_clip(bad: Path, result: Evaluation, workers: int):
    found = evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(bad), [1, 8], workers=workers)
    assert found._replace(left_out=[]) == result
    assert [Path(clip.name).name for clip in found.left_out] == list(REASONS)
    for clip, reason in zip(found.left_out, REASONS.values(), strict=True):
        assert clip.reason.startswith(reason)


def test_a_clip_that_is_too_long_for_the_memory_costs_one_clip(clips: Path, monkeypatch: pytest.MonkeyPatch):
    encode, calls = evaluation.encode, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return encode(*arguments)

    monkeypatch.setattr(evaluation, "encode", fail_once)
    model = Mimi.from_pretrained("mini")
    found = evaluation.evaluate(model, find_clips(clips), [1], visqol=False, workers=1)
    assert found.num_clips == 1
    assert found.left_out == [
        (str(clips / "0.flac"), "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
    ]


def test_without_visqol_shorter_clips_can_be_measured(bad: Path, result: Evaluation):
    save_audio(bad / "good0_short.wav", load_audio(SAMPLE)[:, 24_000:36_000])
    corpus = find_clips(bad, "good*")
    found = evaluation.evaluate(Mimi.from_pretrained("mini"), corpus, [1], visqol=False)
    assert (found.num_clips, found.left_out, found.qualities[0].visqol) == (3, [], None)


def test_the_number_of_workers_is_positive(clips: Path):
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(clips), [1], workers=0)


def test_no_clip_that_can_be_measured_is_an_error(bad: Path):
    with pytest.raises(ValueError, match=r"no clip can be measured; .*a_silent\.wav: it is silent"):
        evaluation.evaluate(Mimi.from_pretrained("mini"), find_clips(bad, "a_silent*"), [1])


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
    printed, stderr = capsys.readouterr()
    assert stderr == ""
    assert "| codebooks | kbit/s |" in printed and "1 clips, 2 s; perplexity of the codebooks: " in printed
    fields = json.loads(output.read_text())
    assert [row["num_quantizers"] for row in fields["qualities"]] == [1, 2]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_names_what_it_leaves_out(bad: Path, capsys: pytest.CaptureFixture):
    output = bad / "quality.json"
    words = ["evaluate", "mini", str(bad), "--num-quantizers", "1", "--no-visqol", "-o", str(output)]
    assert cli.main(words) == 0
    printed, stderr = capsys.readouterr()
    assert "2 clips, 3 s, 6 left out; perplexity" in printed and "ViSQOL" not in printed
    for line, (name, reason) in zip(stderr.splitlines(), REASONS.items(), strict=True):
        assert line.startswith(f"left out {bad / name}: {reason.replace('0.65', '0.41')}")
    fields = json.loads(output.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert fields["num_clips"] == 2 and fields["qualities"][0]["visqol"] is None
    assert [Path(clip["name"]).name for clip in fields["left_out"]] == list(REASONS)


def test_one_audio_file_is_a_corpus(clips: Path, capsys: pytest.CaptureFixture):
    words = ["evaluate", "mini", str(clips / "0.flac"), "--num-quantizers", "1", "--no-visqol"]
    assert cli.main(words) == 0
    assert "1 clips, 2 s; perplexity" in capsys.readouterr().out


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
