"""XLA's text of a compiled program (HLO): its computations, and how often each instruction runs in one call."""

import re
from collections.abc import Iterator
from typing import NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
NAME = r"%?([\w.\-]+)"
NAMED_BITS = {"pred": 8, "token": 0, "opaque": 0}  # types whose name does not say how many they have
PASSED_ON = ("bitcast", "convert", "copy")  # operations that leave a loop's counter as it is
CALLS = re.compile(
    rf"\b(?:calls|to_apply|true_computation|false_computation)={NAME}|"
    r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
ENTERED = (
    "while",
    "call",
    "conditional",
    "async-start",
)  # what is in these is launched; a fusion is one kernel
TABLES = re.compile(
    r'(\d+) (?:"(?P<file>.*)"|\{file_name_id=(?P<name>\d+) .*?\bline=(?P<line>\d+)|'
    r"\{file_location_id=(?P<place>\d+)(?: parent_frame_id=(?P<parent>\d+))?\})"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of its result, as written: "f32[8,16]{1,0}", or several in parentheses
    opcode: str  # "all-reduce", "fusion", ...
    operands: str  # what stands between the parentheses
    attributes: str  # what follows them
    is_root: bool


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str  # name of the computation that a call runs
    num_devices: int
    frames: dict[int, tuple[str, int, int]] = {}  # of Python's stack: number -> file, line, number of the caller's


class Executed(NamedTuple):
    """An instruction with what a call of the program does with it."""

    instruction: Instruction
    computation: str  # in which it stands
    times: int
    is_exact: bool  # False: a loop around it has an unknown number of rounds, and one was counted


def parse(text: str) -> Module:
    """Reads the text of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            end = _closing(rest)
            current.append(Instruction(name, shape, opcode, rest[:end], rest[end + 1 :], root is not None))
    counts = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0]))
    num_devices = int(counts.get("num_partitions", 1)) * int(counts.get("replica_count", 1))
    return Module(computations, entry, num_devices, _frames(text))


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
    """The tables FileNames, FileLocations and StackFrames at the top of a text."""
    files, places, frames = {}, {}, {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if row := TABLES.match(line):
            number = int(row[1])
            if row["file"] is not None:  # the names of functions, which follow, look like those of files
                files.setdefault(number, row["file"])
            elif row["line"]:
                places[number] = files[int(row["name"])], int(row["line"])
            else:
                frames[number] = *places[int(row["place"])], int(row["parent"] or 0)
    base = frames[1][2] if 1 in frames else 0  # XLA writes 1 + the caller's number: the first frame has no caller
    return {number: (file, line, parent - base) for number, (file, line, parent) in frames.items()}


def stack(module: Module, instruction: Instruction) -> list[tuple[str, int]]:
    """(file, line) of the Python code that an instruction comes from, and of its callers; empty if that is not told."""
    found = []
    if noted := re.search(r"\bstack_frame_id=(\d+)", instruction.attributes):
        number = int(noted[1])
        while number in module.frames:
            file, line, number = module.frames[number]
            found.append((file, line))
    elif noted := re.search(r'\bsource_file="([^"]*)" source_line=(\d+)', instruction.attributes):
        found.append((noted[1], int(noted[2])))
    return found


def op_name(instruction: Instruction) -> str:
    """The JAX operation that an instruction comes from, with what it stands in; "" if that is not told."""
    found = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def executed(module: Module, into_kernels: bool = True) -> Iterator[Executed]:
    """Every instruction that a call of the program runs, once for each place that it is called from.

    Bodies of loops count as often as the loop goes round; every branch of a conditional counts as taken. If not
    `into_kernels`, what is in fusions, reductions and the like, which a device launches as one, is left out.
    """
    yield from _executed(module, module.entry, 1, True, into_kernels)


def _executed(module: Module, computation: str, times: int, is_exact: bool, into_kernels: bool) -> Iterator[Executed]:
    instructions = module.computations.get(computation, [])
    by_name = {instruction.name: instruction for instruction in instructions}
    for instruction in instructions:
        yield Executed(instruction, computation, times, is_exact)
        if instruction.opcode == "while":
            rounds = _trip_count(module, by_name, instruction)
            body, known = attribute(instruction, "body"), rounds is not None
            yield from _executed(module, body, times * (rounds if known else 1), is_exact and known, into_kernels)
        elif instruction.opcode in ("async-update", "async-done"):  # these name what async-start has begun
            continue
        elif into_kernels or instruction.opcode in ENTERED:
            for single, several in CALLS.findall(instruction.attributes.split(", metadata=")[0]):
                for called in [single] if single else re.findall(NAME, several):
                    yield from _executed(module, called, times, is_exact, into_kernels)


def element_types(shape: str) -> list[tuple[str, int]]:
    """The type and the bytes of each array in a shape: "(f32[2,3], bf16[4])" -> [("f32", 24), ("bf16", 8)]."""
    arrays = []
    for kind, dims in re.findall(r"\b([a-z]+\w*)\[([\d,<=]*)\]", shape):
        size = 1
        for dim in re.findall(r"\d+", dims):
            size *= int(dim)
        arrays.append((kind, _bits(kind) * size // 8))
    return arrays


def elements(shape: str) -> list[str]:
    """The parts of a tuple's shape: "((f32[2], f32[3]), f32[4])" -> ["(f32[2], f32[3])", "f32[4]"]."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for position, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(re.sub(r"/\*.*?\*/", "", shape[start:position]).strip())
            start = position + 1
    return parts


def _bits(kind: str) -> int:
    return NAMED_BITS[kind] if kind in NAMED_BITS else int(re.match(r"[a-z]+(\d+)", kind)[1])


def _closing(text: str) -> int:
    """Position of the parenthesis that closes one which was opened before `text`."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text)


def attribute(instruction: Instruction, name: str) -> str:
    """The computation that an instruction names: `attribute(loop, "body")`."""
    return re.search(rf"\b{name}={NAME}", instruction.attributes)[1]


def _trip_count(module: Module, around: dict[str, Instruction], loop: Instruction) -> int | None:
    """Rounds of a loop: what XLA has noted, or limit, start and step of its counter (TPUs' text has no note)."""
    if noted := re.search(r'known_trip_count"?[=:]\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition, body = (
        {i.name: i for i in module.computations[attribute(loop, part)]} for part in ("condition", "body")
    )
    test = next(i for i in condition.values() if i.is_root)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = operand_names(test)
    counter = condition[counter]
    if counter.opcode != "get-tuple-element":
        return None
    index, values = int(re.search(r"index=(\d+)", counter.attributes)[1]), around[operand_names(loop)[0]]
    result = next(i for i in body.values() if i.is_root)
    if values.opcode != "tuple" or result.opcode != "tuple":
        return None
    increment = _follow(body, operand_names(result)[index])
    steps = [_constant(body, name) for name in operand_names(increment)] if increment.opcode == "add" else []
    step = next((value for value in steps if value is not None), None)
    start = _constant(around, operand_names(values)[index])
    limit = _constant(condition, limit)
    return None if None in (start, step, limit) else max(0, -((start - limit) // step))


def operand_names(instruction: Instruction) -> list[str]:
    """Of the instructions whose results it takes."""
    return re.findall(r"%([\w.\-]+)", instruction.operands)


def _follow(computation: dict[str, Instruction], name: str) -> Instruction:
    while computation[name].opcode in PASSED_ON:
        name = operand_names(computation[name])[0]
    return computation[name]


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    found = _follow(computation, name)
    return int(found.operands) if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.operands) else None
