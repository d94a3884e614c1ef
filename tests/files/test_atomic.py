"""Outputs are written whole or not at all, and locks hold between processes."""

import os
import stat
from pathlib import Path

import pytest

from mimi_jax.files.atomic import atomic_path, file_lock


def names(folder: Path) -> list[str]:
    """Everything in a folder, temporary files too."""
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, **files: str) -> None:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)


def test_nothing_is_at_the_path_before_the_block_ends(tmp_path: Path):
    path = tmp_path / "speech.wav"
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".wav"
        assert not temporary.exists()
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["speech.wav"]


def test_the_temporary_file_may_be_in_another_folder(tmp_path: Path):
    (tmp_path / "work").mkdir()
    path = tmp_path / "a.txt"
    with atomic_path(path, tmp_path / "work") as temporary:
        assert temporary.parent == tmp_path / "work"
        temporary.write_text("new")
        assert names(tmp_path) == ["work"]
    assert path.read_text() == "new"
    assert names(tmp_path / "work") == []


def test_a_file_replaces_a_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_relative_path_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with atomic_path("a.txt") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole(tmp_path: Path):
    path = tmp_path / "model"
    with atomic_path(path) as temporary:
        write_folder(temporary, config="1", weights="2")
        assert not path.exists()
    assert names(tmp_path) == ["model"]
    assert names(path) == ["config", "weights"]


def test_a_folder_replaces_a_folder(tmp_path: Path):
    path = tmp_path / "model"
    write_folder(path, config="old", leftover="old")
    with atomic_path(path) as temporary:
        write_folder(temporary, config="new")
        assert (path / "config").read_text() == "old"
    assert names(tmp_path) == ["model"]
    assert names(path) == ["config"]
    assert (path / "config").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("before", [[], ["out"]])
def test_an_exception_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], kind: str, before: list[str]
):
    for name in before:
        write_folder(tmp_path / name, config="old")
    with pytest.raises(error), atomic_path(tmp_path / "out") as temporary:
        if kind == "file":
            temporary.write_text("half")
        elif kind == "folder":
            write_folder(temporary, config="half")
        raise error
    assert names(tmp_path) == before
    assert [(tmp_path / name / "config").read_text() for name in before] == ["old"] * len(before)


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    write_folder(path, config="old")
    replace = os.replace

    def fail_to_bring_in_the_new(source: Path, target: Path) -> None:
        if target == path and (source / "config").read_text() == "new":
            raise OSError("disk on fire")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_to_bring_in_the_new)
    with pytest.raises(OSError, match="disk on fire"), atomic_path(path) as temporary:
        write_folder(temporary, config="new")
    assert names(tmp_path) == ["model"]
    assert (path / "config").read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_permissions_are_those_of_a_plain_open(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    plain, atomic = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic"))
    assert atomic == plain


def test_a_symbolic_link_stays(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "disk" / "real")
    with atomic_path(link) as temporary:
        assert temporary.parent == tmp_path / "disk"
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert link.is_symlink()
    assert names(tmp_path / "disk") == ["real"]
    assert link.read_text() == "new"


def test_a_missing_folder_is_named(tmp_path: Path):
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path.parent}"), atomic_path(path):
        pytest.fail("the block must not run")


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a chmod does not stop root
    error = f"folder {tmp_path} is not writable"
    with pytest.raises(PermissionError, match=error), atomic_path(tmp_path / "a.txt"):
        pytest.fail("the block must not run")


def test_a_device_is_not_replaced():
    with pytest.raises(OSError, match="/dev/null: it is a device"), atomic_path(os.devnull):
        pytest.fail("the block must not run")


def test_a_file_does_not_replace_a_folder(tmp_path: Path):
    path = tmp_path / "out"
    write_folder(path, config="old")
    with (
        pytest.raises(IsADirectoryError, match="there is a folder of this name"),
        atomic_path(path) as temporary,
    ):
        temporary.write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path):
    path = tmp_path / "out"
    path.write_text("old")
    with (
        pytest.raises(NotADirectoryError, match="there is a file of this name"),
        atomic_path(path) as temporary,
    ):
        temporary.mkdir()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


def test_one_block_at_a_time_has_a_lock(tmp_path: Path):
    with file_lock(tmp_path / "lock") as first, file_lock(tmp_path / "lock", wait=False) as second:
        assert (first, second) == (True, False)
    with file_lock(tmp_path / "lock", wait=False) as now:
        assert now
    assert names(tmp_path) == ["lock"]
