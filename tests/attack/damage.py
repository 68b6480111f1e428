"""Changes of files: of bytes at random, and of the content of JSON, YAML and CSV files."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = 10**23
_REMOVED = object()
JSON_VALUES: dict[str, Any] = {
    "removed": _REMOVED,
    "null": None,
    "list": [],
    "list of text": ["x"],
    "text": "x",
    "number": -1,
    "huge": HUGE,
    "true": True,
    "object": {},
    "NaN": float("nan"),
    "infinite": float("inf"),
}
MAX_KEY_DEPTH = 4


@dataclass(frozen=True)
class Damage:
    """One change of a file."""

    name: str
    data: bytes


def iterate_damages(path: Path) -> Iterator[Damage]:
    """Yield all changes of a file."""
    data = path.read_bytes()
    yield from iterate_byte_damages(data)
    if path.suffix == ".json":
        yield from iterate_json_damages(json.loads(data))
    elif path.suffix == ".yaml":
        yield from iterate_yaml_damages(data.decode())
    elif path.suffix == ".csv":
        yield from iterate_csv_damages(data.decode())


def iterate_byte_damages(data: bytes) -> Iterator[Damage]:
    """Yield changes that apply to every file."""
    yield Damage("empty", b"")
    for share in (0.3, 0.6, 0.97):
        yield Damage(f"cut at {share}", data[: int(len(data) * share)])
    middle = len(data) // 2
    yield Damage("not UTF-8", data[:middle] + b"\xff\xfe" + data[middle:])
    yield Damage("NUL", data[:middle] + b"\0" + data[middle:])
    yield Damage("twice", data + data)
    yield Damage("pickle", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}.")


def iterate_json_damages(content: Any) -> Iterator[Damage]:
    """Yield changes of a JSON object: each key with each value of `JSON_VALUES`, and hostile documents."""
    yield Damage("a list", b"[]")
    yield Damage("an empty object", b"{}")
    yield Damage("NaN", b"NaN")
    yield Damage("deep", b"[" * 100_000 + b"]" * 100_000)
    yield Damage("deep object", b'{"a":' * 5000 + b"1" + b"}" * 5000)
    for place in iterate_places(content, MAX_KEY_DEPTH):
        for name, value in JSON_VALUES.items():
            changed = copy.deepcopy(content)
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            if value is _REMOVED:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            yield Damage(f"{'.'.join(map(str, place))} {name}", json.dumps(changed, indent=1).encode())


def iterate_places(content: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all values, of a list only the first item."""
    if depth and isinstance(content, dict):
        for key, value in content.items():
            yield (key,)
            yield from ((key, *rest) for rest in iterate_places(value, depth - 1))
    elif depth and isinstance(content, list) and content:
        yield (0,)
        yield from ((0, *rest) for rest in iterate_places(content[0], depth - 1))


def iterate_yaml_damages(text: str) -> Iterator[Damage]:
    """Yield hostile YAML documents, and changes of each line."""
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]\n"
    yield Damage("alias bomb", bomb.encode())
    yield Damage("alias bomb in a section", (text + "\n" + bomb.replace("\n", "\n").replace("a: ", "zz: ", 1)).encode())
    yield Damage("recursive", b"encoder: &x {name: *x}\n")
    yield Damage("deep", b"[" * 5000 + b"]" * 5000)
    yield Damage("20 MB scalar", b"name: " + b"x" * 20_000_000)
    yield Damage("many keys", "\n".join(f"k{n}: 1" for n in range(50_000)).encode())
    yield Damage("tag", b"!!python/object/apply:os.system ['true']\n")
    yield Damage("date", text.encode() + b"\nname2: 2020-13-45\n")
    yield Damage("keys", b"{1: 2, null: 3, [1]: 4}\n")
    yield Damage("duplicate key", text.encode() + b"\n" + text.splitlines()[0].encode() + b"\n")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key, colon, _ = line.partition(":")
        if not colon or line.startswith((" ", "-", "#")):
            continue
        for name, value in {
            **dict.fromkeys(("x", "-1", "0", "[]", "{}", "null", ".nan", ".inf", "1e300", "[1, 1]", "'1'"), ""),
            "huge": str(HUGE),
            "long": "x" * 10_000,
        }.items():
            changed = [*lines[:number], f"{key}: {value or name}", *lines[number + 1 :]]
            yield Damage(f"{key}={name}", "\n".join(changed).encode())


