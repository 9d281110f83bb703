"""The list of commands, and what each of them says about itself."""

import pathlib
import subprocess
import sys

import pytest

from experiments import __main__ as commands
from experiments.errors import UserError

FOLDER = pathlib.Path(commands.__file__).parent


def test_every_command_is_listed_with_what_it_does(capsys):
    programs = {file.stem for file in FOLDER.glob("*.py") if "run_main(main)" in file.read_text()} - {"__main__", "cli"}
    assert programs == set(commands.COMMANDS)
    commands.main([])
    listed = capsys.readouterr().out
    for command in commands.COMMANDS:
        about = commands.summary(command)
        assert about.endswith(".") and f"experiments.{command}" not in about
        assert any(line.split() == [f"experiments.{command}", *about.split()] for line in listed.splitlines())


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_examples(command):
    assert f"    python -m experiments.{command} " in (FOLDER / f"{command}.py").read_text()


def test_help_shows_the_examples():
    argv = [sys.executable, "-m", "experiments.plot", "--help"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout
    assert text.startswith("usage: python -m experiments.plot ")
    assert "    python -m experiments.plot runs/tiny" in text and "--out" in text


def test_a_command_given_as_an_argument():
    with pytest.raises(UserError, match=r"did you mean run\?"):
        commands.main(["rnu"])
