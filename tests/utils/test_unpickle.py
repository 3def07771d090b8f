"""Pickles as data: what pickle.load would read is read the same, and no code runs."""

import builtins
import copyreg
import io
import os
import pickle
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest

from utils.errors import UserError
from utils.unpickle import DEEPEST, read_pickle

PROTOCOLS = range(6)


def write(folder, content):
    path = folder / "x.pkl"
    path.write_bytes(content)
    return path


def read(folder, content):
    return read_pickle(write(folder, content), "--data_dir")


def refused(folder, content, message):
    """The message, once it is known that the file is refused with one that matches."""
    with pytest.raises(UserError, match=message) as caught:
        read(folder, content)
    told = str(caught.value)
    assert told.startswith(f"--data_dir={folder / 'x.pkl'}: ")
    return told


def same(a, b):
    """Equal in type and value, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype == object:
            return all(same(x, y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
        return a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.dtype):
        return a == b
    return a == b


def mixed(*values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


PLAIN = [
    [None, True, False, 0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**70, -(2**2100)],
    [0.5, -1e300, float("inf")],
    ["", "a", "Zürich\n\u2028\\u0041 '\"", "\ud800", "x" * 300, "y" * 70000],
    [b"", b"a\x00\xff", b"z" * 300, bytearray(), bytearray(b"\x80q")],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], [[]]], {}],
    {"a": 1, 2: "b", (1, "c"): [3], None: {4.5: ()}, b"k": True},
    [{1, 2, "x"}, set(), frozenset({1, (2, 3)}), frozenset()],
    OrderedDict([("b", 1), ("a", OrderedDict())]),
    {str(i): list(range(i % 7)) for i in range(3000)},
]
ARRAYS = [
    *(np.arange(6).reshape(2, 3).astype(t) for t in "?bBhHiIqQefdgFDSU"),
    *(np.arange(24, dtype=t).reshape(2, 3, 4) for t in (">f4", ">i8", "<u2")),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2),
    np.arange(4000, dtype=np.float32)[::2],
    *(np.empty(0), np.empty((3, 0, 2), dtype=np.int64), np.array(7), np.array("word")),
    np.array([(1, 2.5, b"ab"), (3, 4.5, b"c")], dtype=[("a", "<i4"), ("b", ">f8"), ("c", "S3")]),
    np.zeros(2, dtype=np.dtype([("a", "u1"), ("b", "f8")], align=True)),
    mixed("a", None, 3, [1, {"k": (2,)}], np.arange(3), mixed(1, "b")),
    np.array([[1, "a"], [None, 2.5]], dtype=object, order="F"),
]
SCALARS = [
    *(np.float32(1.5), np.float64(-2), np.int64(7), np.uint8(255), np.bool_(True), np.float16(3)),
    *(np.complex64(1 + 2j), np.str_("wort"), np.str_(""), np.bytes_(b"abc"), np.bytes_(b"")),
    np.zeros(1, dtype=[("a", "i4"), ("b", "f8")])[0],
]
DTYPES = [np.dtype(t) for t in ("f4", ">i8", "S5", "U3", "V4", "O", "?")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_is_read_as_python_reads_it(tmp_path, protocol):
    for value in [*PLAIN, PLAIN, *ARRAYS, ARRAYS, SCALARS, DTYPES, {"all": (PLAIN, ARRAYS)}]:
        content = pickle.dumps(value, protocol)
        got = read(tmp_path, content)
        assert same(got, pickle.loads(content)), value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_object_stays_one_object(tmp_path, protocol):
    array, inner = np.arange(3), [1]
    got = read(tmp_path, pickle.dumps([array, array, inner, {"k": inner}], protocol))
    assert got[0] is got[1] and got[2] is got[3]["k"]
    loop = []
    loop.append(loop)
    got = read(tmp_path, pickle.dumps(loop, protocol))
    assert got[0] is got


def test_arrays_are_plain_and_can_be_written_to(tmp_path):
    for protocol in PROTOCOLS:
        for array in (np.arange(3.0), np.arange(5000.0)):
            got = read(tmp_path, pickle.dumps(array, protocol))
            got[0] = 9
            assert type(got) is np.ndarray and got.flags.writeable
            array.setflags(write=False)  # protocol 5 writes this one as bytes
            assert read(tmp_path, pickle.dumps(array, protocol)).flags.writeable


def test_numpy_s_own_dtypes_are_not_changed(tmp_path):
    read(tmp_path, pickle.dumps([np.zeros(2, ">f8"), np.zeros(2, dtype=[("a", ">f8")])], 2))
    assert np.dtype("f8").isnative and np.dtype("V8").names is None
    # `copy` is false in the file: the state must still not reach the shared float64
    swapped = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8I00\nI00\ntR(K\x03X\x01\x00\x00\x00>NNNJ\xff\xff"
    swapped += b"\xff\xffJ\xff\xff\xff\xffK\x00tb."
    assert read(tmp_path, swapped) == np.dtype(">f8")
    assert np.dtype("f8").isnative and np.dtype("f8").str == "<f8"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_both_spellings_of_numpy_s_core(tmp_path, protocol, core):
    value = [np.arange(3.0), np.float32(2)]
    content = pickle.dumps(value, protocol)
    if protocol >= 4:  # names have their length in front, and the whole its own
        for old in (b"numpy._core.multiarray", b"numpy._core.numeric"):
            new = old.replace(b"numpy._core", core)
            content = content.replace(bytes([0x8C, len(old)]) + old, bytes([0x8C, len(new)]) + new)
        content = content[:2] + content[11:]  # without its frame
    else:
        content = content.replace(b"numpy._core", core)
    assert core + b".multiarray" in content
    assert same(read(tmp_path, content), value)


def test_strings_of_python_2_are_latin_1(tmp_path):
    # {'caf\xe9': array([1, 2], dtype='<i2'), u'x': 5L}, written by hand as Python 2 has it
    state = b"(K\x01K\x02\x85cnumpy\ndtype\n(U\x02i2K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xff"
    state += b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\x02\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR" + state
    content = b"\x80\x02}(U\x04caf\xe9" + array + b"X\x01\x00\x00\x00x\x8a\x01\x05u."
    got = read(tmp_path, content)
    assert list(got) == ["caf\u00e9", "x"] and got["x"] == 5
    assert same(got["caf\u00e9"], np.array([1, 2], dtype="<i2"))
    assert same(got["caf\u00e9"], pickle.loads(content, encoding="latin1")["caf\u00e9"])
    # protocol 0: text in quotes, with escapes
    assert read(tmp_path, b"(lp0\nS'caf\\xe9\\n'\np1\naS\"it's\"\naI5\naL7L\naF1.5\na.") == [
        *("caf\u00e9\n", "it's", 5, 7, 1.5)
    ]
    ordered = b"ccollections\nOrderedDict\n((lp0\n(lS'b'\naI1\naa(lS'a'\naI2\naatR."
    assert same(read(tmp_path, ordered), OrderedDict([("b", 1), ("a", 2)]))


# --- what is refused ------------------------------------------------------------------------------


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A command that leaves a file; the functions that could run it say so if they are called."""
    ran = []
    monkeypatch.setattr(builtins, "eval", lambda *args: ran.append(args))
    monkeypatch.setattr(os, "system", lambda *args: ran.append(args))
    proof = tmp_path / "ran"
    yield f"touch {proof}"
    assert not ran and not proof.exists()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_of_the_shell_is_refused_by_name(tmp_path, protocol):
    """With the real functions; the file that they would leave is the proof."""
    proof = tmp_path / "ran"
    for call in (Calls(os.system, f"touch {proof}"), Calls(open, str(proof), "w")):
        for value in (call, {"a": [1, call]}, mixed(1, call), (np.arange(3), mixed(mixed(call)))):
            content = pickle.dumps(value, protocol)
            refused(tmp_path, content, r"holds (posix\.system|io\.open), which is not plain data")
            assert not proof.exists()
    pickle.loads(content)  # here it does
    assert proof.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("os", "system"), ("posix", "system"), ("builtins", "eval"), ("__builtin__", "eval")),
        *(("builtins", "getattr"), ("builtins", "print"), ("copy_reg", "_reconstructor")),
        *(("copyreg", "__newobj__"), ("numpy", "load"), ("numpy", "memmap"), ("numpy", "matrix")),
        *(("numpy.core.multiarray", "fromfile"), ("numpy.testing", "runstring")),
        *(("_codecs", "decode"), ("collections", "OrderedDict.fromkeys"), ("", "")),
        *(("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "scalar.__class__")),
    ],
)
def test_every_way_to_name_a_function_is_closed(tmp_path, trap, module, name):
    lines = f"{module}\n{name}\n".encode()
    command = text(trap)
    for content in (
        b"c" + lines + b".",
        b"c" + lines + command + b"\x85R.",
        text(module) + text(name) + b"\x93" + command + b"\x85R.",
        b"(" + command + b"i" + lines + b".",
        b"(c" + lines + command + b"o.",
        b"c" + lines + command + b"\x85\x81.",
        b"c" + lines + command + b"\x85}\x92.",
        b"c" + lines + b"q\x000h\x00" + command + b"\x85R.",  # by way of the memo
        b"c" + lines + b"0].",  # named and dropped
        b"]c" + lines + b"}b.",
    ):
        told = refused(tmp_path, content, re.escape(f"holds {module}.{name}, which is not plain"))
        assert "admitted are" in told and "Save its content again" in told


