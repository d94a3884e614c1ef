"""What every command refuses before it loads a model."""

import pytest

BAD_OUTPUTS = {
    "missing/out.wav": "there is no folder",
    "clip.wav/out.wav": "there is no folder",
    "folder.wav": "it is a folder",
    "/proc/out.wav": "no file can be made in",
    "/dev/full": "it is a folder or a device",
}


@pytest.mark.parametrize("output", BAD_OUTPUTS)
@pytest.mark.parametrize(
    "command", [("encode", "clip.wav"), ("decode", "codes.safetensors"), ("roundtrip", "clip.wav")]
)
def test_unwritable_output(fails, too_late: None, command: tuple[str, str], output: str):
    assert BAD_OUTPUTS[output] in fails(*command, "-o", output)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["encode", "clip.wav", "-o", "clip.wav"], "clip.wav is the input and would be overwritten"),
        (["encode", "clip.wav", "-o", "./clip.wav"], "is the input"),
        (["encode", "text.safetensors"], "is the input"),
        (["roundtrip", "clip.wav", "-o", "clip.wav"], "is the input"),
        (["decode", "codes.safetensors", "-o", "codes.safetensors"], "is the input"),
        (["decode", "codes.safetensors", "-o", "out.txt"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav", "-o", "out"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav"], "the following arguments are required: -o"),
        (["convert", "mini", "converted"], "the following arguments are required: --to"),
        (["convert", "mini", "converted", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "mini", ".", "--to", "flax"], ". exists; name a new folder"),
        (["convert", "mini", "clip.wav", "--to", "flax"], "clip.wav exists; name a new folder"),
        (["encode"], "the following arguments are required: IN"),
        (["encode", "clip.wav", "--loud"], "unrecognized arguments: --loud"),
        (["transmogrify"], "invalid choice: 'transmogrify'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_usage(fails, too_late: None, words: list[str], error: str):
    assert error in fails(*words, status=2)
