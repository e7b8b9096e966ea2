"""Memory of a running kernel: bytes, and which of them have been written.

A second array holds 0xff for every byte that was written and 0 for every other. Seen as numbers of the size of an access
it is all ones exactly if the access is allowed, at the same index as the value itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
POISON = 0xFF  # of floats, this makes NaN


class Fault(Exception):
    """An access that must not be; `index` says which of those made together."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


def check(allowed: Array, message: str) -> None:
    """Raises Fault for the first that is not allowed."""
    if not allowed.all():
        raise Fault(message, int(np.flatnonzero(~allowed)[0]))


class Memory:
    """Bytes at offsets 0 .. size - 1."""

    def __init__(self, size: int) -> None:
        size = -(-size // 16) * 16
        self._bytes = np.full(size, POISON, np.uint8)
        self._written = np.zeros(size, np.uint8)

    def load(self, offsets: Array, size: int) -> Array:
        """Numbers of 1, 2, 4 or 8 bytes at multiples of that."""
        index, kind = offsets // size, UNSIGNED[size]
        written = self._written.view(kind)[index] == np.iinfo(kind).max
        if not written.all():
            raise Fault("reads what nobody wrote, or a copy in flight", int(np.argwhere(~written)[0][0]))
        return self._bytes.view(kind)[index]

    def store(self, offsets: Array, values: Array) -> None:
        """Unsigned numbers; where several go to one place, one of them stays."""
        size = values.dtype.itemsize
        self._bytes.view(values.dtype)[offsets // size] = values
        self._written.view(values.dtype)[offsets // size] = np.iinfo(values.dtype).max

    def forget(self, offsets: Array, size: int) -> None:
        """What is there may not be read until it is written again."""
        self._written.view(UNSIGNED[size])[offsets // size] = 0

    def add(self, offsets: Array, values: Array) -> None:
        """Adds numbers of any type to those in memory, each of them, also where several go to one place."""
        size = values.dtype.itemsize
        self.load(offsets, size)
        np.add.at(self._bytes.view(values.dtype), offsets // size, values)


class Shared(Memory):
    """The shared memory of many blocks, one after the other."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self._pitch = -(-size // 128) * 128
        super().__init__(blocks * self._pitch)

    def locate(self, addresses: Array, blocks: Array, size: int) -> Array:
        """Offsets of accesses of `size` bytes by threads of those blocks."""
        addresses = addresses.astype(np.int64)
        check(addresses % size == 0, f"{size}-byte access misaligned")
        check(addresses + size <= self.size, f"outside of the {self.size} bytes of shared memory")
        return blocks * self._pitch + addresses


@dataclass
class Buffer:
    """A piece of the host's memory that kernels may touch."""

    name: str
    address: int
    size: int
    writable: bool
    start: int = 0  # offset in Global

    def bytes(self) -> Array:
        return np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.address), np.uint8)


class Global(Memory):
    """A copy of all buffers, found by the addresses that they have on the host."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = sorted((buffer for buffer in buffers if buffer.size), key=lambda buffer: buffer.address)
        size = 0
        for buffer in self.buffers:
            buffer.start = -(-size // 16) * 16 + buffer.address % 16
            size = buffer.start + buffer.size
        super().__init__(size)
        self._begin = np.array([buffer.address for buffer in self.buffers], np.int64)
        self._end = self._begin + [buffer.size for buffer in self.buffers]
        self._shift = np.array([buffer.start for buffer in self.buffers], np.int64) - self._begin
        self._writable = np.array([buffer.writable for buffer in self.buffers])
        for buffer in self.buffers:
            if not buffer.writable:
                self.set_written(buffer.address, buffer.size)

    def set_written(self, address: int, size: int) -> None:
        """The host has written there."""
        start = int(self.locate(np.array([address]), 1)[0])
        self._written[start : start + size] = 0xFF

    def fetch(self) -> None:
        """Takes over what the buffers hold."""
        for buffer in self.buffers:
            self._bytes[buffer.start : buffer.start + buffer.size] = buffer.bytes()

    def give_back(self) -> None:
        """Puts results where the host sees them."""
        for buffer in self.buffers:
            if buffer.writable:
                buffer.bytes()[:] = self._bytes[buffer.start : buffer.start + buffer.size]

    def locate(self, addresses: Array, size: int, write: bool = False) -> Array:
        """Offsets of accesses of `size` bytes."""
        addresses = addresses.astype(np.int64)
        check(addresses % size == 0, f"{size}-byte access misaligned")
        index = np.maximum(np.searchsorted(self._begin, addresses, side="right") - 1, 0)
        inside = (addresses >= self._begin[index]) & (addresses + size <= self._end[index])
        check(inside, "outside of all buffers")
        if write:
            check(self._writable[index], "writes to a buffer that is only read")
        return addresses + self._shift[index]
