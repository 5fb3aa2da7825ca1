"""Ways in which a file can be wrong, whatever the method: each makes one that must be refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any, Literal

import torch

from hedgerow.testing.files import File
from hedgerow.wire import MAX_HEADER_BYTES

Way = Callable[[Random, File], bytes | None]
"""Changes a file, or returns the bytes that stand for it."""

Direction = Literal["up", "down"]
"""Which way a file goes: an update up, an entry down."""


def a_tensor(rng: Random, file: File) -> str:
    """Name of one of the tensors."""
    return rng.choice(list(file.tensors))


def a_float_tensor(rng: Random, file: File) -> str:
    """Name of one of the tensors in float32."""
    return rng.choice([n for n, (dtype, *_) in file.tensors.items() if dtype == "F32"])


def renamed(rng: Random, file: File) -> None:
    """A tensor has another name."""
    name = a_tensor(rng, file)
    other = rng.choice([name + "x", name.upper(), "/" + name, "\x1b[2J" + name, "", "__meta__"])
    file.tensors = {other if n == name else n: t for n, t in file.tensors.items()}


def dropped(rng: Random, file: File) -> None:
    """Tensors are missing."""
    for _ in range(rng.randint(1, len(file.tensors))):
        del file.tensors[a_tensor(rng, file)]


def added(rng: Random, file: File) -> None:
    """There is a tensor more."""
    name = rng.choice(["more", a_tensor(rng, file) + ".more", "base_model.model.x.lora_A.weight"])
    file.tensors[name] = ("F32", [1], bytes(4))


def twice(rng: Random, file: File) -> bytes:
    """The header has a part two times."""
    return file.bytes(twice=rng.choice(["__metadata__", a_tensor(rng, file)]))


def other_shape(rng: Random, file: File) -> None:
    """A tensor has another shape, of as many numbers or of none."""
    name = a_tensor(rng, file)
    dtype, shape, data = file.tensors[name]
    shapes = [[*shape, 1], [1, *shape], shape[::-1], [math.prod(shape)], [1] * 9]
    file.tensors[name] = (dtype, rng.choice([s for s in shapes if s != shape]), data)


def absurd_shape(rng: Random, file: File) -> None:
    """A tensor's shape is none, or larger than any memory."""
    name = a_tensor(rng, file)
    dtype, _, data = file.tensors[name]
    shapes: list[Any] = [
        [0],
        [0, 2**63],
        [2**32, 2**32],
        [-4],
        [2**64],
        [1.5],
        "4",
        [[4]],
        [True],
        [1] * 5000,
    ]
    file.tensors[name] = (dtype, rng.choice(shapes), rng.choice([data, b""]))


def longer(rng: Random, file: File) -> None:
    """A tensor has a row more or less."""
    name = rng.choice([name for name, (_, shape, _) in file.tensors.items() if shape])
    dtype, shape, data = file.tensors[name]
    one = len(data) // shape[0]
    less = shape[0] > 1 and rng.random() < 0.5
    content = data[:-one] if less else data + data[:one]
    file.tensors[name] = (dtype, [shape[0] + (-1 if less else 1), *shape[1:]], content)


def other_dtype(rng: Random, file: File) -> None:
    """A tensor has another type."""
    name = a_tensor(rng, file)
    tensor = file.loaded()[name]
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
    file.put(name, tensor.to(rng.choice([t for t in types if t != tensor.dtype])))


def unknown_dtype(rng: Random, file: File) -> None:
    """A tensor's type is none that anybody reads."""
    name = a_tensor(rng, file)
    _, shape, data = file.tensors[name]
    types: list[Any] = ["F8_E4M3", "C64", "BOOL", "X" * 999, "", 7]
    file.tensors[name] = (rng.choice(types), shape, data)


def not_finite(rng: Random, file: File) -> None:
    """A number is infinite, or none."""
    name = a_float_tensor(rng, file)
    tensor = file.loaded()[name]
    value = rng.choice([math.nan, math.inf, -math.inf])
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    file.put(name, tensor)


def huge(rng: Random, file: File) -> None:
    """A number is larger than any that is accepted."""
    name = a_float_tensor(rng, file)
    tensor = file.loaded()[name]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([1e18, -1e18, 3e38])
    file.put(name, tensor)


def cut(rng: Random, file: File) -> bytes:
    """The file ends early."""
    data = file.bytes()
    return data[: rng.randrange(len(data))]


def extended(rng: Random, file: File) -> bytes:
    """There are bytes after the end."""
    return file.bytes() + rng.randbytes(rng.randint(1, 99))


def announced_longer(rng: Random, file: File) -> bytes:
    """The header is said to be longer than it is."""
    data = file.bytes()
    return rng.choice([2**63, 2**64 - 1, MAX_HEADER_BYTES, 10**8]).to_bytes(8, "little") + data[8:]


def overlapping(rng: Random, file: File) -> bytes:
    """A tensor is not where its neighbours end and begin."""
    header_length = int.from_bytes(file.bytes()[:8], "little")
    header = json.loads(file.bytes()[8 : 8 + header_length])
    name = a_tensor(rng, file)
    begin, end = header[name]["data_offsets"]
    places = [[begin + 4, end + 4], [begin, end - 1], [-1, end], [end, begin], [begin], [0, 2**70]]
    header[name]["data_offsets"] = rng.choice([*places, None, [begin, end, end], ["0", end]])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + file.bytes()[8 + header_length :]


