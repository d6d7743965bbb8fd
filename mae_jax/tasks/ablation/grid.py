"""The grid of an ablation: axes of settings, their product (the cells), and the protocols that measure each cell."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from mae_jax.runtime.errors import UserError
from mae_jax.settings.registry import nearest_setting

EXAMPLE = '(("model.mask_ratio", (0.5, 0.75)),)'
RESERVED = ("task", "seed", "data.seed", "shard", "given", "file")  # the ablation sets these


class Axis(NamedTuple):
    """Settings that change together."""

    keys: tuple[str, ...]
    choices: dict[str, dict[str, Any]]  # label -> value of each key
    title: str  # heads the column of labels
    named: bool  # whether labels are clear without the title


class Cell(NamedTuple):
    name: str
    labels: tuple[str, ...]  # one for each axis
    names: tuple[str, ...]  # the labels, with their axis's title where they need it
    settings: dict[str, Any]


Protocols = dict[str, tuple[str, dict[str, Any]]]  # name -> (config in configs/, overrides)


def parse_grid(grid: tuple) -> list[Axis]:
    """The axes of `ablate.grid`; UserError unless it is a tuple of axes without repeated keys or values."""
    if not grid:
        raise UserError(f"ablate.grid is empty: what shall vary? For example --config.ablate.grid='{EXAMPLE}'")
    axes = [_parse_axis(axis) for axis in grid]
    keys = [key for axis in axes for key in axis.keys]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"ablate.grid has {key} twice; a setting can be part of one axis only")
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}
    return [axis._replace(title=axis.title or ", ".join(short[key] for key in axis.keys)) for axis in axes]


def _parse_axis(axis: Any) -> Axis:
    """An axis, with a title only if its names describe several keys; UserError if malformed."""
    try:
        keys, values, *names = axis
        if isinstance(keys, str) and not isinstance(values, str):
            keys, values = (keys,), [(value,) for value in values]
        title = "variant" if names and len(keys) > 1 else ""
        (labels,) = names or [[", ".join(map(str, value)) for value in values]]
        if any(isinstance(part, str) for part in (labels, *values)):  # which would be taken apart
            raise TypeError
        settings = [dict(zip(keys, value, strict=True)) for value in values]
        choices = dict(zip(map(str, labels), settings, strict=True))
        if not settings or len(choices) < len(settings) or any(settings.count(one) > 1 for one in settings):
            raise ValueError
        return Axis(tuple(map(str, keys)), choices, title, bool(names))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"ablate.grid has {axis!r}, which is not an axis (key, values) or (key, values, names), with as many names "
            f"as values, none twice, and in each value one for each of several keys; for example {EXAMPLE}"
        ) from error


def make_cells(axes: list[Axis]) -> list[Cell]:
    """The product of the axes; the last axis changes fastest."""
    cells = []
    for labels in itertools.product(*(axis.choices for axis in axes)):
        chosen = list(zip(axes, labels, strict=True))
        names = tuple(label if axis.named else f"{axis.title} {label}" for axis, label in chosen)
        settings = {key: value for axis, label in chosen for key, value in axis.choices[label].items()}
        cells.append(Cell(", ".join(names), labels, names, settings))
    return cells


def parse_protocols(measure: tuple, taken: Iterable[str]) -> Protocols:
    """The protocols of `ablate.measure`; UserError unless each is (name, config, overrides) with a new name."""
    protocols = {}
    for item in measure:
        try:
            name, config, overrides = item
            is_word, overrides = re.fullmatch(r"[\w=+-]+", name), dict(overrides)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"ablate.measure has {item!r}, which is not (name, config, overrides), for example "
                '("finetune", "finetune_digits", (("train.epochs", 20.0),))'
            ) from error
        if not is_word or name in (*taken, *protocols, "pretrain"):
            raise UserError(f"ablate.measure has the name {name!r}, which is taken or no word; choose another")
        protocols[name] = (str(config), overrides)
    return protocols


def check_curves(paper: tuple) -> None:
    """Raises UserError unless `ablate.paper` consists of curves (name, ((x, y), ...))."""
    for curve in paper:
        try:
            _, points = curve
            _, ys = zip(*points, strict=True)
            sum(ys)  # they are numbers
        except (TypeError, ValueError) as error:
            raise UserError(
                f"ablate.paper has {curve!r}, which is no curve (name, ((x, y), ...)), for example "
                '("fine-tuning", ((0.5, 84.9), (0.75, 84.9)))'
            ) from error


def split_key(key: str, protocols: Iterable[str]) -> tuple[str, str]:
    """The protocol that a grid key belongs to, or "pretrain"; and the setting."""
    first, _, rest = key.partition(".")
    return (first, rest) if first in protocols else ("pretrain", key)


def check_keys(axes: list[Axis], protocols: Protocols, known: Iterable[str]) -> None:
    """Raises UserError for an unknown setting, or one that the ablation sets itself."""
    words = [*known, *(f"{name}.{key}" for name in protocols for key in known)]
    asked = [("ablate.grid", key) for axis in axes for key in axis.keys]
    asked += [("ablate.measure", f"{name}.{key}") for name, (_, overrides) in protocols.items() for key in overrides]
    for where, key in asked:
        if key not in words:
            raise UserError(f"{where}: unknown setting {key!r}{nearest_setting(key, words)}")
        owner, own = split_key(key, protocols)
        if own in RESERVED or own.startswith("ablate.") or (own == "init_from" and owner != "pretrain"):
            raise UserError(f"{where} cannot set {key}, which the ablation sets itself: leave it out, set ablate.seeds")


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