ADMITTED = [
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"c__builtin__\nset\n"),
    *(b"ccollections\nOrderedDict\n", b"cnumpy.core.multiarray\nscalar\n"),
    b"cnumpy._core.multiarray\n_reconstruct\n",
]


@pytest.mark.parametrize("named", ADMITTED)
def test_admitted_names_have_no_other_use(tmp_path, trap, named):
    evil = b"}" + text("__call__") + text("x") + b"s"
    for state in (evil, b"N" + evil + b"\x86", evil + evil + b"\x86", b")", b"N"):
        refused(tmp_path, named + state + b"b.", "holds a change of a .* that is complete")
    for content in (
        named + b".",
        b"]" + named + b"a.",
        b"}K\x01" + named + b"s.",
        named + b"\x85\x85.",
    ):
        refused(tmp_path, content, "itself, which is not plain data")
    for content in (b"(" + named + b"o.", named + b")\x81.", named + b")}\x92."):
        refused(tmp_path, content, "holds an instance of [a-z_A-Z.]+, which is not")
    refused(tmp_path, b"}" + named + b"K\x01s.", "a _Name as a key")
    refused(tmp_path, b"\x8f(" + named + b"\x90.", "a _Name as a key")
    refused(tmp_path, named + b"K\x01a.", "a _Name stands where a list belongs")
    refused(tmp_path, named + b"K\x01K\x01s.", "a _Name stands where a dict belongs")


