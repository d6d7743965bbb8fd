"""What a compiled program costs: the bytes and FLOPs, or a TPU's cycles, of each kernel that a call launches."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from mae_jax.runtime import hlo
from mae_jax.runtime.chips import Chip

# What launches nothing: names for memory that is there, control flow (its bodies are counted), and what waits or
# begins work that is counted elsewhere.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "while", "call",
    "conditional", "partition-id", "replica-id", "add-dependency", "domain", "async-start", "async-update",
}  # fmt: skip
# One element of the result needs one element of each operand that is as large.
ELEMENTWISE = {
    "abs", "add", "and", "bitcast", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "erf",
    "exponential", "floor", "log", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "remainder",
    "reshape", "rsqrt", "select", "sign", "sine", "sqrt", "subtract", "tanh", "transpose", "xor",
}  # fmt: skip
SAME_MEMORY = ("bitcast", "convert", "copy")  # between an updated array and the parameter or result that it is
SLICING = ("dynamic-slice", "gather", "slice")
# Custom kernels, whose text does not tell what they multiply: Pallas on GPU and TPU, cuDNN's.
CUSTOM = re.compile(r'custom_call_target="(__gpu\$xla\.gpu\.triton|triton_kernel_call|__cudnn|tpu_custom_call)')
# Attention that is known by name, ours (gpu_attention.py) and jax.experimental.pallas.ops.gpu.attention: how many
# products of [n, d] with [d, m] or of [n, m] with [m, d] it makes for each head, in whole blocks of tokens.
ATTENTION_PRODUCTS = {
    "attention": 2, "attention_gradient": 7, "mha_forward": 2, "mha_preprocess_backward": 0, "mha_backward": 7
}  # fmt: skip
ATTENTION_BLOCK = 64
Table = dict[str, hlo.Instruction]  # a computation's instructions by their names


class Kernel(NamedTuple):
    """One operation that a device launches, with what one execution costs."""

    instruction: hlo.Instruction
    times: int  # executions in one call of the program
    is_exact: bool  # False: it stands in a loop of unknown length, and one round was counted
    bytes: int  # that it reads and writes once; of sliced and updated arrays only what it touches
    flops: int | None  # of its matrix products; None: a custom kernel, whose text does not tell
    cycles: int | None  # the compiler's own estimate (TPU)

    def seconds(self, chip: Chip) -> float:
        """Of all executions: its cycles, or the longer of its bytes and its products, all at the rate of bfloat16."""
        if self.cycles is not None:
            return self.times * self.cycles / chip.clock
        return self.times * max((self.flops or 0) / chip.product_rate, self.bytes / chip.bandwidth)


class Totals(NamedTuple):
    """The sums of a program's kernels in one call."""

    launches: int
    bytes: int
    flops: int
    cycles: int
    unknown: int  # launches whose FLOPs are not known, and count as none
    is_exact: bool


def totals(kernels: Iterable[Kernel]) -> Totals:
    kernels = list(kernels)
    return Totals(
        sum(k.times for k in kernels),
        sum(k.times * k.bytes for k in kernels),
        sum(k.times * (k.flops or 0) for k in kernels),
        sum(k.times * (k.cycles or 0) for k in kernels),
        sum(k.times for k in kernels if k.flops is None),
        all(k.is_exact for k in kernels),
    )


def read_kernels(module: hlo.Module) -> list[Kernel]:
    """Every kernel that a call of a program for a GPU launches, or every instruction with cycles of one for a TPU.

    A roofline of them (Williams et al. 2009, doi 10.1145/1498765.1498785) counts neither overlap nor caches, nor what
    goes between devices. FLOPs are those of matrix products: two for a multiplication and its addition.
    """
    tables = {name: {i.name: i for i in body} for name, body in module.computations.items()}
    found = []
    for instruction, computation, times, is_exact in hlo.executed(module, into_kernels=False):
        if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            noted = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            size, flops = _cost(instruction, tables[computation], tables)
            found.append(Kernel(instruction, times, is_exact, size, flops, int(noted[1]) if noted else None))
    timed = [kernel for kernel in found if kernel.cycles is not None]
    return timed or found


def _cost(instruction: hlo.Instruction, around: Table, tables: dict[str, Table]) -> tuple[int, int | None]:
    """(bytes, FLOPs) of one execution."""
    opcode, operands = instruction.opcode.removesuffix("-start"), hlo.operand_names(instruction)
    if opcode == "fusion":
        body = tables[hlo.attribute(instruction, "calls")]
        return _fusion_bytes(body), _fusion_flops(body, tables)
    arrays = {name: around[name].shape for name in operands}
    written, read = _bytes(instruction.shape), sum(map(_bytes, arrays.values()))
    if opcode in SLICING:
        return 2 * written, 0
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(arrays[operands[1]]), 0
    if opcode != instruction.opcode:  # what begins a copy or a collective has its operand in its result, too
        return 2 * read, 0
    if opcode == "custom-call":
        workspace, flops = _custom_call(instruction, [arrays[name] for name in operands])
        return written - workspace + read, flops
    return written + read, _flops(instruction, around)


