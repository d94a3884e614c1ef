"""Where a model is: in this package, in a folder or file, or on the Hugging Face Hub."""

import os
import re
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # which file holds which tensor, if there are several
ORBAX_FOLDER = "params"
MODEL_FILES = (WEIGHTS_FILE, INDEX_FILE, ORBAX_FOLDER)  # a model folder has one of them
PYTORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def bundled_models() -> list[str]:
    """The names of the models that come with this package."""
    return sorted(file.parent.name for file in BUNDLED.glob("*/config.json"))


def find(name: str | Path) -> Path:
    """The folder or the .safetensors file of a model.

    Args:
        name: a bundled model, a folder, a .safetensors file, or a repository of the Hugging Face Hub, which
            is downloaded if it is not in the Hub's cache yet. "~" stands for the home folder.

    Raises:
        FileNotFoundError: there is no model of that name, or the Hub cannot be reached.
        ValueError: it is a PyTorch file, or both a bundled model and a folder with a model.
    """
    path = Path(os.path.expanduser(name))
    if name in bundled_models():
        if any((path / file).exists() for file in MODEL_FILES):
            raise ValueError(
                f"{name!r} is a bundled model, and a model folder here; name ./{name} for the folder, or move"
                " it away for the bundled model"
            )
        return BUNDLED / name
    if path.exists():
        _check_is_model(path)
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) and path.suffix != ".safetensors":
        return _download(str(name))
    raise FileNotFoundError(
        f"unknown model {str(name)!r}: give a bundled model ({', '.join(bundled_models())}), a folder, a"
        " .safetensors file, or a Hugging Face repository such as kyutai/mimi"
    )


def _check_is_model(path: Path) -> None:
    """Refuse PyTorch files, which are pickles, and folders without weights that can be read."""
    if path.is_dir() and any((path / name).exists() for name in MODEL_FILES):
        return
    pickles = sorted(path.iterdir()) if path.is_dir() else [path]
    pickles = [file for file in pickles if file.suffix in PYTORCH_SUFFIXES]
    if pickles:
        raise ValueError(f"{pickles[0]} is a PyTorch file; convert it with convert/convert_checkpoint.py")
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a model folder holds one of {', '.join(MODEL_FILES)}, found none")


def _download(repository: str) -> Path:
    """Get a model from the Hugging Face Hub or from its cache, and return its folder."""
    import huggingface_hub

    problem = _connection_problem(repository)
    try:
        config, _ = (
            huggingface_hub.hf_hub_download(repository, name, local_files_only=bool(problem))
            for name in ("config.json", WEIGHTS_FILE)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if problem:
            reason = f"it cannot be reached ({problem}), and the model is not in its cache"
        raise FileNotFoundError(
            f"cannot get model {repository!r} from the Hugging Face Hub: {reason} (check the name and the"
            " connection, or give a local folder)"
        ) from None
    return Path(config).parent


def _connection_problem(repository: str) -> str:
    """Why the Hub cannot be reached; empty if it can. A download that fails is tried again for 23 s."""
    import huggingface_hub

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "config.json"))
    except (huggingface_hub.errors.HfHubHTTPError, ValueError):
        return ""  # it answers, and the download will say what is wrong
    except Exception as error:  # of an HTTP library that differs between versions of huggingface_hub
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