def test_an_array_s_objects_are_admitted_ones(tmp_path):
    """A name as an element, however deep."""
    for value in (mixed(1, 77), mixed(mixed(1, 77), [2]), [mixed({"k": (1, [77])})]):
        content = pickle.dumps(value, 2)
        assert content.count(b"K\x4d") == 1
        refused(tmp_path, content.replace(b"K\x4d", ADMITTED[0]), r"holds numpy\.ndarray itself")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Pwhatever\n.", "holds a persistent id"),
        (b"K\x01Q.", "holds a persistent id"),
        (b"\x82\x01.", "a code of copyreg's extension registry"),
        (b"\x83\x01\x00.", "a code of copyreg's extension registry"),
        (b"\x84\x01\x00\x00\x00.", "a code of copyreg's extension registry"),
        (b"\x97.", "an out-of-band buffer"),
        (b"\x98.", "an out-of-band buffer"),
    ],
)
def test_what_leads_out_of_the_file_is_refused(tmp_path, content, message):
    refused(tmp_path, content, message)


def test_a_registered_extension_is_refused_too(tmp_path, trap):
    copyreg.add_extension("os", "system", 7)
    try:
        refused(tmp_path, b"\x82\x07" + text(trap) + b"\x85R.", "extension registry")
    finally:
        copyreg.remove_extension("os", "system", 7)


