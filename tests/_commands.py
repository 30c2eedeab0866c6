"""A command with a mistake in it: one line says so, the exit status is 2, and nothing was done."""

import tempfile

import pytest


def refused(capsys, main, arguments, *, silent=True):
    """The one line that a command answers with; one that is not `silent` may have printed what it read."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed, said = capsys.readouterr()
    assert ended.value.code == 2, said
    assert not printed or not silent
    assert said.count("\n") == 1, said
    assert "error: " in said
    return said


def tree(folder):
    """Every file below a folder with what it holds, and every folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def make_unwritable(monkeypatch, folder):
    """Let the file system refuse new files in a folder, whoever runs the tests."""
    real = tempfile.TemporaryFile

    def refuse(*args, dir=None, **kwargs):
        if str(dir) == str(folder):
            raise PermissionError(13, "Permission denied", str(dir))
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