def _custom_call(instruction: hlo.Instruction, operands: list[str]) -> tuple[int, int | None]:
    """(bytes of its result that are only workspace, FLOPs), from the shapes of its operands."""
    if product := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes):  # cuBLAS
        result, *rest = hlo.elements(instruction.shape)
        workspace = sum(size for kind, size in hlo.element_types(" ".join(rest)) if kind in ("s8", "u8"))
        return workspace, _product_flops(result, operands[0], product[1])
    if not CUSTOM.search(instruction.attributes):
        return 0, 0
    kernel = re.search(r'\bname = "(\w+)", num_stages', instruction.attributes)
    if kernel is None or kernel[1] not in ATTENTION_PRODUCTS:
        return 0, None
    (images, queries, heads, width), (_, keys, *_) = _sizes(operands[0]), _sizes(operands[1])
    tokens = math.prod(-(-count // ATTENTION_BLOCK) * ATTENTION_BLOCK for count in (queries, keys))
    power_of_two = 1 << (width - 1).bit_length()
    return 0, 2 * ATTENTION_PRODUCTS[kernel[1]] * images * heads * tokens * power_of_two


def _fusion_bytes(body: Table) -> int:
    """What a fused computation reads of its parameters, and writes."""
    root = next(i for i in body.values() if i.is_root)
    results = [body[name] for name in hlo.operand_names(root)] if root.opcode == "tuple" else [root]
    written, needed, updated = 0, dict.fromkeys(body, 0), set()
    for result in results:
        update = _follow(body, result)
        if update.opcode == "dynamic-update-slice":
            array, part = (body[name] for name in hlo.operand_names(update)[:2])
            target = _follow(body, array)
            if target.opcode == "parameter":  # updated where it lies
                written += _bytes(part.shape)
                updated.add(update.name)
                needed[update.name] = _count(part.shape)
                continue
        written += _bytes(result.shape)
        needed[result.name] = _count(result.shape)
    for user in reversed(body.values()):  # users stand after what they use
        want = min(needed[user.name], _count(user.shape))
        for place, name in enumerate(dict.fromkeys(hlo.operand_names(user)) if want else ()):
            whole = _count(body[name].shape)
            if user.opcode in SLICING and place == 0:
                share = want
            elif user.opcode == "dynamic-update-slice" and user.name in updated and place == 0:
                share = 0
            elif user.opcode in ELEMENTWISE and whole == _count(user.shape):
                share = want
            else:
                share = whole
            needed[name] = min(whole, needed[name] + share)
    read = 0
    for parameter in body.values():
        if parameter.opcode == "parameter" and needed[parameter.name]:
            read += _bytes(parameter.shape) * needed[parameter.name] // max(1, _count(parameter.shape))
    return written + read


def _fusion_flops(body: Table, tables: dict[str, Table]) -> int:
    inner = (tables[hlo.attribute(i, "calls")] for i in body.values() if i.opcode == "fusion")
    return sum(_flops(i, body) for i in body.values()) + sum(_fusion_flops(other, tables) for other in inner)


def _flops(instruction: hlo.Instruction, around: Table) -> int:
    if instruction.opcode != "dot":
        return 0
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    return _product_flops(instruction.shape, around[hlo.operand_names(instruction)[0]].shape, summed)


def _product_flops(result: str, left: str, summed: str) -> int:
    """Of a product from the shapes of its result and left operand, and the operand's axes that are summed over."""
    sizes = _sizes(left)
    return 2 * _count(result) * math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", summed))


def _follow(body: Table, instruction: hlo.Instruction) -> hlo.Instruction:
    while instruction.opcode in SAME_MEMORY:
        instruction = body[hlo.operand_names(instruction)[0]]
    return instruction


def _sizes(shape: str) -> list[int]:
    """Of an array's axes: "f32[2,3]{1,0}" -> [2, 3]."""
    return [int(size) for size in re.findall(r"\d+", shape[shape.index("[") : shape.index("]")])]


def _count(shape: str) -> int:
    return sum(math.prod(_sizes(part)) for part in re.findall(r"\w+\[[\d,<=]*\]", shape))


def _bytes(shape: str) -> int:
    return sum(size for _, size in hlo.element_types(shape))
