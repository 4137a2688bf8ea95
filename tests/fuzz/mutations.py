"""Ways to break a file, drawn from a seeded random generator. Each returns what it did, for the report.

what = mutate(path, random.Random("7/312"))      # 'config.json: hidden_size = -1'
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**63, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "x", "4", "null", "a" * 5000, "\x1b[31mred", "\u202eright", "\ud800", "\0", "../..",
    "/dev/zero", [], {}, [1], [[]], ["x", 2], {"x": 1}, [0] * 300, "{{ 1/0 }}", "{% for i in range(9) %}",
]  # fmt: skip
"""Values that are wrong in most places, and right in some."""

CHARACTERS = [
    "\0",
    "\x1b",
    "\u2028",
    "\x85",
    "\f",
    "\ufeff",
    "\ud7ff",
    "\U0010ffff",
    "\n",
    "{",
    "}",
    '"',
    "&a",
    "*a",
    ":",
]


def mutate(path: Path, rng: random.Random) -> str:
    """Break one file in one to three ways, as its kind allows; now and then its place in the file system."""
    if rng.random() < 0.06:
        return f"{path.name}: {_replace_file(path, rng)}"
    kinds: dict[str, list[Callable[[bytes, random.Random], tuple[bytes, str]]]] = {
        ".json": [_json, _json, _json, _bytes],
        ".jsonl": [_jsonl, _jsonl, _jsonl, _bytes, _text],
        ".yaml": [_yaml, _yaml, _yaml, _text, _bytes],
        ".safetensors": [_header, _header, _values, _bytes],
        ".jinja": [_text, _bytes],
    }
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data, what = rng.choice(kinds.get(path.suffix, [_bytes]))(path.read_bytes(), rng)
        path.unlink()  # it may be a hard link
        path.write_bytes(data)
        done.append(what)
    return f"{path.name}: {'; '.join(done)}"


def _replace_file(path: Path, rng: random.Random) -> str:
    how = rng.choice(("gone", "empty", "directory", "pipe", "link to itself", "device", "dangling link", "unreadable"))
    if how == "unreadable":
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        path.chmod(0)
        return how
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "dangling link":
        path.symlink_to("nowhere")
    return how


def _bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flip, cut, repeat or insert anywhere."""
    raw, at = bytearray(data), rng.randrange(len(data) + 1)
    how = rng.choice(("flip", "flip", "cut", "drop", "repeat", "insert", "zeros"))
    if how == "flip" and at < len(raw):
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[at:]
    elif how == "drop":
        del raw[at : at + rng.randrange(1, 40)]
    elif how == "repeat":
        raw[at:at] = raw[max(0, at - rng.randrange(1, 200)) : at]
    elif how == "insert":
        raw[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif how == "zeros":
        raw[at : at + 16] = bytes(16)
    return bytes(raw), f"{how} at byte {at}"


def _text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    text = data.decode("utf-8", "replace")
    at, what = rng.randrange(len(text) + 1), rng.choice(CHARACTERS)
    return (text[:at] + what + text[at:]).encode("utf-8", "surrogatepass"), f"{what!r} at character {at}"


def _json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    value, what = change(value, rng)
    return json.dumps(value).encode(), what


def change(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Another value somewhere in a JSON value: replaced, gone, added, renamed or nested too deep."""
    places = list(_places(value, ()))
    if not places:
        return rng.choice(NASTY), "all replaced"
    *path, last = rng.choice(places)
    holder = value
    for key in path:
        holder = holder[key]
    name = ".".join(map(str, (*path, last)))[-80:]
    how = rng.choice(
        ("replace", "replace", "replace", "replace", "delete", "add", "rename", "nest", "nearby", "nearby")
    )
    if how == "delete":
        del holder[last]
        return value, f"{name} deleted"
    if how == "add" and isinstance(holder, dict):
        key = rng.choice(("x", "auto_map", "exit_dim", "architecture", "rope_scaling", "__metadata__", "eos_token_id"))
        holder[key] = rng.choice(NASTY)
        return value, f"{key} = {holder[key]!r:.60} added"
    if how == "rename" and isinstance(holder, dict):
        holder[str(last) + "x"] = holder.pop(last)
        return value, f"{name} renamed"
    if how == "nearby" and type(holder[last]) in (int, float):
        holder[last] = rng.choice(
            (holder[last] + 1, holder[last] - 1, holder[last] * 2, holder[last] // 2, -holder[last])
        )
        return value, f"{name} = {holder[last]}"
    holder[last] = rng.choice(NASTY) if how != "nest" else _deep(rng.choice((20, 3000)))
    return value, f"{name} = {holder[last]!r:.60}"


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(min(levels, 400)):
        value = [value]
    return value


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    """Paths to everything inside; long lists and large maps (a vocabulary) are sampled."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 200 else items[:: len(items) // 20]:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _jsonl(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = data.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    try:
        value, what = change(json.loads(lines[at]), rng)
    except ValueError:
        return _text(data, rng)
    lines[at] = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"line {at + 1}: {what}"


def _yaml(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    import yaml

    try:
        value = yaml.safe_load(data.decode("utf-8", "replace"))
        value, what = change(value, rng)
        return json.dumps(value).encode(), what  # JSON is YAML
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return _text(data, rng)


def _split(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data of a safetensors file that is still one."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, RecursionError, OverflowError, MemoryError):
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) and length < len(data) else None


def _header(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Another header over the same data: entries changed, swapped, gone, or the length wrong."""
    parts = _split(data)
    if parts is None:
        return _bytes(data, rng)
    header, body = parts
    names, how = (
        [n for n in header if n != "__metadata__"],
        rng.choice(("change", "change", "swap", "metadata", "length")),
    )
    what = how
    if how == "change":
        header, what = change(header, rng)
    elif how == "swap" and len(names) > 1:
        a, b = rng.sample(names, 2)
        header[a], header[b] = header[b], header[a]
        what = f"{a} and {b} swapped"
    elif how == "metadata":
        header["__metadata__"] = rng.choice(NASTY)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = rng.choice((0, 1, 2**63, 10**8, len(text) + 8, 2**64 - 1)) if how == "length" else len(text)
    return struct.pack("<Q", length) + text + body, what


def _values(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Values that are no numbers, huge or zero, where a tensor's data is."""
    parts = _split(data)
    if parts is None or not parts[1]:
        return _bytes(data, rng)
    start = len(data) - len(parts[1])
    raw, at = bytearray(data), start + rng.randrange(len(parts[1])) // 4 * 4
    raw[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x80\x7f\x80\x7f", b"\x00\x7f\x00\x7f", bytes(4)))[
        : len(raw) - at
    ]
    return bytes(raw), f"value at byte {at}"
