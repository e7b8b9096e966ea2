"""Instructions on the numbers of each thread by itself, after the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .instructions import TYPES, elementwise, handles, reader, type_of
from .machine import Machine, Step
from .memory import UNSIGNED, Array
from .parser import Instruction, Kernel

HALVES = ("f16", "bf16")  # kept as their bits


def divide(a: Array, b: Array) -> Array:
    return (a - np.fmod(a, b)) // b  # towards zero


SAME_TYPE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": divide,
    "rem": np.fmod,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "min": np.fmin,  # of a number and NaN, the number
    "max": np.fmax,
}


@handles("add", "sub", "and", "or", "xor", "neg", "abs", "not", "min", "max", "div", "rem")
def arithmetic(instruction: Instruction, kernel: Kernel) -> Step:
    name, *modifiers, _ = instruction.opcode
    kind = type_of(instruction)
    if set(modifiers) - {"rn"} or (name in ("div", "rem") and kind.kind == "f"):
        raise instruction.error("this form is not known to the interpreter")
    sources = len(instruction.operands) - 1
    return elementwise(instruction, kernel, SAME_TYPE[name], [kind] * sources, kind)


@handles("shl", "shr")
def shift(instruction: Instruction, kernel: Kernel) -> Step:
    """By any amount: numpy, as PTX, gives 0 or all signs where it exceeds the width."""
    kind = type_of(instruction)
    function = np.left_shift if instruction.opcode[0] == "shl" else np.right_shift
    return elementwise(instruction, kernel, lambda a, by: function(a, by.astype(kind)), [kind, TYPES["u32"]], kind)


@handles("mul", "mad", "fma")
def multiply(instruction: Instruction, kernel: Kernel) -> Step:
    name, *modifiers, _ = instruction.opcode
    kind = type_of(instruction)
    form = tuple(each for each in modifiers if each != "rn")
    if kind == np.float32 and not form:
        # Exact in double precision but for the last addition, which rounds twice: once in 2^29 times, to the other side.
        function = np.multiply if name == "mul" else lambda a, b, c: a.astype(np.float64) * b + c
        return elementwise(instruction, kernel, function, [kind] * (2 if name == "mul" else 3), kind)
    if kind.kind == "f" or name == "fma" or form not in (("lo",), ("wide",), ("hi",)):
        raise instruction.error("this form is not known to the interpreter")
    bits = 8 * kind.itemsize
    # Of twice the width, for which numpy has a type but for 128 bits; these occur only where the upper half is wanted.
    wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if bits < 64 else np.dtype(object if form == ("hi",) else kind)
    result = wide if form == ("wide",) else kind

    def product(a: Array, b: Array, c: Array | None = None) -> Array:
        exact = a.astype(wide) * b.astype(wide)
        if form == ("hi",):
            exact = exact >> bits
        exact = np.asarray(exact).astype(result)
        return exact if c is None else exact + c

    return elementwise(instruction, kernel, product, [kind, kind] + [result] * (name == "mad"), result)


def leading_zeros(values: Array) -> Array:
    return 32 - np.frexp(values.astype(np.float64))[1]  # a number's exponent is how many bits it takes


def reverse_bits(values: Array) -> Array:
    places = np.arange(32, dtype=np.uint32)
    return ((values[..., None] >> places & np.uint32(1)) << places[::-1]).sum(axis=-1)


COUNTED = {"clz": leading_zeros, "brev": reverse_bits, "popc": np.bitwise_count}


@handles(*COUNTED)
def count_bits(instruction: Instruction, kernel: Kernel) -> Step:
    if type_of(instruction) != TYPES["b32"]:
        raise instruction.error("this form is not known to the interpreter")
    return elementwise(instruction, kernel, COUNTED[instruction.opcode[0]], [TYPES["b32"]], TYPES["b32"])


@handles("bfi")
def insert_bits(instruction: Instruction, kernel: Kernel) -> Step:
    """d = b with `length` bits of a from `position` on."""
    kind = type_of(instruction)

    def function(a: Array, b: Array, position: Array, length: Array) -> Array:
        ones = np.where(
            length >= 8 * kind.itemsize, ~kind.type(0), (kind.type(1) << length.astype(kind)) - kind.type(1)
        )
        mask = ones.astype(kind) << position.astype(kind)
        return (b & ~mask) | (a << position.astype(kind) & mask)

    return elementwise(instruction, kernel, function, [kind, kind, TYPES["u32"], TYPES["u32"]], kind)


def flushed(values: Array) -> Array:
    """Numbers too small to be normal become 0, with their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


