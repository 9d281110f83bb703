"""The command line: `--config=configs/tiny.py:arg --config.train.num_steps=200 --workdir=DIR`, checked before any work.

Program flags are the fields of a small frozen dataclass (`RunFlags(workdir: str)`), read by the same rules as config
fields. Bad input raises UserError; `run_main` prints it as one line and exits with 2.
"""

import dataclasses
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from experiments import config_help
from experiments.config_tree import (
    apply_overrides,
    did_you_mean,
    diff,
    field_types,
    from_json,
    nodes,
    parse_value,
    show,
    to_json,
)
from experiments.environment import Environment, explain
from experiments.errors import UserError

__all__ = [
    "apply_overrides",
    "diff",
    "format_config",
    "from_json",
    "load_config",
    "parse_argv",
    "parse_flags",
    "run_main",
    "to_json",
]

C = TypeVar("C")
F = TypeVar("F")


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs an entry point; a UserError becomes `error: …` on stderr and exit code 2, anything else is a bug.

    Where JAX fails for what the machine is or has, its own words come first, then such a line.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        line = explain(error, Environment.find())
        if line is None:
            raise
        print(error, f"error: {line}", sep="\n", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def parse_argv(argv: Sequence[str], flags_class: type[F], config_class: type[C]) -> tuple[C, F]:
    """(config, flags) of a program that takes `--config`. `--help` prints every field and exits."""
    given, overrides, wants_help = _split(argv, flags_class, takes_config=True)
    spec = given.pop("config", None)
    if wants_help and spec is None:
        _print_help(flags_class, config_class)
    if spec is None:
        raise UserError(f"no config: give --config=FILE.py, such as {_config_files(pathlib.Path('configs'))}")
    config = apply_overrides(load_config(spec, config_class), overrides)
    if wants_help:
        _print_help(flags_class, config)
    return config, _build_flags(flags_class, given)


def parse_flags(argv: Sequence[str], flags_class: type[F]) -> F:
    """The flags of a program that takes no `--config`."""
    given, _, wants_help = _split(argv, flags_class, takes_config=False)
    if wants_help:
        _print_help(flags_class, None)
    return _build_flags(flags_class, given)


def load_config(spec: str, config_class: type[C]) -> C:
    """Runs `get_config(arg)` of the file in `FILE.py` or `FILE.py:arg`; raises UserError for what is wrong with it."""
    stem, has_arg, arg = spec.partition(".py:")
    path = pathlib.Path(stem + ".py" if has_arg else spec)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--config={spec}: no such config file{_similar_file(path)}")
    try:
        get_config = _import_file(path).get("get_config")
        if get_config is None:
            raise UserError("the file does not define get_config(arg=None)")
        if has_arg and not inspect.signature(get_config).parameters:
            raise UserError(f"get_config takes no argument, but {arg!r} was given")
        config = get_config(arg) if has_arg else get_config()
    except (TypeError, ValueError, SyntaxError, UserError) as error:  # a misspelt field or a value out of range
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == str(path.absolute())]
        raise UserError(f"{path}{''.join(lines[-1:])}: {error}") from error
    if not isinstance(config, config_class):
        raise UserError(f"{path}: get_config returned {type(config).__name__}, not {config_class.__name__}")
    return from_json(config_class, to_json(config), str(path))  # checks the type of every value


def _import_file(path: pathlib.Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path.absolute())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    spec.loader.exec_module(module)
    return vars(module)


def format_config(config: Any, width: int = 110) -> str:
    """The resolved config for people: one paragraph of `field=value` for each dataclass in it."""
    lines = []
    for path, node in nodes(config):
        lines.append(f"{path or 'config'}: {type(node).__name__}")
        line = ""
        for name in field_types(type(node)):
            value = getattr(node, name)
            if any(nodes(value)):
                continue  # a paragraph of its own
            item = f"  {name}={show(value)}"
            if line and len(line) + len(item) > width:
                lines.append(line)
                line = ""
            line += item
        lines += [line] if line else []
    return "\n".join(lines)


def _split(
    argv: Sequence[str], flags_class: type, *, takes_config: bool
) -> tuple[dict[str, str], dict[str, str], bool]:
    """argv into program flags, config overrides and whether help was asked for."""
    hints = {config_help.flag_name(name): hint for name, hint in field_types(flags_class).items()}
    flags: dict[str, str] = {}
    overrides: dict[str, str] = {}
    names = [*hints, *(["config"] if takes_config else [])]
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h"):
            return flags, overrides, True
        name, equals, text = argument.removeprefix("--").partition("=")
        is_override = takes_config and name.startswith("config.")
        if not argument.startswith("--"):
            raise UserError(f"stray argument {argument!r}{did_you_mean(f'--{name}', [f'--{n}' for n in names])}")
        if not is_override and name not in names:
            inner = f" (did you mean --config.{name}?)" if takes_config and "." in name else ""
            near = did_you_mean(f"--{name}", [f"--{n}" for n in names])
            raise UserError(f"unknown flag --{name}{inner or near or '; see --help'}")
        if not equals and hints.get(name) is bool:
            text = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            text = rest.pop(0)
        if is_override:
            overrides[name.removeprefix("config.")] = text
        else:
            flags[name] = text
    return flags, overrides, False


def _build_flags(flags_class: type[F], given: dict[str, str]) -> F:
    values = {
        name: parse_value(hint, given[flag], f"--{flag}")
        for name, hint in field_types(flags_class).items()
        if (flag := config_help.flag_name(name)) in given
    }
    for f in dataclasses.fields(flags_class):  # pyright: ignore[reportArgumentType]
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            doc = config_help.field_docs(flags_class).get(f.name, "give it")
            raise UserError(f"--{config_help.flag_name(f.name)} is required: {doc}")
    try:
        return flags_class(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _print_help(flags_class: type, config: Any) -> NoReturn:
    program = sys.modules.get("__main__")
    spec, about = getattr(program, "__spec__", None), inspect.getdoc(program)
    print(config_help.help_text(spec.name if spec else sys.argv[0], about or "", flags_class, config))
    sys.exit(0)


def _config_files(folder: pathlib.Path) -> str:
    files = sorted(str(file) for file in folder.glob("*.py") if not file.name.startswith("_"))
    return ", ".join(files) or "configs/tiny.py"


def _similar_file(path: pathlib.Path) -> str:
    folder = path.parent if path.parent.is_dir() and path.parent != pathlib.Path(".") else pathlib.Path("configs")
    stems = {file.stem: str(file) for file in folder.glob("*.py") if not file.name.startswith("_")}
    near = did_you_mean(path.stem, stems)
    for stem, file in stems.items():
        near = near.replace(f"mean {stem}?", f"mean {file}?")
    return near or f"; there are {_config_files(folder)}"
