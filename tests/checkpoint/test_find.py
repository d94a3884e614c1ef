"""Models are found under every kind of name; other names get a helpful error."""

import shutil
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

import mimi_jax
from mimi_jax import Mimi, checkpoint
from tests.checkpoint.folders import assert_same_model


def test_bundled_models_load():
    assert checkpoint.bundled_models() == ["mini"]
    config = Mimi.from_pretrained("mini").config
    assert (config.sampling_rate, config.frame_rate, config.frame_size) == (24_000, 12.5, 1920)


def test_a_bundled_name_that_is_a_folder_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mini").mkdir()
    assert Mimi.from_pretrained("mini").config.sampling_rate == 24_000  # the folder is of something else
    model = Mimi.from_pretrained(base)
    model.save_pretrained("mini")
    with pytest.raises(ValueError, match="'mini' is a bundled model, and a model folder"):
        Mimi.from_pretrained("mini")
    for name in ("./mini", Path("mini")):
        assert_same_model(Mimi.from_pretrained(name), model)


def test_unknown_names(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"unknown model 'maxi': give a bundled model \(mini\)"):
        Mimi.from_pretrained("maxi")
    with pytest.raises(FileNotFoundError, match=r"unknown model 'out/model\.safetensors'"):
        Mimi.from_pretrained("out/model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds one of model\.safetensors, .*, params, found none"):
        Mimi.from_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds a config\.json, found none"):
        Mimi.from_pretrained(tmp_path)


def test_hub(base: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repository: str, filename: str, *, local_files_only: bool) -> str:
        asked.append((repository, filename, local_files_only))
        return str(base / filename)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_model(Mimi.from_pretrained("kyutai/mimi"), Mimi.from_pretrained(base))
    assert asked == [("kyutai/mimi", "config.json", False), ("kyutai/mimi", "model.safetensors", False)]


@pytest.fixture(params=["HF_HUB_OFFLINE=1", "no network"])
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of the Hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if request.param == "no network":
        url = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody listens
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_offline_fails_at_once_in_one_clear_line(offline: Path):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        Mimi.from_pretrained("kyutai/mimi")
    assert str(error.value).startswith(
        "cannot get model 'kyutai/mimi' from the Hugging Face Hub: it cannot be reached ("
    )
    assert "), and the model is not in its cache (check" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5  # huggingface_hub alone would try for 23 s


def test_hub_offline_reads_its_cache(offline: Path, base: Path):
    repository = offline / "models--kyutai--mimi"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, repository / "snapshots" / ("0" * 40))
    assert_same_model(Mimi.from_pretrained("kyutai/mimi"), Mimi.from_pretrained(base))


def test_the_home_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = Mimi.from_pretrained("~/base")
    model.save_pretrained("~/saved")
    assert_same_model(Mimi.from_pretrained(Path("~/saved")), model)
    state = model.init_encoder_state(1)
    mimi_jax.save_state("~/state.safetensors", state)
    mimi_jax.load_state("~/state.safetensors", state)
    codes = mimi_jax.CodeFile(checkpoint.code_spec(model), np.zeros((4, 2), np.int32), 32)
    mimi_jax.save_codes("~/codes.safetensors", codes)
    assert mimi_jax.load_codes("~/codes.safetensors").num_samples == 32
    assert not (tmp_path / "~").exists()


def test_files_of_pytorch_are_sent_to_the_converter(tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"PK")
    for name in (file, tmp_path):
        with pytest.raises(ValueError) as error:
            Mimi.from_pretrained(name)
        assert str(error.value) == f"{file} is a PyTorch file; convert it with convert/convert_checkpoint.py"
