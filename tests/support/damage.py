"""Damaged files, made of honest ones. Nothing here is a test."""

import random
import re
from collections.abc import Callable, Iterator

NUMBERS = (b'0', b'1', b'7', b'-1', b'99999999999', b'1e9', b'null', b'"x"')
NUMBER = re.compile(rb'-?\d+(?:\.\d+)?')


def flip(data: bytearray, dice: random.Random) -> None:
    """Some bits, all over the file or close together."""
    start = dice.randrange(len(data))
    span = dice.choice((1, 16, len(data)))
    for _ in range(dice.choice((1, 3, 20))):
        place = (start + dice.randrange(span)) % len(data)
        data[place] ^= 1 << dice.randrange(8)


def cut(data: bytearray, dice: random.Random) -> None:
    """All from some byte on."""
    del data[dice.randrange(len(data)) :]


def drop(data: bytearray, dice: random.Random) -> None:
    """A few bytes in the middle."""
    start = dice.randrange(len(data))
    del data[start : start + dice.randrange(1, 64)]


def blank(data: bytearray, dice: random.Random) -> None:
    """A block, as after a power cut."""
    start = dice.randrange(len(data))
    end = min(len(data), start + dice.choice((8, 512, 4096)))
    data[start:end] = bytes(end - start)


def repeat(data: bytearray, dice: random.Random) -> None:
    """A span comes twice."""
    start = dice.randrange(len(data))
    data[start:start] = data[start : start + dice.randrange(1, 256)]


def swap(data: bytearray, dice: random.Random) -> None:
    """Two spans change places."""
    size = dice.randrange(1, 64)
    a, b = (dice.randrange(max(1, len(data) - size)) for _ in range(2))
    if abs(a - b) >= size:
        data[a : a + size], data[b : b + size] = (
            data[b : b + size],
            data[a : a + size],
        )


def renumber(data: bytearray, dice: random.Random) -> None:
    """A number that is written as text; the length may stay."""
    found = list(NUMBER.finditer(bytes(data[: 2**18])))
    if not found:
        return flip(data, dice)
    match, new = dice.choice(found), dice.choice(NUMBERS)
    if dice.random() < 0.5:
        new = new[: len(match[0])].ljust(len(match[0]))
    data[match.start() : match.end()] = new


KINDS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip, cut, drop, blank, repeat, swap, renumber,
)  # fmt: skip


def damaged(
    honest: bytes, cases: int, seed: int = 0
) -> Iterator[tuple[str, bytes]]:
    """The name of a kind of damage, and the file with one or two of them."""
    dice = random.Random(seed)
    for _ in range(cases):
        data, names = bytearray(honest), []
        for kind in dice.choices(KINDS, k=dice.choice((1, 1, 2))):
            if data:
                kind(data, dice)
                names.append(kind.__name__)
        yield ' and '.join(names), bytes(data)
