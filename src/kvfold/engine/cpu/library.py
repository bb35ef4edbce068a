"""The native library: where it lies, whether it loads, which SIMD levels it has. Mirrors the headers of csrc/."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int16, c_int32, c_int64, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import InvalidConfig, NoImplementation

ABI_VERSION = 6
LEVEL_VARIABLE = "KVFOLD_CPU_LEVEL"
OK, UNSUPPORTED, NON_FINITE, NO_LEVEL, NO_MEMORY = range(5)
SCALE_RULES = ("norm", "unbiased", "least-squares", "match")


class TrellisReader(Structure):
    _fields_ = (
        ("widths", c_int32 * 2),
        ("affine_low", c_uint64 * 2),
        ("affine_high", c_uint64 * 2),
        ("levels", c_int8 * 64),
        ("starts", c_uint8 * 4),
        ("pairs", c_void_p),
    )


class Trellis(Structure):
    _fields_ = (
        ("period", c_int32),
        ("width", c_int32 * 4),
        ("index", c_void_p * 4),
        ("levels", c_int32),
        ("level", c_int16 * 64),
        ("grid", c_int32),
        ("clip", c_int32),
        ("shift", c_int32),
        ("gain", c_float),
        ("starts", c_uint64),
    )


class Side(Structure):
    _fields_ = (
        ("bits", c_int32),
        ("scale_rule", c_int32),
        ("searches", c_int32),
        ("step", c_float),
        ("thresholds", c_float * 15),
        ("levels", c_int8 * 16),
        ("trellis", POINTER(TrellisReader)),
        ("search", POINTER(Trellis)),
    )


class Format(Structure):
    _fields_ = (
        ("head_dim", c_int32),
        ("kv_heads", c_int32),
        ("sinks", c_int32),
        ("centre", c_int32),
        ("key", Side),
        ("value", Side),
        ("key_signs", c_void_p),
        ("value_signs", c_void_p),
    )


class Vectors(Structure):
    _fields_ = (("data", c_void_p), ("outer_stride", c_int64), ("head_stride", c_int64), ("inner_stride", c_int64))


class Sequence(Structure):
    _fields_ = (
        ("pages", c_void_p),
        ("folded", c_int64),
        ("recent", c_int64),
        ("pads", c_int64),
        ("recent_key", Vectors),
        ("recent_value", Vectors),
        ("sink_key", Vectors),
        ("sink_value", Vectors),
        ("recent_table", c_void_p),
        ("recent_block", c_int64),
        ("skipped", c_int64),
    )


class AttendRequest(Structure):
    _fields_ = (
        ("format", POINTER(Format)),
        ("sequences", POINTER(Sequence)),
        ("batch", c_int32),
        ("query_heads", c_int32),
        ("query_tokens", c_int32),
        ("query_dtype", c_int32),
        ("exact_dtype", c_int32),
        ("level", c_int32),
        ("threads", c_int32),
        ("softmax_scale", c_float),
        ("query", Vectors),
        ("new_key", Vectors),
        ("new_value", Vectors),
        ("output", c_void_p),
    )


SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "kvf_abi_version": (c_int32, []),
    "kvf_sources": (c_char_p, []),
    "kvf_level_count": (c_int32, []),
    "kvf_level_name": (c_char_p, [c_int32]),
    "kvf_level_reason": (c_char_p, [c_int32]),
    "kvf_row_bytes": (c_int64, [POINTER(Format)]),
    "kvf_fold": (
        c_int32,
        [POINTER(Format), c_int32, c_int32, c_int32, Vectors, Vectors, c_int64, c_int32, POINTER(c_uint64)],
    ),
    "kvf_unfold": (c_int32, [POINTER(Format), c_int32, c_void_p, c_void_p, c_void_p]),
    "kvf_to_canonical": (c_int32, [POINTER(Format), c_void_p, c_void_p]),
    "kvf_from_canonical": (c_int32, [POINTER(Format), c_void_p, c_void_p]),
    "kvf_attend": (c_int32, [POINTER(AttendRequest)]),
    "kvf_advise_huge": (None, [c_void_p, c_int64]),
    "kvf_read": (c_int64, [c_int32, c_int32, POINTER(c_uint64), c_int64, c_int64]),
}


@dataclass(frozen=True)
class Level:
    """A SIMD level of the library; `reason` says why it cannot run on this machine, empty if it can."""

    index: int
    name: str
    reason: str


def library_path() -> Path:
    """Beside this file, where scripts/build-native puts it; in an editable installation, in the other folder of this package."""
    name = "libkvfold_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    places = [Path(__file__).parent / name, *(Path(folder) / name for folder in sys.modules[__package__].__path__)]
    return next((p for p in places if p.exists()), places[0])


@functools.cache
def _open() -> ctypes.CDLL | str:
    path = library_path()
    if not path.exists():
        return "this installation has no native library (it was built without a C++ compiler)"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library does not load: {error}"
    if lib.kvf_abi_version() != ABI_VERSION:
        return f"the native library has interface {lib.kvf_abi_version()}, this package wants {ABI_VERSION}: reinstall kvfold"
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if differs(lib.kvf_sources().decode(), Path(__file__).parents[4]):
        return "the native library was built from other sources than those beside it: run scripts/build-native"
    return lib


def differs(built_from: str, root: Path) -> bool:
    """Whether a library of this hash (CMakeLists.txt) was built from other sources than those in `root`, if it has any."""
    inputs = [*(root / "csrc").rglob("*.cpp"), *(root / "csrc").rglob("*.h")]
    if not built_from or not inputs:
        return False
    names = ["CMakeLists.txt", *sorted(p.relative_to(root).as_posix() for p in inputs)]
    hashes = "".join(hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest() != built_from


def missing() -> str:
    """Why the native library cannot be used; empty if it can."""
    lib = _open()
    return lib if isinstance(lib, str) else ""


def call(name: str) -> Callable[..., int]:
    """A function of the library. Raises NoImplementation when it cannot be loaded."""
    lib = _open()
    if isinstance(lib, str):
        raise NoImplementation.of("the CPU engine", [("cpu", [lib])])
    function: Callable[..., int] = getattr(lib, name)
    return function


@functools.cache
def levels() -> tuple[Level, ...]:
    """Every level in the library, best first."""
    names, reasons = call("kvf_level_name"), call("kvf_level_reason")
    count = call("kvf_level_count")()
    return tuple(Level(i, names(i).decode(), reasons(i).decode()) for i in range(count))  # type: ignore[attr-defined]


def choose_level(wanted: str | None = None) -> Level:
    """The best level of this machine, or the one named by the argument or by KVFOLD_CPU_LEVEL.

    Raises InvalidConfig for an unknown name, NoImplementation for one that cannot run here.
    """
    name = wanted or os.environ.get(LEVEL_VARIABLE) or "auto"
    if name == "auto":
        return next(level for level in levels() if not level.reason)
    for level in levels():
        if level.name == name:
            if level.reason:
                raise NoImplementation.of(f"CPU level {name!r}", [(name, [level.reason])])
            return level
    raise InvalidConfig(f"unknown CPU level {name!r}", f"Use one of: auto, {', '.join(v.name for v in levels())}")


def default_threads() -> int:
    """Threads of torch when it is loaded, else OMP_NUM_THREADS, else the processors this process may use."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    omp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if omp.isdigit() and int(omp) > 0:
        return int(omp)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
