"""What a compiled program sends between devices: which collectives, how often, how many bytes, over which mesh axes."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mae_jax.runtime import hlo

# Share of the payload that a device sends when n devices pass it round a ring (Patarasuk and Yuan 2009, "Bandwidth
# optimal all-reduce algorithms"): reducing or gathering alone takes (n - 1) / n, reducing to all both of them.
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Collective(NamedTuple):
    """One collective operation of a program, as one device sees it.

    The payload of one execution is: of an all-gather its whole result, of a reduce-scatter its whole operand, of an
    all-reduce, all-to-all or collective-permute its operand, which is as large as its result.
    """

    kind: str  # a key of RING
    types: str  # element types, such as "bf16" or "bf16+f32"
    axes: tuple[str, ...] | None  # mesh axes that it spans; None: no whole axes, or the mesh is not known
    group_size: int  # devices that work together; 2 of a collective-permute
    executions: int  # in one call of the program
    payload: int  # bytes of one execution
    is_exact: bool = True  # False: it stands in a loop of unknown length, and one round was counted

    @property
    def bytes(self) -> int:
        """Payload of one call of the program."""
        return self.executions * self.payload

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one call if each collective runs round a ring; XLA may choose otherwise."""
        return RING[self.kind](self.group_size) * self.bytes


