"""The command line: its config, its settings, and mistakes in either."""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import sys
import sysconfig
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_dict, config_flags

from mae_jax.runtime.errors import UserError, first_line
from mae_jax.settings.fields import defaults, flatten, get
from mae_jax.settings.registry import CONFIG_WORDS, SETTING_WORDS, find_meant, nearest_setting

CONFIGS = Path(__file__).parents[2] / "configs"
HELP = ("help", "h", "helpshort", "helpfull", "helpxml")
# File name prefixes of traceback frames outside the user's code.
NOT_THEIRS = ("<", __file__, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


class OrNone(flags.ArgumentParser):
    """Parses "None" ("not set" in configs) as None, and anything else by another parser."""

    def __init__(self, parser: flags.ArgumentParser, kind: str):
        self._parser, self._kind, self.syntactic_help = parser, kind, parser.syntactic_help

    def parse(self, argument):
        try:
            return None if argument == "None" else self._parser.parse(argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it must be {self._kind}") from error

    def flag_type(self):
        return self._parser.flag_type()


for _type, _parser, _kind in (
    (int, flags.IntegerParser(), "a whole number"),
    (float, flags.FloatParser(), "a number"),
    (bool, flags.BooleanParser(), "True or False"),
    (str, flags.ArgumentParser(), "text"),
):
    config_flags.register_flag_parser(parser=OrNone(_parser, _kind))(_type)


def config_file(arguments: list[str]) -> tuple[Path, str | None]:
    """The file and argument of `--config=FILE[:ARGUMENT]` or `--config FILE`; UserError if missing."""
    found = [a.split("=", 1)[1] for a in arguments if a.startswith(("--config=", "-config="))]
    found += [b for a, b in zip(arguments, arguments[1:], strict=False) if a in ("--config", "-config")]
    if not found:
        raise UserError("which config? For example: python main.py --config=configs/digits.py (--help lists them)")
    name, _, argument = found[-1].partition(":")
    path = Path(name)
    if not path.is_file():
        there = _configs_near(path)
        meant = find_meant(path.stem, there, CONFIG_WORDS)
        hint = f'did you mean "{there[meant]}"?' if meant else f"there are: {', '.join(there.values())}"
        raise UserError(f"config {path} does not exist; {hint}")
    return path, argument or None


def _configs_near(path: Path) -> dict[str, str]:
    """name -> file of the configs in the folder of `path` and of this project's."""
    ours = Path(os.path.relpath(CONFIGS)) if Path.cwd() in CONFIGS.parents else CONFIGS
    names: dict[str, str] = {}
    for folder in (path.parent, ours, ours / "ablations"):
        for file in sorted(folder.glob("*.py")):
            if file.stem not in ("__init__", "base", "common", "main"):
                names.setdefault(file.stem, str(file))
    return names


def given_settings(arguments: list[str]) -> tuple[str, ...]:
    """The keys of all `--config.KEY=VALUE` (and `--noconfig.KEY`) of a command line."""
    found = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in arguments)
    return tuple(match[1] for match in found if match)


def asks_for_help(arguments: list[str]) -> bool:
    return any(argument.startswith("-") and argument.lstrip("-") in HELP for argument in arguments)


def describe_configs(arguments: list[str]) -> str:
    """The text of `--help`: the named config with all its settings, or a list of all configs."""
    try:
        path, argument = config_file(arguments)
        config = load_config(path, argument)
    except UserError:
        paths = [path for path in sorted(CONFIGS.rglob("*.py")) if path.stem not in ("__init__", "base")]
        lines = [f"  {path.relative_to(CONFIGS.parent)!s:<40} {_docstring(path).split(chr(10))[0]}" for path in paths]
        lines.append("--help --config=configs/NAME.py lists the settings of a config; configs/common.py explains them.")
        return "\n".join(["configs:", *lines])
    keys = [key for key in flatten(config.to_dict()) if key not in ("given", "file")]
    lines = [f"  --config.{key}={shlex.quote(str(get(config, key)))}" for key in keys]
    return "\n".join([f"{path}: {_docstring(path)}", "", "settings, explained in configs/common.py:", *lines])


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def check_command_line(arguments: list[str]) -> None:
    """Checks the config, its argument and every `--config.KEY`; UserError suggests the nearest existing name."""
    known = flatten(load_config(*config_file(arguments)).to_dict())
    for key in given_settings(arguments):
        if members := [name for name in known if name.startswith(key + ".")]:
            hint = nearest_setting(key, [*members, "init_from"])
            raise UserError(f"--config.{key} is a group of settings; set one of its members{hint}")
        if key not in known:
            raise UserError(f"unknown setting --config.{key}{nearest_setting(key, known)}")


def describe_unknown_flag(name: str, arguments: list[str]) -> str:
    """The error for an unknown flag, such as a setting without `--config.`."""
    meant = find_meant(name, flatten(load_config(*config_file(arguments)).to_dict()), SETTING_WORDS)
    if meant is None:
        return f"unknown flag --{name}; settings are given as --config.KEY=VALUE"
    flag = meant if meant.startswith("--") else f"--config.{meant}"
    return f'unknown flag --{name}; did you mean "{flag}"?'


def load_config(path: Path, argument: str | None) -> ConfigDict:
    """The result of a config file's `get_config`; UserError if it fails, or its keys are not those of common.py."""
    spec = importlib.util.spec_from_file_location("checked_config", path)
    if spec is None:
        raise UserError(f"config {path} is not a Python file; give one of configs/*.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
        get_config, given = getattr(module, "get_config", None), [argument] if argument else []
        if not callable(get_config):
            raise UserError(f"config {path} has no function get_config()")
        try:
            inspect.signature(get_config).bind(*given)
        except TypeError as error:
            nothing = f"takes nothing after a colon, but was given {argument!r}"
            takes = nothing if argument else f"needs an argument after a colon: --config={path}:ARGUMENT"
            raise UserError(f"config {path} {takes}") from error
        config = get_config(*given)
        if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
            found = "None" if config is None else f"a {type(config).__name__}"
            raise UserError(
                f"config {path}: get_config() returns {found}, not a ConfigDict; begin with "
                "config = common.get_config() and end with return config"
            )
        usual, found = defaults(), flatten(config.to_dict())
        usual.update(config.to_dict())  # refuses unknown settings and wrong types
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's own code
        raise UserError(f"config {path}{_explain(error, path)}") from error
    if missing := ", ".join(key for key in flatten(usual.to_dict()) if key not in found):
        raise UserError(f"config {path} lacks settings ({missing[:60]}...): begin with config = common.get_config()")
    return config


def _explain(error: BaseException, path: Path) -> str:
    """Where in the user's code an error occurred, and its message."""
    every_frame = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        every_frame.append((error.filename or "<", error.lineno))
    where = ""
    for name, line in every_frame:
        if not name.startswith(NOT_THEIRS):  # the last one counts
            where = f", line {line}" if Path(name).resolve() == path.resolve() else f": {name}, line {line}"
    text = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else first_line(error)}"
    unknown = re.match(r"""\W*(?:Key ")?(\w+)\\?['"]""", str(error))  # a ConfigDict's error for a missing key
    if unknown and Path(every_frame[-1][0]).parent == Path(config_dict.__file__).parent:
        usual = defaults()
        hint = nearest_setting(unknown[1], [*usual, *flatten(usual.to_dict())])  # groups too
        text = f'there is no setting "{unknown[1]}"{hint}'
    return f"{where}: {text}"
