"""The command line: which config it names, which settings it gives, and mistakes in both."""

import difflib
import importlib.util
import inspect
from pathlib import Path

from mae_jax.config import flatten, nearest
from mae_jax.errors import UserError, first_line


def config_file(arguments: list[str]) -> tuple[Path, str | None]:
    """What `--config=FILE` or `--config=FILE:ARGUMENT` (or `--config FILE`) names: the file, and its argument.

    Raises:
      UserError: if there is none, or it does not exist.
    """
    found = [a.split("=", 1)[1] for a in arguments if a.startswith(("--config=", "-config="))]
    found += [b for a, b in zip(arguments, arguments[1:], strict=False) if a in ("--config", "-config")]
    if not found:
        raise UserError("which config? For example: python main.py --config=configs/digits.py")
    name, _, argument = found[-1].partition(":")
    path = Path(name)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path(__file__).parent.parent / "configs"
        names = {str(folder / f.name): f.name for f in sorted(folder.glob("*.py")) if f.stem != "__init__"}
        close = difflib.get_close_matches(path.name, names.values(), n=1, cutoff=0.5)
        hint = f'did you mean "{folder / close[0]}"?' if close else f"there are: {', '.join(names) or 'none'}"
        raise UserError(f"config {path} does not exist; {hint}")
    return path, argument or None


def given_settings(arguments: list[str]) -> tuple[str, ...]:
    """The keys of all `--config.KEY=VALUE` (and `--noconfig.KEY`) of a command line."""
    names = (argument.split("=", 1)[0].lstrip("-") for argument in arguments if argument.startswith("-"))
    names = (name.removeprefix("no") for name in names)
    return tuple(name.removeprefix("config.") for name in names if name.startswith("config."))


def check_command_line(arguments: list[str]) -> None:
    """Checks that the config exists, takes its argument, and has each `--config.KEY` among its settings.

    Raises:
      UserError: with the nearest existing name.
    """
    path, argument = config_file(arguments)
    spec = importlib.util.spec_from_file_location("checked_config", path)
    if spec is None:
        raise UserError(f"config {path} is not a Python file; give one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"config {path} cannot be loaded: {first_line(error)}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path} has no function get_config()")
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"config {path} takes nothing after a colon, but was given {argument!r}")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except AttributeError as error:
        if "does not exist and cannot be added" not in str(error):
            raise
        message = str(error).splitlines()
        raise UserError(f"config {path}: {message[0].split('. Other')[0]}. {message[-1]}") from error
    known = flatten(config.to_dict())
    for argument in arguments:
        name = argument.split("=", 1)[0].lstrip("-").removeprefix("no")
        if argument.startswith("-") and name.startswith("config."):
            key = name.removeprefix("config.")
            if key in known:
                continue
            if any(k.startswith(key + ".") for k in known):
                raise UserError(f"--config.{key} is a group of settings; set one of its members")
            leaves = {k.rsplit(".", 1)[-1]: k for k in known}
            by_leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)
            hint = nearest(key, known) or (by_leaf and f'; did you mean "{leaves[by_leaf[0]]}"?') or ""
            raise UserError(f"unknown setting --config.{key}{hint}")
