"""Pickle files read as data: no code in them runs.

A pickle is a program for a stack machine, and one of its instructions calls whatever function it
names. Here is a machine of its own that has no such instruction: names are looked up in a short
table, and what stands behind each is a function of this file that checks its arguments. Neither
Python's unpickler nor the `__setstate__` of anything from the file takes part.

Source: the instruction set is documented in Python's `pickletools`; states of arrays and dtypes in
numpy's `__reduce_ex__`. Departures: strings of Python 2 are read as Latin-1; instances of classes,
persistent ids, registered extensions and out-of-band buffers are refused.
"""

import codecs
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError

DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|O[48]?|[SUV]\d{1,9})")
DEEPEST = 16  # object arrays within object arrays; numpy frees them by recursion
LARGE = 1 << 16  # bytes; a longer read is compared with what is left first
PLAIN = (str, bytes, int, float, type(None), np.number, np.bool_)


class _Refused(Exception):
    """The file asks for something that is not data; the message names it."""


@dataclass(frozen=True)
class _Name:
    """A function or class that the file names. It is inert: the table below gives it a meaning."""

    name: str


def read_pickle(path: Path, flag: str) -> object:
    """What a pickle file holds, if that is plain data.

    Admitted are None, bool, int, float, str, bytes, bytearray, list, tuple, dict, OrderedDict, set,
    frozenset, and numpy's arrays, scalars and dtypes of numbers, text, raw bytes, structures of
    those, and objects which are themselves admitted; protocols 0 to 5. Keys of dicts and members of
    sets are numbers, text, bytes, None, or tuples of those. Strings that Python 2 wrote are decoded
    as Latin-1. What follows the first pickle in a file is not read.

    Args:
        path: of the file.
        flag: for messages.
    Raises:
        UserError: if it cannot be read, is damaged, or holds anything else, which is named
            (`os.system`). Nothing of it has run then.
    """
    try:
        if not path.is_file():
            raise UserError(f"{flag}={path}: there is no such file")
        with path.open("rb") as file:
            machine = _Machine(file, os.fstat(file.fileno()).st_size)
            return machine.run()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error.strerror or error}") from error
    except _Refused as error:
        raise UserError(
            f"{flag}={path}: holds {error}, which is not plain data and could run a program; "
            "admitted are Python's containers, numbers and text, and numpy's arrays of them. Save "
            "its content again as such, or take the file from its authors"
        ) from None
    # of numpy and struct too, when they are handed nonsense
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(
            f"{flag}={path}: is damaged, or no pickle ({type(error).__name__}: {detail}); fetch it "
            "again"
        ) from error


# --- the machine ----------------------------------------------------------------------------------


