"""The grid of an ablation: axes of settings, their product (the cells), and the protocols that measure each cell."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from mae_jax.runtime.errors import UserError
from mae_jax.settings.registry import nearest_setting

EXAMPLE = '(("model.mask_ratio", (0.5, 0.75)),)'
RESERVED = ("task", "seed", "data.seed", "shard", "given", "file")  # the ablation sets these


class Axis(NamedTuple):
    """Settings that change together."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]  # each tuple has one value for every key
    labels: tuple[str, ...]
    title: str  # heads the column of labels
    named: bool  # whether labels are clear without the title


class Cell(NamedTuple):
    """One combination of values."""

    name: str
    labels: tuple[str, ...]  # one for each axis
    folders: tuple[str, ...]  # the labels, made safe for folder names
    settings: dict[str, Any]
    x: float | None  # its place on the plot's axis, if cells differ in one number


Protocols = dict[str, tuple[str, dict[str, Any]]]  # name -> (config in configs/, overrides)


def parse_grid(grid: tuple) -> list[Axis]:
    """The axes of `ablate.grid`; UserError unless it is a tuple of axes without repeated keys or values."""
    if not grid:
        raise UserError(f"ablate.grid is empty: what shall vary? For example --config.ablate.grid='{EXAMPLE}'")
    axes = [_split_axis(axis) for axis in grid]
    every_key = Counter(key for keys, _, _ in axes for key in keys)
    if twice := [key for key, count in every_key.items() if count > 1]:
        raise UserError(f"ablate.grid has {twice[0]} twice; a setting can be part of one axis only")
    leaves = Counter(key.rsplit(".", 1)[-1] for key in every_key)
    return [_make_axis(*axis, leaves) for axis in axes]


def _split_axis(axis: Any) -> tuple[tuple, tuple, tuple]:
    """The keys, values (a tuple with one for each key) and names of an axis; UserError if malformed."""
    match axis:
        case [str(key), [_, *_] as values, *names]:
            keys, values = (key,), [(value,) for value in values]
        case [[str(), *_] as keys, [_, *_] as values, *names] if all(isinstance(key, str) for key in keys):
            pass
        case _:
            keys, values, names = (), (), (None, None)
    is_list = [isinstance(part, tuple | list) for part in (*values, *names)]
    if len(names) > 1 or not all(is_list) or {len(value) for value in values} != {len(keys)} or any(
        len(part) != len(values) for part in names
    ):  # fmt: skip
        raise UserError(
            f"ablate.grid has {axis!r}, which is not an axis (key, values) or (key, values, names), with as many names "
            f"as values, and in each value one for each of several keys; for example {EXAMPLE}"
        )
    return tuple(keys), tuple(map(tuple, values)), tuple(map(str, names[0] if names else ()))


def _make_axis(keys: tuple[str, ...], values: tuple[tuple, ...], names: tuple[str, ...], leaves: Counter) -> Axis:
    labels = names or tuple(", ".join(map(str, value)) for value in values)
    for number, (value, label) in enumerate(zip(values, labels, strict=True)):
        if value in values[:number] or label in labels[:number]:
            raise UserError(f"ablate.grid has {label!r} twice among the values of {', '.join(keys)}")
    titles = (key.rsplit(".", 1)[-1] for key in keys)
    title = ", ".join(title if leaves[title] == 1 else key for title, key in zip(titles, keys, strict=True))
    return Axis(keys, values, labels, "variant" if names and len(keys) > 1 else title, bool(names))


def make_cells(axes: list[Axis]) -> list[Cell]:
    """The product of the axes; the last axis changes fastest."""
    cells = []
    choices = [[(axis, *choice) for choice in zip(axis.values, axis.labels, strict=True)] for axis in axes]
    for chosen in itertools.product(*choices):
        names = tuple(label if axis.named else f"{axis.title} {label}" for axis, _, label in chosen)
        settings = {}
        for axis, values, _ in chosen:
            settings |= dict(zip(axis.keys, values, strict=True))
        x = next(iter(settings.values())) if len(settings) == 1 else None
        x = x if isinstance(x, int | float) and not isinstance(x, bool) else None
        labels = tuple(label for _, _, label in chosen)
        cells.append(Cell(", ".join(names), labels, tuple(map(safe_name, names)), settings, x))
    return cells


def parse_protocols(measure: tuple, taken: Iterable[str]) -> Protocols:
    """The protocols of `ablate.measure`; UserError unless each is (name, config, overrides) with a new name."""
    protocols = {}
    for item in measure:
        match item:
            case [str(name), str(config), [*pairs]] if all(_is_pair(pair) for pair in pairs):
                pass
            case _:
                raise UserError(
                    f"ablate.measure has {item!r}, which is not (name, config, overrides), for example "
                    '("finetune", "finetune_digits", (("train.epochs", 20.0),))'
                )
        if name in (*taken, *protocols, "pretrain") or safe_name(name) != name or "." in name:
            raise UserError(f"ablate.measure has the name {name!r}, which is taken or no word; choose another")
        protocols[name] = (config, dict(pairs))
    return protocols


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)


def owner_of(key: str, protocols: Iterable[str]) -> str:
    """The protocol that a grid key belongs to, or "pretrain"."""
    first = key.split(".", 1)[0]
    return first if first in protocols else "pretrain"


def check_keys(axes: list[Axis], protocols: Protocols, known: Iterable[str]) -> None:
    """Raises UserError for an unknown setting, or one that the ablation sets itself."""
    words = [*known, *(f"{name}.{key}" for name in protocols for key in known)]
    asked = [("ablate.grid", key) for axis in axes for key in axis.keys]
    asked += [("ablate.measure", f"{name}.{key}") for name, (_, overrides) in protocols.items() for key in overrides]
    for where, key in asked:
        if key not in words:
            raise UserError(f"{where}: unknown setting {key!r}{nearest_setting(key, words)}")
        owner = owner_of(key, protocols)
        own = key.removeprefix(f"{owner}.")
        if own in RESERVED or own.startswith("ablate.") or (own == "init_from" and owner != "pretrain"):
            remedy = "set ablate.seeds" if "seed" in own else "leave it out"
            raise UserError(f"{where} cannot set {key}, which the ablation sets itself; {remedy}")


def parse_shard(shard: str | None) -> tuple[int, int]:
    """ "i/n" -> (i modulo n, n); None, for everything, -> (0, 1)."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 0 <= index <= count or not count:
        raise UserError(f"shard={shard} is not i/n with i from 0 to n, for example --config.shard=0/4 to 3/4")
    return index % count, count


def safe_name(name: str) -> str:
    """A name for a path: other characters than letters, digits and . = + - become underscores."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("._") or "_"
