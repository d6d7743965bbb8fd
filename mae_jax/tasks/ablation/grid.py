"""What an ablation varies: axes of settings, whose product are the cells, and the protocols that measure them."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from mae_jax.runtime.errors import UserError
from mae_jax.settings.suggestions import nearest_setting

EXAMPLE = '(("model.mask_ratio", (0.5, 0.75)),)'
# Settings that an ablation decides itself.
RESERVED = ("task", "seed", "data.seed", "shard", "given", "file")
OF_PROTOCOLS = (*RESERVED, "init_from")  # the same of the runs that measure


class Axis(NamedTuple):
    """Settings that change together."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]  # each has one for every key
    labels: tuple[str, ...]
    title: str  # of a column of labels
    named: bool  # whether the labels say what they are without the title


class Cell(NamedTuple):
    """One combination of values."""

    name: str
    labels: tuple[str, ...]  # one for each axis
    folders: tuple[str, ...]  # the labels as parts of a folder's name
    settings: dict[str, Any]
    x: float | None  # the number that tells the cell apart, if it is one


class Protocol(NamedTuple):
    """A way to measure what was pre-trained."""

    name: str
    config: str  # of configs/
    overrides: dict[str, Any]


def parse_grid(grid: Any) -> list[Axis]:
    """The axes of `ablate.grid`.

    Raises:
      UserError: unless it is a tuple of (key(s), values) or (key(s), values, names), with no key and no name twice.
    """
    if not isinstance(grid, tuple | list) or any(not isinstance(axis, tuple | list) for axis in grid):
        raise UserError(f"ablate.grid={grid!r} is not a tuple of axes (key, values), for example {EXAMPLE}")
    if not grid:
        raise UserError(f"ablate.grid is empty: what shall vary? For example --config.ablate.grid='{EXAMPLE}'")
    every_key = [key for axis in grid if axis for key in as_keys(axis[0])]
    axes = [_parse_axis(axis, every_key) for axis in grid]
    if twice := _first_twice(every_key):
        raise UserError(f"ablate.grid has {twice} twice; a setting can be part of one axis only")
    return axes


def _parse_axis(axis: tuple, every_key: list[str]) -> Axis:
    if len(axis) not in (2, 3) or not all(isinstance(part, tuple | list) for part in axis[1:]):
        raise UserError(
            f"ablate.grid has the axis {axis!r}, which is neither (key, values) nor (key, values, names), "
            f"for example {EXAMPLE}"
        )
    keys, values = as_keys(axis[0]), tuple(axis[1])
    if not keys or not all(isinstance(key, str) for key in keys):
        raise UserError(f"ablate.grid has the axis {axis!r}, whose keys {axis[0]!r} are no names of settings")
    if not values:
        raise UserError(f"ablate.grid gives {', '.join(keys)} no value, so that there is no cell; give at least one")
    if isinstance(axis[0], str):
        values = tuple((value,) for value in values)
    for value in values:
        if not isinstance(value, tuple | list) or len(value) != len(keys):
            raise UserError(
                f"ablate.grid gives {', '.join(keys)} the value {value!r}, not {len(keys)} values, one each"
            )
    leaves = [_short(key, every_key) for key in keys]
    named = len(axis) == 3
    if named and len(axis[2]) != len(values):
        raise UserError(f"ablate.grid gives {', '.join(keys)} {len(values)} values, but {len(axis[2])} names")
    labels = tuple(str(name) for name in axis[2]) if named else tuple(", ".join(map(str, value)) for value in values)
    for number, value in enumerate(values):
        if value in values[:number] or labels[number] in labels[:number]:
            raise UserError(f"ablate.grid has {labels[number]!r} twice among the values of {', '.join(keys)}")
    title = "variant" if named and len(keys) > 1 else ", ".join(leaves)
    return Axis(keys, tuple(map(tuple, values)), labels, title, named)


def make_cells(axes: list[Axis]) -> list[Cell]:
    """The product of the axes; the last one changes fastest."""
    cells = []
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        labels = tuple(axis.labels[place] for axis, place in chosen)
        names = tuple(
            axis.labels[place] if axis.named else f"{axis.title} {axis.labels[place]}" for axis, place in chosen
        )
        settings = {}
        for axis, place in chosen:
            settings |= dict(zip(axis.keys, axis.values[place], strict=True))
        x = next(iter(settings.values())) if len(settings) == 1 else None
        number = isinstance(x, int | float) and not isinstance(x, bool)
        cells.append(Cell(", ".join(names), labels, tuple(map(safe_name, names)), settings, x if number else None))
    return cells