def read_collectives(text: str, mesh_shape: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of a compiled program, in its order.

    Args:
      text: HLO, as `jax.stages.Compiled.as_text()` gives it. A CPU's widens bfloat16 before it is sent, and so shows
        twice the bytes of an accelerator's.
      mesh_shape: sizes of the axes of the mesh that it was compiled for, in order (`mesh.shape`), to name the axes.
    """
    module, found = hlo.parse(text), []
    starts = {
        name
        for name, instructions in module.computations.items()
        if any('custom_call_target="AsyncCollectiveStart"' in i.attributes for i in instructions)
    }
    for instruction, computation, times, is_exact in hlo.executed(module):
        kind = instruction.opcode.removesuffix("-start")  # a -done only waits
        if kind not in RING:
            continue
        # A TPU's collective that runs beside other work is repeated in each fusion that it runs beside; one starts it.
        if "chain_id=" in instruction.attributes and computation not in starts:
            continue
        groups = _groups(instruction.attributes, module.num_devices)
        arrays = hlo.element_types(_result(instruction))
        payload = sum(size for _, size in arrays)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's: an all-reduce of which each device takes a slice, fused into one
        elif kind == "reduce-scatter":
            payload *= groups.shape[1]
        types = "+".join(sorted({name for name, _ in arrays}))
        axes = _axes(groups, mesh_shape, kind == "collective-permute") if mesh_shape else None
        found.append(Collective(kind, types, axes, groups.shape[1], times, payload, is_exact))
    return found


def table(collectives: Iterable[Collective]) -> str:
    """One line for each kind, type and group of devices, the largest first, and the sum; sizes in MiB."""
    rows: dict[tuple, list] = {}
    for c in collectives:
        axes = "?" if c.axes is None else "+".join(c.axes)
        row = rows.setdefault((c.kind, c.types, axes, c.group_size), [0, 0, 0.0, True])
        for place, value in enumerate((c.executions, c.bytes, c.wire_bytes)):
            row[place] += value
        row[3] &= c.is_exact
    if not rows:
        return "no communication between devices"
    lines = [f"{'collective':<20}{'type':<10}{'axes':<14}{'devices':>8}{'times':>7}{'payload MiB':>13}{'ring MiB':>11}"]
    for (kind, types, axes, size), (times, payload, wire, is_exact) in sorted(rows.items(), key=lambda r: -r[1][1]):
        note = "" if is_exact else "  at least: in a loop of unknown length"
        lines.append(f"{kind:<20}{types:<10}{axes:<14}{size:>8}{times:>7}{payload / 2**20:>13,.1f}"
                     f"{wire / 2**20:>11,.1f}{note}")  # fmt: skip
    total = [sum(row[place] for row in rows.values()) for place in range(3)]
    lines.append(f"{'all':<52}{total[0]:>7}{total[1] / 2**20:>13,.1f}{total[2] / 2**20:>11,.1f}")
    return "\n".join(lines)


def ideal(
    mesh_shape: Mapping[str, int],
    *,
    split: int,
    whole: int,
    stream: int = 0,
    depth: int = 0,
    gather_bytes: int = 4,
    gradient_bytes: int = 4,
    stream_bytes: int = 4,
    regather: bool = True,
    remat: bool = False,
) -> list[Collective]:
    """What a step must communicate in theory, with one execution for each time that everything passes once.

    data: the gradients are summed, each device those that it keeps. fsdp (ZeRO-3, Rajbhandari et al. 2020, arXiv
    1910.02054, section 5.3): kernels are gathered for the forward pass and again for the backward pass, their
    gradients reduced and scattered. tensor (Megatron, Shoeybi et al. 2019, arXiv 1909.08053, section 3): two sums of
    activations in a block's forward pass and two in its backward pass. (The gradients of norms' scales and biases, four
    vectors of a block's width that are summed over tensor too, are left out.)

    Args:
      mesh_shape: sizes of the axes data, fsdp and tensor.
      split: parameters that fsdp (and tensor, if it is there) splits, all devices together.
      whole: parameters that every device keeps whole.
      stream: elements of the residual stream of one device's images, tokens x width x images.
      depth: blocks.
      gather_bytes, gradient_bytes, stream_bytes: of an element when it is gathered, reduced, or summed over tensor.
      regather: False if gathered kernels are kept from the forward to the backward pass, at the cost of their memory.
      remat: whether blocks are recomputed: one more sum over tensor each, that of the attention (nobody needs the
        second half's result again).
    """
    kernels, found = split // mesh_shape["tensor"], []

    def add(kind: str, types: int, axes: tuple[str, ...], executions: int, count: int) -> None:
        size = math.prod(mesh_shape[axis] for axis in axes)
        if size > 1 and count:
            found.append(Collective(kind, {2: "bf16", 4: "f32"}[types], axes, size, executions, types * count))

    add("all-gather", gather_bytes, ("fsdp",), 2 if regather else 1, kernels)
    add("reduce-scatter", gradient_bytes, ("fsdp",), 1, kernels)
    add("all-reduce", gradient_bytes, ("data",), 1, kernels // mesh_shape["fsdp"])
    add("all-reduce", gradient_bytes, tuple(axis for axis in ("data", "fsdp") if mesh_shape[axis] > 1), 1, whole)
    add("all-reduce", stream_bytes, ("tensor",), (5 if remat else 4) * depth, stream)
    return found


def _result(instruction: hlo.Instruction) -> str:
    """The shape of a collective's result; what starts one gives (operand, result, ...)."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shape
    parts = hlo.elements(instruction.shape)
    if instruction.opcode == "all-reduce-start" and not parts[0].startswith("("):
        return instruction.shape  # the one that gives its result alone
    return parts[1]


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of devices that work together, [groups, devices of each], by their places in the mesh.

    XLA writes them as lists, {{0,1},{2,3}}; as numbers in order, reshaped and transposed, [2,4]<=[4,2]T(1,0); or as the
    axes of a mesh, mesh['a'=4,'b'=2] {'b'}, an axis in parts as 'a':(size of those before)size.
    """
    if lists := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source, order = (_numbers(part) if part else None for part in iota.groups())
        return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", attributes):
        return _mesh_groups(*mesh.groups())
    return np.arange(num_devices)[None]  # {}: all of them


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", mesh)}
    places = _devices(device_ids) if device_ids else np.arange(math.prod(sizes.values()))
    shape, grouped, parts = [], [], {}
    for axis in axes.split(","):
        name, before, size = re.fullmatch(r"(.*?)(?::\((\d+)\)(\d+))?", axis).groups()
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    for name, whole in sizes.items():
        done = 1
        for before, size in sorted(parts.get(name, [])):
            shape += [before // done, size]
            grouped.append(len(shape) - 1)
            done = before * size
        shape.append(whole // done)
    rest = [axis for axis in range(len(shape)) if axis not in grouped]
    count = math.prod(shape[axis] for axis in grouped)
    return places.reshape(shape).transpose(rest + grouped).reshape(-1, count)


def _devices(text: str) -> np.ndarray:
    """A list of devices: 0,2,1,3, or numbers in order, reshaped and transposed: [2,2]T(1,0)."""
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order = (_numbers(part) if part else None for part in iota.groups())
        return np.arange(math.prod(shape)).reshape(shape).transpose(order).ravel()
    return np.array(_numbers(text))


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int], are_pairs: bool) -> tuple[str, ...] | None:
    """Names of the axes along which the devices of a group differ; None if a group (not a pair) is not all of them."""
    if groups.max() >= math.prod(mesh_shape.values()):
        return None
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axis, group, device]
    spans = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(name for name, spanned in zip(mesh_shape, spans, strict=True) if spanned)
    size = math.prod(mesh_shape[axis] for axis in axes)
    return axes if are_pairs or groups.shape[1] == size else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
