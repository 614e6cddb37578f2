"""Damaged copies of a good save, of every kind, made from the save itself."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CONTROL = "\x1b]0;owned\x07\r\n"
DEEP = "[" * 100_000
# Values for a config key, as JSON text; those of the good value's own type are left out.
VALUES = {
    "text": '"x"',
    "false as text": '"false"',
    "control": json.dumps(CONTROL * 40),
    "int": "3",
    "one": "1",
    "true": "true",
    "float": "1.5",
    "huge int": "1" + "0" * 400,
    "longer int": "1" * 5000,
    "huge float": "1e400",
    "nan": "NaN",
    "infinity": "-Infinity",
    "list": "[]",
    "list of int": "[1]",
    "object": "{}",
    "object of text": '{"a": "b"}',
    "deep": "[" * 200 + "]" * 200,
    "long": json.dumps("y" * 50_000),
}
NEVER_VALID = ("huge int", "longer int", "huge float", "nan", "infinity", "deep")
PATTERNS = [
    "(a+)+",
    "(a|aa)*$",
    "(|)" * 40,
    ".*" * 12 + "x",
    "(",
    "a{99999999999}",
    "(" * 400,
]


class Damage(NamedTuple):
    name: str
    spoil: Callable[[Path], None]


def damages(good: Path, seed: int, each_key: int = 2) -> Iterator[Damage]:
    """Damages of all files of the save in ``good``; ``each_key`` values for each config key."""
    draw = random.Random(seed)
    for file in sorted(path.name for path in good.iterdir()):
        data = (good / file).read_bytes()
        yield from of_any_file(file, data)
        if file.endswith(".json"):
            yield from of_json(file, json.loads(data), draw, each_key)
        else:
            yield from of_safetensors(file, data, draw)


def copied(good: Path, target: Path, damage: Damage) -> Path:
    shutil.copytree(good, target)
    damage.spoil(target)
    return target


def writes(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda where: (where / file).write_bytes(data) and None


def of_any_file(file: str, data: bytes) -> Iterator[Damage]:
    for size in sorted({0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 1}):
        yield Damage(f"{file} cut to {size}", writes(file, data[:size]))
    yield Damage(f"{file} longer", writes(file, data + b"\0more"))
    yield Damage(f"{file} of zeros", writes(file, bytes(len(data))))

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def spoil(where: Path) -> None:
            (where / file).unlink()
            make(where / file)

        return spoil

    yield Damage(f"{file} missing", instead(lambda path: None))
    yield Damage(f"{file} a directory", instead(Path.mkdir))
    yield Damage(f"{file} a FIFO", instead(os.mkfifo))
    yield Damage(f"{file} a link to itself", instead(lambda path: path.symlink_to(path)))
    yield Damage(f"{file} a dangling link", instead(lambda path: path.symlink_to("nowhere")))
    yield Damage(f"{file} a device", instead(lambda path: path.symlink_to("/dev/zero")))


def of_json(
    file: str, config: dict[str, Any], draw: random.Random, each_key: int
) -> Iterator[Damage]:
    """Raw text, so that keys can appear twice and numbers be no numbers."""
    pairs = {json.dumps(key): json.dumps(value) for key, value in config.items()}

    def text(changed: dict[str, str], more: str = "") -> bytes:
        inside = ", ".join(f"{k}: {v}" for k, v in {**pairs, **changed}.items())
        return ("{" + inside + more + "}").encode()

    for key, value in pairs.items():
        names = [name for name in VALUES if not same_type(VALUES[name], value)]
        if value == "null":  # whose other type is not known here
            names = [*NEVER_VALID, "true", "object"]
        chosen = draw.sample(names, min(each_key, len(names)))
        for name in dict.fromkeys([*chosen, draw.choice(NEVER_VALID)]):
            yield Damage(f"{file} {key} {name}", writes(file, text({key: VALUES[name]})))
    for key in draw.sample(list(pairs), min(4, len(pairs))):
        yield Damage(f"{file} {key} twice", writes(file, text({}, f", {key}: {pairs[key]}")))
    for key in ('"rank_pattern"', '"alpha_pattern"', '"target_modules"', '"live_modules"'):
        for pattern in PATTERNS if key in pairs else ():
            value = json.dumps({pattern: 2} if "_pattern" in key else pattern)
            if key != '"target_modules"':  # which files of adapters need not have
                yield Damage(f"{file} {key} {pattern[:20]}", writes(file, text({key: value})))
    yield Damage(f"{file} deep", writes(file, b'{"a": ' + DEEP.encode()))
    yield Damage(f"{file} deep and closed", writes(file, (DEEP + "]" * 100_000).encode()))
    yield Damage(f"{file} long", writes(file, b" " * 5_000_000 + b"{}"))
    yield Damage(f"{file} no UTF-8", writes(file, b'{"r": "\xff"}'))
    yield Damage(f"{file} a list", writes(file, b"[1]"))
    odd = json.dumps("use_" + CONTROL)
    yield Damage(f"{file} odd key", writes(file, text({odd: "true"})))


def same_type(text: str, value: str) -> bool:
    try:
        found, good = json.loads(text), json.loads(value)
    except (ValueError, RecursionError):
        return False
    if isinstance(good, float) and type(found) in (int, float):
        return True
    if type(good) is int and type(found) is float:  # lora_alpha may be either
        return True
    return type(found) is type(good) or (type(found) is int and type(good) is float)


def of_safetensors(file: str, data: bytes, draw: random.Random) -> Iterator[Damage]:
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def packed(text: bytes | dict[str, Any], more: bytes = b"") -> Callable[[Path], None]:
        raw = json.dumps(text).encode() if isinstance(text, dict) else text
        return writes(file, struct.pack("<Q", len(raw)) + raw + values + more)

    for size in (0, 1, length - 1, length + 1, 10**9, 2**63, 2**64 - 1):
        yield Damage(f"{file} header of {size}", writes(file, struct.pack("<Q", size) + data[8:]))
    yield Damage(f"{file} deep header", packed(b'{"a": ' + DEEP.encode()))
    name = draw.choice(names)
    entry = header[name]

    def changed(**changes: Any) -> dict[str, Any]:
        return {**header, name: {**entry, **changes}}

    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    entries: dict[str, dict[str, Any]] = {
        "dtype of ints": changed(dtype="I32"),
        "dtype unknown": changed(dtype="F33" + CONTROL),
        "dtype a number": changed(dtype=3),
        "dtype a list": changed(dtype=["F32"]),
        "shape of bytes": changed(dtype="U8", shape=[size]),
        "shape of bools": changed(dtype="BOOL", shape=[size]),
        "shape of complex": changed(dtype="C64", shape=[size // 8]),
        "shape of halves": changed(dtype="F16", shape=[size // 2]),
        "shape negative": changed(shape=[-1, *entry["shape"][1:]]),
        "shape huge": changed(shape=[2**62, 4]),
        "shape of empty": changed(shape=[0, 2**62, 2**62]),
        "shape beyond": changed(shape=[10**300]),
        "shape of floats": changed(shape=[float(n) for n in entry["shape"]] or [1.0]),
        "shape of flags": changed(shape=[True, *entry["shape"]]),
        "shape deep": changed(shape=[1] * 1000 + entry["shape"]),
        "shape flat": changed(shape=[size // 4]),
        "offsets beyond": changed(data_offsets=[len(values), len(values) + size]),
        "offsets before": changed(data_offsets=[-size, 0]),
        "offsets swapped": changed(data_offsets=entry["data_offsets"][::-1]),
        "offsets shared": {**header, "more": entry},
        "offsets of text": changed(data_offsets="ab"),
        "one missing": {key: value for key, value in header.items() if key != name},
        "none": {},
        "one more": {**header, "more": {**entry, "shape": [0], "data_offsets": [0, 0]}},
        "renamed": {(CONTROL + key if key == name else key): v for key, v in header.items()},
        "long name": {("k" * 10_000 if key == name else key): v for key, v in header.items()},
        "no object": {**header, name: [1]},
        "metadata of numbers": {**header, "__metadata__": {"a": 1}},
        "metadata a list": {**header, "__metadata__": [1]},
    }
    for what, text in entries.items():
        yield Damage(f"{file} {what}", packed(text))
    for key, value in header.get("__metadata__", {}).items():
        if key != "format":
            for text in ("", "{", "[]", '{"a": 1}', DEEP, '{"r": 1' + "0" * 400 + "}", CONTROL):
                described = {**header["__metadata__"], key: text}
                yield Damage(
                    f"{file} {key} {text[:20]!r}", packed({**header, "__metadata__": described})
                )
            if value.startswith("{"):
                yield from of_metadata(file, header, key, json.loads(value), packed)
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    yield Damage(f"{file} a name twice", packed(twice.encode()))
    yield Damage(f"{file} values after the last", packed(header, b"\0" * 8))
    for what, bytes_of in (("nan", b"\0\0\xc0\x7f"), ("inf", b"\0\0\x80\x7f")):
        for target in draw.sample(names, min(3, len(names))):
            begin, end = header[target]["data_offsets"]
            if header[target]["dtype"] == "F32" and end > begin:
                spoilt = values[:begin] + bytes_of + values[begin + 4 :]
                yield Damage(
                    f"{file} {what} in {target}", writes(file, data[: 8 + length] + spoilt)
                )


def of_metadata(
    file: str, header: dict[str, Any], key: str, stored: dict[str, Any], packed: Any
) -> Iterator[Damage]:
    for field in stored:
        for value in (None, "x", [1], {}, True, 10**30):
            if isinstance(value, type(stored[field])):
                continue
            text = json.dumps({**stored, field: value})
            described = {**header["__metadata__"], key: text}
            yield Damage(
                f"{file} {key}.{field} {value!r}", packed({**header, "__metadata__": described})
            )