def iterate_csv_damages(text: str) -> Iterator[Damage]:
    """Yield changes of a table: each column removed, renamed or repeated, each cell of one row replaced."""
    rows = [line.split(",") for line in text.splitlines()]

    def join(changed: Sequence[Sequence[str]]) -> bytes:
        return ("\n".join(",".join(row) for row in changed) + "\n").encode()

    yield Damage("header only", join(rows[:1]))
    yield Damage("row cut", join([*rows[:-1], rows[-1][:-1]]))
    yield Damage("row longer", join([*rows[:-1], [*rows[-1], "x"]]))
    yield Damage("quote", join([*rows[:-1], ['"' + rows[-1][0], *rows[-1][1:]]]))
    yield Damage("long cell", join([*rows[:-1], ["x" * 200_000, *rows[-1][1:]]]))
    for column in range(len(rows[0])):
        yield Damage(f"column {column} removed", join([[*row[:column], *row[column + 1 :]] for row in rows]))
        yield Damage(f"column {column} renamed", join([[*rows[0][:column], "x", *rows[0][column + 1 :]], *rows[1:]]))
        for cell in ("", "x", "nan", "-1", "1e999", "'=1", str(HUGE)):
            changed = [*rows[:-1], [*rows[-1][:column], cell, *rows[-1][column + 1 :]]]
            yield Damage(f"cell {column} {cell[:6]!r}", join(changed))


def update_checksums(folder: Path, file: Path) -> None:
    """Update `SHA256SUMS` of an unsigned package, as an attacker would after a change."""
    sums = folder / "SHA256SUMS"
    name, digest = file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {name}")]
    sums.write_text("\n".join([*lines, f"{digest}  {name}"]) + "\n")


@dataclass(frozen=True)
class RandomDamage(Damage):
    """A change at random.

    Attributes:
        start: first changed byte.
    """

    start: int


def draw_damage(data: bytes, draw: random.Random) -> RandomDamage:
    """Truncate a file, flip bits of it, or insert, remove, repeat or overwrite a block."""
    change = draw.choice(_RANDOM_CHANGES)
    changed, start = change(data, draw)
    name = change.__name__.strip("_").replace("_", " ")
    return RandomDamage(f"{name} at {start} of {len(data)}", changed, start)


def _truncate(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    start = draw.randrange(len(data))
    return data[:start], start


def _flip_one_bit(data: bytes, draw: random.Random, places: Sequence[int] = ()) -> tuple[bytes, int]:
    changed = bytearray(data)
    places = places or [draw.randrange(len(data))]
    for place in places:
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed), min(places)


def _flip_bits(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    return _flip_one_bit(data, draw, [draw.randrange(len(data)) for _ in range(draw.randint(2, 16))])


def _flip_bit_of_the_header(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    return _flip_one_bit(data, draw, [draw.randrange(min(len(data), 400))])


def _insert_a_block(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    start = draw.randrange(len(data))
    return data[:start] + draw.randbytes(draw.randint(1, 64)) + data[start:], start


def _remove_a_block(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 64) :], start


def _repeat_a_block(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    start = draw.randrange(len(data))
    length = draw.randint(1, 512)
    return data[: start + length] + data[start:], start


def _overwrite_a_block(data: bytes, draw: random.Random) -> tuple[bytes, int]:
    start = draw.randrange(len(data))
    length = min(draw.randint(2, 512), len(data) - start)
    block = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    return data[:start] + block + data[start + length :], start


_RANDOM_CHANGES = (
    *(_truncate, _flip_one_bit, _flip_bits, _flip_bit_of_the_header),
    *(_insert_a_block, _remove_a_block, _repeat_a_block, _overwrite_a_block),
)