APPROXIMATED = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@handles(*APPROXIMATED)
def approximated(instruction: Instruction, kernel: Kernel) -> Step:
    """Rounded correctly here; on the device ex2 and lg2 are wrong by about 2 in the last place."""
    name, *modifiers, _ = instruction.opcode
    kind = type_of(instruction)
    if modifiers not in (["approx", "ftz"], ["approx"], ["rn"]) or kind != np.float32:
        raise instruction.error("this form is not known to the interpreter")
    flush = flushed if "ftz" in modifiers else (lambda values: values)
    function = APPROXIMATED[name]
    return elementwise(instruction, kernel, lambda x: flush(function(flush(x))), [kind], kind)


# ---- comparisons and choices ----

COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),  # false where one is NaN, as all comparisons but those with u
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


@handles("setp")
def set_predicate(instruction: Instruction, kernel: Kernel) -> Step:
    comparison, *more = instruction.opcode[1:-1]
    if comparison not in COMPARED or set(more) - {"ftz"}:
        raise instruction.error("this comparison is not known to the interpreter")
    return elementwise(instruction, kernel, COMPARED[comparison], [type_of(instruction)] * 2, TYPES["pred"])


@handles("selp")
def select(instruction: Instruction, kernel: Kernel) -> Step:
    kind = type_of(instruction)
    return elementwise(instruction, kernel, lambda a, b, p: np.where(p, a, b), [kind, kind, TYPES["pred"]], kind)


# ---- moves and conversions ----


@handles("mov")
def move(instruction: Instruction, kernel: Kernel) -> Step:
    """Also of two or four registers to one, low bits first, and back."""
    kind = type_of(instruction)
    destination, source = instruction.operands
    if isinstance(source, tuple):
        part = UNSIGNED[kind.itemsize // len(source)]
        readers = [reader(each, part, instruction, kernel) for each in source]

        def join(machine: Machine) -> None:
            parts = [np.broadcast_to(read(machine), machine.size()) for read in readers]
            machine.write(destination, np.stack(parts, axis=-1).view(kind)[:, 0])

        return join
    if isinstance(destination, tuple):
        part = UNSIGNED[kind.itemsize // len(destination)]
        read = reader(source, kind, instruction, kernel)

        def split(machine: Machine) -> None:
            parts = np.ascontiguousarray(np.broadcast_to(read(machine), machine.size())).view(part)
            parts = parts.reshape(-1, len(destination))
            for i, name in enumerate(destination):
                machine.write(name, parts[:, i])

        return split
    return elementwise(instruction, kernel, lambda a: a, [kind], kind)


def to_half(values: Array, kind: str) -> Array:
    """The bits of float32 numbers rounded to the nearest element, ties to even."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_half(bits: Array, kind: str) -> Array:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@handles("cvt")
def convert(instruction: Instruction, kernel: Kernel) -> Step:
    *modifiers, to, source = instruction.opcode[1:]
    bits = TYPES["b16"]
    if source == "f32" and to in ("f16x2", "bf16x2") and modifiers == ["rn"]:  # the first source is the upper half

        def pack(high: Array, low: Array) -> Array:
            low_bits, high_bits = (to_half(values, to[:-2]).astype(np.uint32) for values in (low, high))
            return low_bits | high_bits << np.uint32(16)

        return elementwise(instruction, kernel, pack, [TYPES["f32"]] * 2, TYPES["b32"])
    if source == "f32" and to in HALVES and modifiers == ["rn"]:
        return elementwise(instruction, kernel, lambda x: to_half(x, to), [TYPES["f32"]], bits)
    if source in HALVES and to == "f32" and not modifiers:
        return elementwise(instruction, kernel, lambda x: from_half(x, source), [bits], TYPES["f32"])
    from_type, to_type = type_of(instruction), type_of(instruction, -2)
    if (from_type.kind != "f" and to_type.kind != "f" and not modifiers) or (
        from_type.kind != "f" and to_type == np.float32 and modifiers == ["rn"]
    ):
        return elementwise(instruction, kernel, lambda x: x.astype(to_type), [from_type], to_type)
    raise instruction.error("this conversion is not known to the interpreter")


@handles("cvta")
def convert_address(instruction: Instruction, kernel: Kernel) -> Step:
    """Global addresses are what they are everywhere."""
    if "global" not in instruction.opcode:
        raise instruction.error("only global addresses are known to the interpreter")
    return elementwise(instruction, kernel, lambda a: a, [TYPES["u64"]], TYPES["u64"])
