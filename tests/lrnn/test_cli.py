"""Test the command line: help with an example for every command, and errors that take one line."""

import argparse
import re
import shlex
import sys
import types

import pytest

from lrnn import cli
from lrnn.errors import UserError


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lrnn {command}")
    examples = re.search(r"^examples?:\n((?:  .*\n?)+)", text, re.MULTILINE)
    assert examples, text
    lines = [line.strip() for line in examples[1].splitlines()]
    assert any(line.startswith(f"lrnn {command}") for line in lines)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_are_accepted_by_the_parser(command, capsys):
    """An example with an option that does not exist would mislead."""
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line.strip() for line in text.splitlines() if re.match(rf"  +lrnn {command}\b", line)]
    assert examples
    for example in examples:
        arguments = shlex.split(example.partition("  #")[0])[1:]
        args, _ = cli.parse([a for a in arguments if a != "..."])
        assert args.command == command


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {summary}" in text for name, (_, summary) in cli.COMMANDS.items())


@pytest.mark.parametrize(
    "arguments",
    [[], ["pretrian", "x.yaml"], ["pretrain"], ["plot", "--ouput", "x", "y"], ["pretrain", "x.yaml", "--nprco", "2"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("usage: lrnn") and "error:" in output.err


@pytest.fixture
def command(monkeypatch):
    """`command(main)` makes `lrnn probe` run the function."""

    def install(main) -> None:
        module = types.ModuleType("lrnn_probe", "A command.")
        module.add_arguments = lambda parser: parser.add_argument("word")
        module.main = main
        monkeypatch.setitem(sys.modules, "lrnn_probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("lrnn_probe", "a probe"))

    return install


def test_user_errors_take_one_line(command, capsys):
    def fail(args: argparse.Namespace) -> int:
        raise UserError(f"{args.word} is wrong; it should be right")

    command(fail)
    assert cli.main(["probe", "this"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "lrnn: error: this is wrong; it should be right\n"


def test_other_errors_are_not_hidden(command):
    def fail(args: argparse.Namespace) -> int:
        raise ValueError("a defect of the program")

    command(fail)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["probe", "this"])


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch, capsys, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert cli.main(["pretrain", "run.yaml"]) == 2
    error = f"lrnn: error: lrnn needs Linux, and this is {platform}; use a Linux machine, WSL 2 or the Docker image\n"
    assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (75, 75)])
def test_exit_status(command, result, status):
    command(lambda args: result)
    assert cli.main(["probe", "this"]) == status


def test_home_and_variables_expand_in_paths(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    args, _ = cli.parse(["plot", "$RUNS/a", "~/b", "--out=~/x.png"])
    assert [*map(str, args.run_dirs), str(args.out)] == ["/runs/a", "/home/me/b", "/home/me/x.png"]
    args, _ = cli.parse(["export", "$RUNS/a", "~/b"])
    assert (args.source, args.out) == ("/runs/a", "/home/me/b")
    assert cli.main(["plot", "$NOWHERE/a"]) == 2
    error = capsys.readouterr().err
    assert error == "lrnn: error: command line: run_dirs = '$NOWHERE/a': the environment variable NOWHERE is not set\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS) and "--allow-code-execution" in script and "--nproc" in script


def test_overrides_may_surround_options():
    args, _ = cli.parse(["pretrain", "run.yaml", "a=1", "--nproc", "2", "b=2", "c=x y"])
    assert (args.config, args.nproc, args.overrides) == ("run.yaml", 2, ["a=1", "b=2", "c=x y"])
    args, _ = cli.parse(["pretrain", "--nproc", "2", "run.yaml", "a=1"])
    assert (args.config, args.nproc, args.overrides) == ("run.yaml", 2, ["a=1"])


def test_processes_compile_no_kernel_twice(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_CACHE_MANAGER", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    from triton.runtime.cache import get_cache_manager

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert type(get_cache_manager("ab")).__name__ == "CompileOnce"