class _Machine:
    """A stack, the stacks below it (one for each open MARK), and a memo."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, object] = {}
        # by id; values keep the objects alive, so that an id has one meaning
        self.pending: dict[int, object] = {}  # arrays and dtypes that await their BUILD
        self.depths: dict[int, tuple[np.ndarray, int]] = {}  # of object arrays

    def run(self) -> object:
        while (code := self.take(1)) != b".":
            step = STEPS.get(code)
            if step is None:
                raise ValueError(f"unknown instruction {code!r}")
            step(self)
        value = self.pop()
        if self.pending:
            raise ValueError("an array or dtype has no content")
        _refuse_names(value)
        return value

    # reading

    def take(self, n: int) -> bytes:
        if n > LARGE and n > self.size - self.file.tell():
            raise ValueError(f"{n} bytes announced, {self.size - self.file.tell()} left")
        data = self.file.read(n)
        if len(data) != n:
            raise ValueError("ends too early")
        return data

    def integer(self, n: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(n), "little", signed=signed)

    def counted(self, n: int) -> bytes:
        """Bytes behind their number, which takes n bytes."""
        return self.take(self.integer(n))

    def line(self) -> bytes:
        data = self.file.readline()
        if not data.endswith(b"\n"):
            raise ValueError("ends too early")
        return data[:-1]

    # the stack

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        return self.stack.pop()

    def top(self, *kinds: type) -> object:
        value = self.stack[-1]
        if type(value) not in kinds:
            raise ValueError(f"a {type(value).__name__} stands where a {kinds[0].__name__} belongs")
        return value

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list:
        """All since the last MARK."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, n: int) -> list:
        if n > len(self.stack):
            raise ValueError("the stack is too short")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.below.pop()

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    # containers

    def extend(self, items: list) -> None:
        self.top(list).extend(items)

    def update(self, items: list) -> None:
        self.top(dict, OrderedDict).update(_pairs(items))

    def add(self, items: list) -> None:
        self.top(set).update(map(_key, items))

    # numbers and text

    def text_integer(self) -> None:
        line = self.line()
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def old_text(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
            raise ValueError("a text has no quotes")
        self.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))

    def protocol(self) -> None:
        if (found := self.integer(1)) > 5:
            raise ValueError(f"protocol {found}; known are 0 to 5")

    def frame(self) -> None:
        if self.integer(8) > self.size - self.file.tell():
            raise ValueError("ends too early")

    # names and what they stand for

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in CALLS and full != "numpy.ndarray":
            raise _Refused(full[:200])
        self.push(_Name(full))

    def stacked_name(self) -> None:
        module, name = self.last(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        self.name(module, name)

    def line_name(self) -> None:
        module, name = self.line(), self.line()
        self.name(module.decode(), name.decode())

    def call(self) -> None:
        callee, args = self.last(2)
        if type(callee) is not _Name or type(args) is not tuple:
            raise ValueError(f"a call of a {type(callee).__name__}")
        if callee.name not in CALLS:
            raise _Refused(f"a call of {callee.name}")
        self.push(CALLS[callee.name](self, *args))

    def build(self) -> None:
        """Give an array or dtype its state, once."""
        value, state = self.last(2)
        if self.pending.pop(id(value), None) is None:
            named = value.name if type(value) is _Name else type(value).__name__
            raise _Refused(f"a change of a {named} that is complete")
        if type(state) is not tuple:
            raise ValueError("a state is no tuple")
        if type(value) is np.ndarray:
            self.fill(value, *state)
        else:
            _set_dtype(value, self.settled, *state)
        self.push(value)

    def await_state(self, value: np.ndarray | np.dtype) -> np.ndarray | np.dtype:
        self.pending[id(value)] = value
        return value

    def settled(self, dtype: object) -> np.dtype:
        if not isinstance(dtype, np.dtype) or id(dtype) in self.pending:
            raise ValueError("an array has no complete dtype")
        return dtype

    def empty_array(self, kind: object, shape: object, typecode: object) -> np.ndarray:
        if type(kind) is not _Name or kind.name != "numpy.ndarray":
            raise _Refused(f"an array of the class {getattr(kind, 'name', type(kind).__name__)}")
        return self.await_state(np.empty(0, dtype=np.int8))

    def fill(
        self,
        array: np.ndarray,
        version: object,
        shape: object,
        dtype: object,
        fortran: object,
        content: object,
    ) -> None:
        """The state of an array: bytes in C or Fortran order, or a list of objects."""
        dtype, size = self.settled(dtype), _size(shape)
        if dtype == np.dtype(object):
            if type(content) is not list or len(content) != size:
                raise ValueError("an array of objects has another number of them than its shape")
            self.depths[id(array)] = (array, self.depth_above(content))
        else:
            content = _buffer(content, dtype, size)
        array.__setstate__((1, shape, dtype, bool(fortran), content))

    def depth_above(self, content: list) -> int:
        if any(id(value) in self.pending for value in content):
            raise ValueError("an array holds one that is not complete")
        depth = 1 + max((self.depths[id(v)][1] for v in content if id(v) in self.depths), default=0)
        if depth > DEEPEST:
            raise ValueError(f"arrays within arrays, more than {DEEPEST} deep")
        return depth

    def array_of_buffer(
        self, content: object, dtype: object, shape: object, order: object, axes: object = None
    ) -> np.ndarray:
        """An array of protocol 5."""
        dtype, size = self.settled(dtype), _size(shape)
        flat = np.frombuffer(bytearray(_buffer(content, dtype, size)), dtype=dtype)
        if order == "K" and axes is not None:
            _size(axes)
            return flat.reshape(shape).transpose(axes)
        if order not in ("C", "F", "K"):
            raise ValueError(f"an array in the order {_shown(order)}")
        return flat.reshape(shape, order="F" if order == "F" else "C")

    def scalar(self, dtype: object, content: object = b"") -> np.generic:
        dtype = self.settled(dtype)
        if dtype == np.dtype("U0"):  # an empty text; numpy has no buffers of 0 bytes
            return np.str_()
        if dtype == np.dtype("S0"):
            return np.bytes_()
        return np.ndarray((), dtype, buffer=_buffer(content, dtype, 1))[()].copy()

    def new_dtype(self, text: object, align: object = False, copy: object = True) -> np.dtype:
        if type(text) is not str or not DTYPE.fullmatch(text):
            raise _Refused(f"numpy.dtype of {_shown(text)}")
        text = re.sub("O[48]", "O", text)
        # always a copy: the state that follows must not change numpy's own
        return self.await_state(np.dtype(text, False, True))


# --- values ---------------------------------------------------------------------------------------


def _shown(value: object) -> str:
    """For messages; containers may be too deep or too large to be written out."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _key(value: object) -> object:
    """A key of a dict; deep tuples, which Python hashes by recursion, are none."""
    for part in value if type(value) is tuple else (value,):
        if not isinstance(part, PLAIN):
            raise ValueError(f"a {type(part).__name__} as a key")
    return value


def _pairs(items: list) -> list[tuple[object, object]]:
    """key, value, key, value, ..."""
    return [(_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True)]


def _size(shape: object) -> int:
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a shape is no tuple of integers")
    return prod(shape)


def _buffer(content: object, dtype: np.dtype, size: int) -> bytes | bytearray:
    """The bytes of an array, checked; a str is Python 2's."""
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"bytes for the dtype {dtype}")
    if type(content) is str:
        content = content.encode("latin-1")
    if type(content) not in (bytes, bytearray) or len(content) != size * dtype.itemsize:
        raise ValueError("an array has another number of bytes than its shape and dtype")
    if size:
        _check_text(np.ndarray(size, dtype, buffer=content))
    return content


