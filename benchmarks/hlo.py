"""Reading compiled programs (HLO text): what runs how often, and what it moves and computes.

A kernel's time is modelled as a roofline: the larger of its bytes at the device's bandwidth and its
FLOPs at the device's peak, both at the share that kernels usually reach.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
FREE = {  # what moves nothing, or is the loop around what is counted
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OP = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

Shape = tuple[str, tuple[int, ...]]  # element type, dimensions


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `inside`: the text of its operands, `rest`: its attributes."""

    name: str
    op: str
    result: str
    inside: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Of the result; several for a tuple."""
        return shapes_of(self.result)

    @property
    def bytes(self) -> int:
        return sum(map(size_of, self.shapes))

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        found = _CALLED.findall(self.rest)
        if branches := _BRANCHES.search(self.rest):
            found += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return found

    @property
    def origin(self) -> str:
        """The operation of the Python program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program by name."""

    computations: Mapping[str, Computation]
    entry: str

    def kernels(self) -> Iterator[tuple[Instruction, Computation, int, int]]:
        """Instruction, its computation, iterations and depth of the loops around it.

        A fusion is one kernel; what it fuses is not listed.
        """
        yield from self._kernels(self.entry, 1, 0)

    def _kernels(self, name: str, turns: int, depth: int):
        computation = self.computations.get(name, {})
        for one in computation.values():
            yield one, computation, turns, depth
            loop = one.op == "while"
            if loop or one.op in ("call", "conditional") or one.op.startswith("async-start"):
                for inner in one.called:
                    yield from self._kernels(inner, turns * self.turns(one), depth + loop)

    def turns(self, one: Instruction) -> int:
        """Iterations of a loop; 1 for anything else, and where the data decides."""
        if one.op != "while":
            return 1
        if found := _TURNS.search(one.rest):
            return int(found[1])
        # The TPU compiler does not write it: the loop's counter is compared with a constant.
        condition = re.search(r"condition=%?([\w.\-]+)", one.rest)
        inner = self.computations.get(condition[1], {}) if condition else {}
        compared = [x for x in inner.values() if x.root and x.op == "compare"]
        limits = [inner[name] for x in compared for name in x.operands if name in inner]
        numbers = [x.inside for x in limits if x.op == "constant" and x.inside.isdecimal()]
        return int(numbers[0]) if numbers else 1


def shapes_of(text: str) -> list[Shape]:
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
    ]


def size_of(shape: Shape) -> int:
    return math.prod(shape[1]) * BYTES.get(shape[0], 4)


def parse(text: str) -> Program:
    """A program from the text of `Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (one := _instruction(line)):
            current[one.name] = one
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    if not (head := _NAME.match(line)):
        return None
    body = line[head.end() - 1 :]
    if not (op := _OP.search(body)):
        return None
    end = _closing(body, op.end())
    inside, rest = body[op.end() : end], body[end:]
    return Instruction(head[2], op[1], body[: op.start()], inside, rest, bool(head[1]))


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def collectives(program: Program) -> list[dict]:
    """Kind, bytes of the result, iterations, depth of loops and origin of each collective."""
    found = []
    for one, _, turns, depth in program.kernels():
        kind = one.op.removesuffix("-start")
        if kind in COLLECTIVES:
            size = one.bytes
            if one.op != kind and len(one.shapes) > 1:
                # The result of an asynchronous one has its operand and counters as well.
                sizes = [size_of(shape) for shape in one.shapes if shape[1]]
                size = min(sizes) if kind == "reduce-scatter" else max(sizes)
            row = {"kind": kind, "bytes": size, "turns": turns, "depth": depth, "of": one.origin}
            found.append(row)
    return found


def estimated_cycles(program: Program) -> int:
    """The TPU compiler's estimate of all kernels that it gives one for."""
    total = 0
    for one, _, turns, _ in program.kernels():
        if found := _CYCLES.search(one.rest):
            total += int(found[1]) * turns
    return total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What kernels reach of a device: bytes and FLOPs per second, and seconds of a launch."""

    bandwidth: float
    flops: float
    launch: float = 2.5e-6


def modelled_seconds(program: Program, roofline: Roofline) -> dict[str, float]:
    """Seconds by kind of kernel: products, attention, copies, other; collectives are left out."""
    found: dict[str, float] = collections.defaultdict(float)
    for one, computation, turns, _ in program.kernels():
        if one.op in FREE or one.op.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            continue
        flops, moved = flops_of(one, computation, program), moved_bytes(one, computation, program)
        seconds = max(moved / roofline.bandwidth, flops / roofline.flops, roofline.launch)
        found[_kind(one, flops)] += turns * seconds
    return dict(found)


def _kind(one: Instruction, flops: float) -> str:
    if "fmha" in one.rest:
        return "attention"
    if flops:
        return "products"
    return "copies" if one.op == "copy" or one.name.startswith("copy") else "other"


def flops_of(one: Instruction, computation: Computation, program: Program) -> float:
    """FLOPs of the matrix products of a kernel."""
    if one.op == "dot":
        return _dot_flops(one, computation)
    if one.op == "fusion":
        inner = program.computations.get(one.called[0], {})
        return sum(flops_of(x, inner, program) for x in inner.values())
    if one.op == "custom-call" and "fmha" in one.rest:
        return _attention_flops(one, computation)
    if one.op == "custom-call" and "gemm" in one.rest:
        return _dot_flops(one, computation)
    return 0


def _dot_flops(one: Instruction, computation: Computation) -> float:
    left = computation[one.operands[0]].shapes[0][1]
    axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)[\]}]', one.rest)
    contracted = [int(axis) for axis in re.findall(r"\d+", axes[1])] if axes else [len(left) - 1]
    return 2 * math.prod(one.shapes[0][1]) * math.prod(left[axis] for axis in contracted)


def _attention_flops(one: Instruction, computation: Computation) -> float:
    """Two products of the queries' size with the keys, five in the backward pass."""
    q, k = (computation[name].shapes[0][1] for name in one.operands[:2])
    length = max(k[1:3]) if k[1] != q[1] else k[1]
    return (5 if "Backward" in one.rest else 2) * 2 * math.prod(q) * length


def moved_bytes(one: Instruction, computation: Computation, program: Program) -> int:
    """Bytes that a kernel reads and writes; of what it slices, the slice alone."""
    if one.op in ("dynamic-slice", "slice", "gather"):
        return 2 * one.bytes
    if one.op == "dynamic-update-slice":
        return 2 * computation[one.operands[1]].bytes
    if one.op != "fusion":
        operands = sum(computation[name].bytes for name in one.operands if name in computation)
        # The second result of a library's kernel is its workspace.
        return operands + (size_of(one.shapes[0]) if one.op == "custom-call" else one.bytes)
    inner = program.computations.get(one.called[0], {})
    return _read_by_fusion(inner) + _written_by_fusion(inner)


def _read_by_fusion(inner: Computation) -> int:
    total = 0
    for parameter in (x for x in inner.values() if x.op == "parameter"):
        users = [x for x in inner.values() if parameter.name in x.operands]
        sliced = [_part_of(x, parameter.name, inner) for x in users]
        whole = any(part is None for part in sliced) or not users
        total += parameter.bytes if whole else sum(part or 0 for part in sliced)
    return total


def _part_of(user: Instruction, name: str, inner: Computation) -> int | None:
    """Bytes that `user` reads of a parameter; None for all."""
    first = user.operands[0] == name
    if user.op in ("dynamic-slice", "slice", "gather") and first:
        return user.bytes
    if user.op == "dynamic-update-slice" and first:
        return 0  # written in place
    if user.op == "bitcast":
        deeper = [x for x in inner.values() if user.name in x.operands]
        parts = [_part_of(x, user.name, inner) for x in deeper]
        return None if not parts or None in parts else sum(part or 0 for part in parts)
    return None


def _written_by_fusion(inner: Computation) -> int:
    root = next(x for x in inner.values() if x.root)
    outputs = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    return sum(_written(x, inner) for x in outputs)


def _written(one: Instruction, inner: Computation) -> int:
    if one.op == "dynamic-update-slice":
        return inner[one.operands[1]].bytes
    if one.op == "bitcast" and one.operands[0] in inner:
        return _written(inner[one.operands[0]], inner)
    return one.bytes


def big_gathers(program: Program, elements: int) -> int:
    """How many gathers give more than `elements` elements by single ones, wherever they are."""
    return sum(
        one.op == "gather" and _single(one) and math.prod(one.shapes[0][1]) > elements
        for computation in program.computations.values()
        for one in computation.values()
    )


def _single(one: Instruction) -> bool:
    sizes = re.search(r"slice_sizes=\{([\d,]*)\}", one.rest)
    return bool(sizes) and set(sizes[1].split(",")) == {"1"}


def wide_float32_products(program: Program, width: int, rank: int = 24) -> list[str]:
    """Origins of products that leave float32 activations of `width` in memory.

    Gradients of adapters are float32 and have an axis of up to `rank`.
    """
    found = []
    for one, computation, _, _ in program.kernels():
        if not flops_of(one, computation, program):
            continue
        for dtype, sizes in one.shapes:
            wide = [size for size in sizes if size > 1]
            if dtype == "f32" and len(wide) > 1 and width in wide and min(wide) > rank:
                found.append(one.origin)
    return found


def weight_copies(program: Program, widths: frozenset[int]) -> tuple[int, int]:
    """Bytes per run of the copies of weights: of one layer's slice, and of more than that.

    A copy is a kernel without a product that writes an array with two axes of `widths`.
    """
    slices = wider = 0
    for one, computation, turns, _ in program.kernels():
        if one.op in FREE or flops_of(one, computation, program):
            continue
        for dtype, sizes in one.shapes:
            wide = [size for size in sizes if size > 1]
            if dtype not in ("bf16", "s8", "u8") or len(wide) != 2 or max(wide) < min(widths):
                continue
            a, b = wide
            if {a, b} <= widths:
                slices += turns * size_of((dtype, sizes))
            elif (a in widths and _joined(b, widths)) or (b in widths and _joined(a, widths)):
                wider += turns * size_of((dtype, sizes))
    return slices, wider


def _joined(size: int, widths: frozenset[int], ranks: int = 64) -> bool:
    """Whether a size is that of several weights, or of a weight and adapters, side by side."""
    return any(0 < size - n * width <= ranks for width in widths for n in (1, 2, 3)) or any(
        size == n * width for width in widths for n in (2, 3)
    )