def call(named, *args):
    return named + b"(" + b"".join(args) + b"tR"


RECONSTRUCT, NDARRAY = ADMITTED[-1], ADMITTED[0]
EMPTY = call(RECONSTRUCT, NDARRAY, b"K\x00\x85", b"C\x01b")
STATE = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def dtype(kind, state=STATE):
    return call(ADMITTED[1], text(kind), b"\x89\x88") + state


def array(shape, kind, content):
    return EMPTY + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"


def test_the_parts_of_the_next_tests_make_an_array(tmp_path):
    content = array(b"K\x02\x85", dtype("i2"), b"C\x04\x01\x00\x02\x00") + b"."
    assert same(read(tmp_path, content), np.array([1, 2], dtype="<i2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # arguments that the real functions would take
        (call(RECONSTRUCT, dtype("f8"), b"K\x00\x85", b"C\x01b"), "an array of the class"),
        (call(RECONSTRUCT, b"K\x01", b"K\x00\x85", b"C\x01b"), "an array of the class int"),
        (call(NDARRAY, b"K\x05\x85"), r"a call of numpy\.ndarray"),
        (call(ADMITTED[2], text("x"), text("rot13")), "_codecs.encode to 'rot13'"),
        (call(ADMITTED[2], b"K\x05", text("latin1")), "_codecs.encode to 'latin1'"),
        (call(ADMITTED[2], text("\u20ac"), text("latin1")), "is damaged.*UnicodeEncodeError"),
        (call(ADMITTED[1], text("f8,O"), b"\x89\x88"), "numpy.dtype of 'f8,O'"),
        (call(ADMITTED[1], text("M8[s]"), b"\x89\x88"), r"numpy.dtype of 'M8\[s\]'"),
        (call(ADMITTED[1], NDARRAY, b"\x89\x88"), "numpy.dtype of a _Name"),
        (call(ADMITTED[1], b"]", b"\x89\x88"), "numpy.dtype of a list"),
        (call(ADMITTED[3], b"K\x05"), "a container of what is no list"),
        (call(b"c__builtin__\nbytearray\n", b"J\xff\xff\xff\x7f"), "what are no bytes"),
        (call(b"c__builtin__\nbytes\n", b"J\xff\xff\xff\x7f"), "is damaged"),
        (call(b"K\x05", b"K\x01"), "a call of a int"),
        # a scalar or array that would read what is not its own
        (call(ADMITTED[5], dtype("f8"), b"C\x04abcd"), "another number of bytes"),
        (call(ADMITTED[5], dtype("O"), b"C\x08abcdefgh"), "bytes for the dtype object"),
        (call(ADMITTED[5], b"K\x01", b"C\x01a"), "no complete dtype"),
        (array(b"K\x03\x85", dtype("i2"), b"C\x04abcd"), "another number of bytes"),
        (array(b"K\x02\x85", dtype("i2"), b"]"), "another number of bytes"),
        (array(b"J\xfe\xff\xff\xff\x85", dtype("i2"), b"C\x04abcd"), "no tuple of integers"),
        (array(b"K\x02", dtype("i2"), b"C\x04abcd"), "no tuple of integers"),
        (array(b"K\x01\x85", dtype("O"), b"C\x08abcdefgh"), "another number of them"),
        (array(b"K\x02\x85", dtype("O"), b"]"), "another number of them"),
        (array(b"K\x02\x85", b"K\x05", b"C\x04abcd"), "no complete dtype"),
        (array(b"K\x02\x85", dtype("i2", b""), b"C\x04abcd"), "no complete dtype"),
        (array(b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", dtype("V0", b"("), b"C\x00"), "damaged"),
        # text that numpy would fail on later
        (call(ADMITTED[5], dtype("U1"), b"C\x04\xff\xff\xff\x7f"), "no characters"),
        (array(b"K\x02\x85", dtype("U1"), b"C\x08a\0\0\0\0\0\x11\0"), "no characters"),
        # a state twice, late, or for what has none
        (EMPTY, "has no content"),
        (b"]" + EMPTY + b"a", "has no content"),
        (dtype("f8", b""), "has no content"),
        (dtype("f8") + STATE[:-1] + b"b", "a change of a .*DType that is complete"),
        (array(b"K\x01\x85", dtype("u1"), b"C\x01a") + b"(K\x01tb", "a change of a ndarray"),
        (b"]}b", "a change of a list"),
        (EMPTY + b"}b", "a state is no tuple"),
        # dtypes that lie about their layout
        (dtype("f8", STATE.replace(b"J\xff\xff\xff\xff", b"K\x63", 1)), "another number of bytes"),
        (dtype("f8", STATE.replace(b"<", b"x", 1)), "byte order 'x'"),
        (dtype("f8", STATE.replace(b"NNN", b"N" + b"K\x01NN"[:3], 1)), "damaged"),
    ],
)
def test_admitted_functions_check_what_they_are_given(tmp_path, content, message):
    refused(tmp_path, content + b".", message)


def structure(fields, names=("a", "b"), size=8):
    """A dtype of `size` bytes with the fields a and b."""
    listed = b"".join(map(text, names))
    state = b"(K\x03" + text("|") + b"N(" + listed + b"t}(" + fields + b"u"
    return dtype(f"V{size}", state + b"K" + bytes([size]) + b"K\x01K\x10tb")


def field(name, kind, offset):
    return text(name) + dtype(kind) + b"K" + bytes([offset]) + b"\x86"


def test_fields_lie_within_their_structure(tmp_path):
    good = field("a", "i4", 0) + field("b", "i4", 4)
    assert read(tmp_path, structure(good) + b".") == np.dtype([("a", "<i4"), ("b", "<i4")])
    for fields, message in (
        (field("a", "i4", 0) + field("b", "i4", 200), "is damaged"),
        (field("a", "i4", 0) + field("b", "i4", 5), "is damaged"),
        (field("a", "i4", 0) + field("b", "O", 4), "is damaged|fields of objects"),
        (field("a", "i4", 0), "KeyError"),
        (field("a", "i4", 0) + text("b") + text("i4"), "no complete dtype"),
        (field("a", "i4", 0) + text("b") + structure(good) + b"K\x00\x86", "or of structures"),
    ):
        refused(tmp_path, structure(fields) + b".", message)
    words = structure(field("a", "i4", 0) + field("b", "U1", 4))
    for code, good in (b"\xff\xff\x10\0", True), (b"\0\0\x11\0", False):
        content = array(b"K\x01\x85", words, b"C\x08\0\0\0\0" + code) + b"."
        if good:
            assert read(tmp_path, content)["b"].tolist() == ["\U0010ffff"]
        else:
            refused(tmp_path, content, "no characters")
    refused(tmp_path, structure(field("a", "O", 0) + field("b", "O", 8), size=16) + b".", "objects")


def test_arrays_within_arrays_have_an_end(tmp_path):
    """numpy frees them by recursion: a long chain would end the process, not the reading."""
    value = 1
    for _ in range(DEEPEST):
        value = mixed(value)
    assert same(read(tmp_path, pickle.dumps(value, 2)), value)
    refused(tmp_path, pickle.dumps(mixed(value), 2), "arrays within arrays")
    objects = dtype("O")
    links = b"".join(EMPTY + b"(K\x01K\x01\x85" + objects + b"\x89]" for _ in range(3000))
    refused(tmp_path, links + b"K\x01" + b"atb" * 3000 + b".", "arrays within arrays")
    # an array that holds another before that one is filled
    early = EMPTY + b"q\x00" + array(b"K\x01\x85", objects, b"]h\x00a")
    refused(tmp_path, early + b".", "holds one that is not complete")


def test_depth_alone_does_no_harm(tmp_path):
    """100,000 lists in lists are read; as a key of a dict, Python would hash them by recursion."""
    deep = b"]" + b"\x85" * 100_000
    value = read(tmp_path, deep + b".")
    for _ in range(100_000):
        (value,) = value
    assert value == []
    refused(tmp_path, b"}K\x01" + b"\x85" * 100_000 + b"K\x01s.", "a tuple as a key")
    refused(tmp_path, b"}]K\x01s.", "a list as a key")
    for content in (
        call(ADMITTED[1], deep),
        call(ADMITTED[2], text("a"), deep),
        dtype("f8", b"(K\x03" + deep + b"NNNK\x01K\x01K\x00tb"),
        dtype("V8", b"(K\x03" + text("|") + b"N(" + deep + b"t}K\x08K\x01K\x10tb"),
    ):
        refused(tmp_path, content + b".", "holds|byte order a tuple|a field's name is no text")


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_that_was_cut_off_is_damaged(tmp_path, protocol):
    content = pickle.dumps([np.arange(5.0), {"a": "b" * 300}, (2**80, 1.5, b"x")], protocol)
    for n in range(len(content)):
        refused(tmp_path, content[:n], "is damaged, or no pickle .*; fetch it again")


def test_damage_of_any_byte_ends_in_a_value_or_a_sentence(tmp_path):
    rng = np.random.default_rng(0)
    value = [np.arange(5, dtype=">i4"), {"a": mixed("b", 1)}, np.float32(1), {2}, OrderedDict(a=1)]
    for protocol in PROTOCOLS:
        content = pickle.dumps(value, protocol)
        read_well = 0
        for _ in range(300):
            damaged = bytearray(content)
            for at in rng.integers(len(content), size=rng.integers(1, 4)):
                damaged[at] = rng.integers(256)
            try:
                read(tmp_path, bytes(damaged))
                read_well += 1
            except UserError as error:
                assert "x.pkl: " in str(error)
        assert read_well < 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends too early"),
        (b".", "IndexError"),
        (b"\x80\x06N.", "protocol 6; known are 0 to 5"),
        (b"PK\x03\x04", "persistent id|damaged"),
        (b"<html>", "unknown instruction b'<'"),
        (b"B\xff\xff\xff\x7fabc.", "2147483647 bytes announced, 4 left"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "bytes announced, 4 left"),
        (b"\x95\xff\x00\x00\x00\x00\x00\x00\x00N.", "ends too early"),
        (b"h\x05.", "KeyError"),
        (b"t.", "IndexError"),
        (b"(K\x01d.", "is damaged"),
        (b"]K\x01K\x02s.", "stands where a dict belongs"),
        (b"X\x01\x00\x00\x00\xff.", "UnicodeDecodeError"),
        (b"Sabc\n.", "has no quotes"),
        (b"Iabc\n.", "ValueError"),
        (b"I" + b"9" * 5000 + b"\n.", "ValueError"),
    ],
)
def test_what_is_no_pickle_is_damaged(tmp_path, content, message):
    refused(tmp_path, content, message)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--gallery=.*none\.pkl: there is no such file"):
        read_pickle(tmp_path / "none.pkl", "--gallery")
    with pytest.raises(UserError, match="there is no such file"):
        read_pickle(tmp_path, "--gallery")


def test_what_follows_the_first_pickle_is_not_read(tmp_path):
    file = io.BytesIO()
    pickle.dump([1], file)
    pickle.dump(Calls(os.system, f"touch {tmp_path / 'ran'}"), file)
    assert read(tmp_path, file.getvalue()) == [1]
    assert not (tmp_path / "ran").exists()