def _check_text(array: np.ndarray) -> None:
    """Raise if text has no characters; numpy itself finds out only when an item is taken."""
    for part in [array[name] for name in array.dtype.names or ()] or [array]:
        if part.dtype.kind == "U" and part.dtype.itemsize:
            points = np.ascontiguousarray(part).view(f"{part.dtype.str[0]}u4")
            if points.max() > 0x10FFFF:
                raise ValueError("an array of text has what are no characters")


def _set_dtype(
    dtype: np.dtype,
    settled: Callable[[object], np.dtype],
    version: object,
    byteorder: object,
    sub: object,
    names: object,
    fields: object,
    itemsize: object,
    alignment: object,
    flags: object,
    metadata: object = None,
) -> None:
    """The state of a dtype: its byte order, or its fields. It is built anew by numpy's own checked
    constructors, and the file's numbers are only compared."""
    if sub is not None or metadata:
        raise _Refused("a numpy.dtype of sub-arrays or with metadata")
    if byteorder not in ("<", ">", "|", "="):
        raise ValueError(f"a dtype of byte order {_shown(byteorder)}")
    if names is None:
        wanted = dtype.newbyteorder(byteorder)
        if itemsize not in (-1, wanted.itemsize):
            raise ValueError(f"a dtype {dtype} of another number of bytes")
    else:
        if dtype.kind != "V" or type(names) is not tuple or type(fields) is not dict:
            raise ValueError("a dtype with fields is no structure")
        if not all(type(name) is str for name in names):
            raise ValueError("a field's name is no text")
        formats, offsets = zip(*(fields[name] for name in names), strict=True)
        wanted = np.dtype(
            {
                "names": list(names),
                "formats": [settled(part) for part in formats],
                "offsets": list(offsets),
                "itemsize": dtype.itemsize,
            }
        )
        if wanted.hasobject or any(wanted[name].names for name in names):
            raise _Refused("a numpy.dtype with fields of objects or of structures")
    dtype.__setstate__(wanted.__reduce__()[2])