def unreadable(rng: Random, file: File) -> bytes:
    """The header is no mapping that can be read."""
    headers = [b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"[]", b"null", b"\xff\xfe{}", b" {}"]
    header = rng.choice([*headers, b'{"__metadata__":{},"__metadata__":{}}', b"9" * 9999])
    return len(header).to_bytes(8, "little") + header


NO_NUMBERS = [
    "0",
    "-1",
    "１２",
    "1_000",
    " 7 ",
    "7\n",
    "007",
    "9" * 5000,
    str(2**63),
    "",
    "+7",
    "7.0",
]


def other_metadata(key: str, *values: str) -> Way:
    """A way to be wrong: the metadata have another of `values` under `key`."""

    def wrong(rng: Random, file: File) -> None:
        file.metadata[key] = rng.choice([v for v in values if v != file.metadata[key]])

    wrong.__name__, wrong.__doc__ = f"other_{key}", f"The {key} of the metadata is another."
    return wrong


def lacking(rng: Random, file: File) -> None:
    """A key of the metadata is missing."""
    del file.metadata[rng.choice([k for k in file.metadata if k != "options"])]


def more_metadata(rng: Random, file: File) -> None:
    """The metadata have a key more."""
    file.metadata |= rng.choice([{"x": "1"}, {"x" * 9999: "1"}, {"\x1b[2J": "1"}, {"x": 1}])


def no_texts(rng: Random, file: File) -> None:
    """A value of the metadata is no text, or one that nobody expects."""
    values: list[Any] = [7, None, ["a"], {}, "x" * 100_000, "a\nb", "\udcff", True]
    file.metadata[rng.choice(list(file.metadata))] = rng.choice(values)


def participants(change: Callable[[Random, list[Any], dict[str, Any]], Any]) -> Way:
    """A way to be wrong: `change` makes another list of an entry's participants."""

    def wrong(rng: Random, file: File) -> None:
        everybody = json.loads(file.metadata["participants"])
        someone = rng.choice(everybody)
        changed = change(rng, everybody, someone)
        file.metadata["participants"] = json.dumps(everybody if changed is None else changed)

    wrong.__name__, wrong.__doc__ = f"participants_{change.__name__}", change.__doc__
    return wrong


def nobody(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> Any:
    """There are no participants."""
    return rng.choice([[], {}, "client-000", [[]], [None]])


def one_less(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant is missing, while the others weigh what they did."""
    everybody.remove(someone)


def one_twice(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant is there two times."""
    everybody.append(dict(someone))
    for each in everybody:
        each["weight"] = each["num_examples"] / sum(p["num_examples"] for p in everybody)


def bad_name(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant's name is none."""
    someone["client"] = rng.choice(["", "../x", "a/b", ".x", "x\n", "\x1b[2J", "x" * 300, 7, None])


def bad_size(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant's number of examples is none."""
    someone["num_examples"] = rng.choice([0, -1, "7", True, 7.0, None, 2**63, 10**400])


def bad_weight(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant's weight is none, or not the method's."""
    weights = [0, -0.1, 1.5, math.nan, math.inf, "0.5", True, None, someone["weight"] + 1e-5]
    someone["weight"] = rng.choice(weights)


def bad_key(rng: Random, everybody: list[Any], someone: dict[str, Any]) -> None:
    """A participant has a key more or less."""
    if rng.random() < 0.5:
        someone["x"] = 1
    else:
        del someone[rng.choice(list(someone))]


def other_options(rng: Random, file: File) -> None:
    """The options are not the method's, which has none."""
    file.metadata["options"] = rng.choice(['{"x": 1}', "[]", "null", "", "{" * 9999])


_ANY_FILE: list[Way] = [
    *(renamed, dropped, added, twice, other_shape, absurd_shape, longer, other_dtype, not_finite),
    *(unknown_dtype, huge, cut, extended, announced_longer, overlapping, unreadable, lacking),
    *(more_metadata, no_texts, other_metadata("format", "hedgerow.update/2", "pt", "")),
    other_metadata("method", "flora", "fedavg", "", "x" * 400),
    other_metadata("round", "1", "3", *NO_NUMBERS),
    other_metadata("parent", "ab" * 31, "cd" * 32, "", "AB" * 32),
]
_ANY_UPDATE: list[Way] = [
    *_ANY_FILE,
    other_metadata("client", "client-001", "", "x" * 400),
    other_metadata("num_examples", "6", *NO_NUMBERS),
    other_metadata("train_loss", "nan", "inf", "1e999", "1e300", "1_0", " 1.5", "１", "", "0x1p3"),
]
_ANY_ENTRY: list[Way] = [
    *_ANY_FILE,
    *map(participants, (nobody, one_less, one_twice, bad_name, bad_size, bad_weight, bad_key)),
    other_metadata("participants", "[" * 9999, "", "null", '[{"client": NaN}]'),
    other_metadata(
        "metrics",
        "{}",
        '{"bytes_up": 1}',
        '{"x": NaN}',
        '{"x": 1e999}',
        '{"x": "1"}',
        '{"x": true}',
        "[]",
        "",
    ),
    other_metadata("metrics", '{"\\ud800": 1}', '{"X y": 1}', '{"x": {}}', "{" * 9999, "{]"),
]


def any_wrong(direction: Direction, file: File) -> list[Way]:
    """Ways in which an update (`up`) or an entry (`down`) like `file` can be wrong."""
    ways = list(_ANY_UPDATE if direction == "up" else _ANY_ENTRY)
    types = [dtype for dtype, *_ in file.tensors.values()]
    if "F32" not in types:
        ways = [way for way in ways if way not in (not_finite, huge)]
    if not any(shape for _, shape, _ in file.tensors.values()):
        ways.remove(longer)
    return ways