def parse_protocols(measure: Any, groups: Iterable[str]) -> list[Protocol]:
    """The protocols of `ablate.measure`.

    Args:
      groups: of settings, whose names are taken.

    Raises:
      UserError: unless it is a tuple of (name, config, overrides) with names that are free.
    """
    protocols, taken = [], {*groups, "pretrain"}
    for item in measure:
        well_formed = isinstance(item, tuple | list) and len(item) == 3 and all(isinstance(x, str) for x in item[:2])
        pairs = item[2] if well_formed else ()
        if not well_formed or not isinstance(pairs, tuple | list) or not all(
            isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):  # fmt: skip
            raise UserError(
                f"ablate.measure has {item!r}, which is not (name, config, overrides), for example "
                '("finetune", "finetune_digits", (("train.epochs", 20.0),))'
            )
        name = item[0]
        if name in taken or safe_name(name) != name or "." in name:
            raise UserError(f"ablate.measure has the name {name!r}, which is taken or no word; choose another")
        taken.add(name)
        protocols.append(Protocol(name, item[1], dict(pairs)))
    return protocols


def split_settings(settings: dict[str, Any], protocols: list[Protocol]) -> dict[str, dict[str, Any]]:
    """A cell's settings by the run that they are of: {"pretrain": {...}, NAME of a protocol: {...}}."""
    split = {"pretrain": {}} | {protocol.name: {} for protocol in protocols}
    for key, value in settings.items():
        owner = owner_of(key, protocols)
        split[owner][key.removeprefix(f"{owner}.")] = value
    return split


def owner_of(key: str, protocols: list[Protocol]) -> str:
    """The protocol that a key of the grid is of, or "pretrain"."""
    first = key.split(".", 1)[0]
    return first if any(protocol.name == first for protocol in protocols) else "pretrain"


def parse_shard(shard: str | None) -> tuple[int, int]:
    """ "i/n" -> (i modulo n, n); None, which is everything, is (0, 1).

    Raises:
      UserError: for anything else.
    """
    if shard is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 0 <= index <= count or not count:
        raise UserError(f"shard={shard} is not i/n with i from 0 to n, for example --config.shard=0/4 to 3/4")
    return index % count, count


def safe_name(name: str) -> str:
    """A name as part of a path: letters, digits and . = + - stay, all else is an underscore."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("._") or "_"


def check_keys(axes: list[Axis], protocols: list[Protocol], known: Iterable[str]) -> None:
    """Raises UserError for a key that is no setting, with the nearest that is one, or that the ablation sets itself."""
    known = list(known)
    words = [*known, *(f"{protocol.name}.{key}" for protocol in protocols for key in known)]
    for key in (key for axis in axes for key in axis.keys):
        if key not in words:
            raise UserError(f"ablate.grid: unknown setting {key!r}{nearest_setting(key, words)}")
        owner = owner_of(key, protocols)
        _check_free("ablate.grid", key, key.removeprefix(f"{owner}."), owner)
    for protocol in protocols:
        for key in protocol.overrides:
            if key not in known:
                hint = nearest_setting(key, known)
                raise UserError(f"ablate.measure, {protocol.name}: unknown setting {key!r}{hint}")
            _check_free(f"ablate.measure, {protocol.name},", key, key, protocol.name)


def _check_free(where: str, key: str, own: str, owner: str) -> None:
    if own in (RESERVED if owner == "pretrain" else OF_PROTOCOLS) or own.startswith("ablate."):
        remedy = "set ablate.seeds" if "seed" in own else "leave it out"
        raise UserError(f"{where} cannot set {key}, which the ablation sets itself; {remedy}")


def as_keys(keys: Any) -> tuple[str, ...]:
    """The keys of an axis, which may be one or a tuple; of anything else none."""
    return (keys,) if isinstance(keys, str) else tuple(keys) if isinstance(keys, tuple | list) else ()


def _short(key: str, every_key: list[str]) -> str:
    """The last part of a key, if no other key ends so."""
    leaf = key.rsplit(".", 1)[-1]
    return key if sum(other.rsplit(".", 1)[-1] == leaf for other in set(every_key)) > 1 else leaf


def _first_twice(items: Iterable[str]) -> str | None:
    seen = set()
    return next((item for item in items if item in seen or seen.add(item)), None)