def _refuse_names(value: object) -> None:
    """Raise if a name that was never called is part of the value."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if type(value) is _Name:
            raise _Refused(f"{value.name} itself")
        if isinstance(value, (list, tuple, dict, np.ndarray)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, np.ndarray):
                waiting += value.ravel().tolist() if value.dtype == np.dtype(object) else ()
            else:  # a key is never a name
                waiting += value.values() if isinstance(value, dict) else value


# --- the tables -----------------------------------------------------------------------------------


def _encode(machine: _Machine, text: object, encoding: object) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode to {_shown(encoding)}")
    return text.encode("latin-1")


def _listed(machine: _Machine, items: object = ()) -> list:
    if type(items) not in (list, tuple):
        raise ValueError("a container of what is no list")
    return list(items)


def _ordered(machine: _Machine, items: object = ()) -> OrderedDict:
    pairs = [_listed(machine, pair) for pair in _listed(machine, items)]
    return OrderedDict(_pairs([part for key, value in pairs for part in (key, value)]))


def _empty_bytes(machine: _Machine) -> bytes:
    return b""


def _bytearray(machine: _Machine, content: object = b"", encoding: object = None) -> bytearray:
    if encoding is not None:
        content = _encode(machine, content, encoding)
    if type(content) is not bytes:
        raise ValueError("a bytearray of what are no bytes")
    return bytearray(content)


CALLS: dict[str, Callable[..., object]] = {
    "numpy.dtype": _Machine.new_dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered,
}
for _core in ("numpy.core", "numpy._core"):
    CALLS[f"{_core}.multiarray._reconstruct"] = _Machine.empty_array
    CALLS[f"{_core}.multiarray.scalar"] = _Machine.scalar
    CALLS[f"{_core}.numeric._frombuffer"] = _Machine.array_of_buffer
for _builtins in ("builtins", "__builtin__"):
    CALLS[f"{_builtins}.set"] = lambda m, *args: set(map(_key, _listed(m, *args)))
    CALLS[f"{_builtins}.frozenset"] = lambda m, *args: frozenset(map(_key, _listed(m, *args)))
    CALLS[f"{_builtins}.bytes"] = _empty_bytes
    CALLS[f"{_builtins}.bytearray"] = _bytearray


def _refuse(what: str) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        raise _Refused(what)

    return step


def _instance(machine: _Machine) -> None:
    """INST: the class is named in the instruction itself."""
    module, name = machine.line().decode(), machine.line().decode()
    raise _Refused(f"{module}.{name}"[:200])


def _instance_of(n: int | None) -> Callable[[_Machine], None]:
    """OBJ, NEWOBJ, NEWOBJ_EX: the class is on the stack, n values from the top, or first."""

    def step(machine: _Machine) -> None:
        kind = machine.items()[0] if n is None else machine.last(n)[0]
        raise _Refused(f"an instance of {getattr(kind, 'name', type(kind).__name__)}")

    return step


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


STEPS: dict[bytes, Callable[[_Machine], object]] = {
    # the stack and the memo
    b"(": _Machine.mark,
    b"0": _Machine.drop,
    b"1": _Machine.items,
    b"2": lambda m: m.push(m.stack[-1]),
    b"p": lambda m: m.remember(int(m.line())),
    b"q": lambda m: m.remember(m.integer(1)),
    b"r": lambda m: m.remember(m.integer(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"h": lambda m: m.push(m.memo[m.integer(1)]),
    b"j": lambda m: m.push(m.memo[m.integer(4)]),
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    # constants and numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": _Machine.text_integer,
    b"L": lambda m: m.push(int(m.line().rstrip(b"L"))),
    b"J": lambda m: m.push(m.integer(4, signed=True)),
    b"K": lambda m: m.push(m.integer(1)),
    b"M": lambda m: m.push(m.integer(2)),
    b"\x8a": lambda m: m.push(int.from_bytes(m.counted(1), "little", signed=True)),
    b"\x8b": lambda m: m.push(int.from_bytes(m.counted(4), "little", signed=True)),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # text and bytes
    b"S": _Machine.old_text,
    b"T": lambda m: m.push(m.counted(4).decode("latin-1")),
    b"U": lambda m: m.push(m.counted(1).decode("latin-1")),
    b"V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    b"\x8c": lambda m: m.push(_utf8(m.counted(1))),
    b"X": lambda m: m.push(_utf8(m.counted(4))),
    b"\x8d": lambda m: m.push(_utf8(m.counted(8))),
    b"C": lambda m: m.push(m.counted(1)),
    b"B": lambda m: m.push(m.counted(4)),
    b"\x8e": lambda m: m.push(m.counted(8)),
    b"\x96": lambda m: m.push(bytearray(m.counted(8))),
    # containers
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.items()),
    b"a": lambda m: m.extend(m.last(1)),
    b"e": lambda m: m.extend(m.items()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.items())),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": lambda m: m.push(tuple(m.last(2))),
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"}": lambda m: m.push({}),
    b"d": lambda m: m.push(dict(_pairs(m.items()))),
    b"s": lambda m: m.update(m.last(2)),
    b"u": lambda m: m.update(m.items()),
    b"\x8f": lambda m: m.push(set()),
    b"\x90": lambda m: m.add(m.items()),
    b"\x91": lambda m: m.push(frozenset(map(_key, m.items()))),
    # names and calls
    b"c": _Machine.line_name,
    b"\x93": _Machine.stacked_name,
    b"R": _Machine.call,
    b"b": _Machine.build,
    # what has no place in data
    b"i": _instance,
    b"o": _instance_of(None),
    b"\x81": _instance_of(2),
    b"\x92": _instance_of(3),
    b"P": _refuse("a persistent id"),
    b"Q": _refuse("a persistent id"),
    b"\x82": _refuse("a code of copyreg's extension registry"),
    b"\x83": _refuse("a code of copyreg's extension registry"),
    b"\x84": _refuse("a code of copyreg's extension registry"),
    b"\x97": _refuse("an out-of-band buffer"),
    b"\x98": _refuse("an out-of-band buffer"),
}
