"""The CUDA driver and NVRTC through ctypes: compile a kernel variant once per machine, load it, launch it.

No CUDA toolkit is needed: NVRTC and the driver come with any CUDA build of torch. Cubins are kept in $KVFOLD_CUDA_CACHE
or ~/.cache/kvfold/cuda, named by a hash of source, variant, architecture and compiler version.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import glob
import hashlib
import os
import re
import sys
import tempfile
import threading
from importlib import resources
from pathlib import Path

from kvfold.errors import KvfoldError, NoImplementation

SOURCES = resources.files("kvfold.engine.cuda") / "kernels"
INCLUDE = re.compile(r'^#include "([a-z_0-9]+\.cuh)"$', re.M)
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
COMPILER_STACK = 256 << 20  # bytes, of which what is used is touched
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


_STACK = threading.Lock()


class CudaError(KvfoldError, RuntimeError):
    """A call of the driver or of NVRTC failed."""


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The NVRTC library: the one torch ships, else the system's."""
    names = []
    for folder in sys.path:
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libnvrtc.so.*")), reverse=True)
    for name in (*names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        if "alt" in name:
            continue
        try:
            # Some builds open this one by name alone and do not look beside themselves; loaded before, it is found.
            for part in glob.glob(os.path.join(os.path.dirname(name), "libnvrtc-builtins.so.*")):
                ctypes.CDLL(part)
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NoImplementation("NVRTC was not found", "Install a CUDA build of torch, or the package nvidia-cuda-nvrtc")


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def missing() -> str:
    """Why kernels cannot be compiled here; empty if they can."""
    try:
        nvrtc()
        driver()
    except (NoImplementation, OSError) as e:
        return str(e).split(". ")[0]
    return ""


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what} failed with CUDA error {code}: {(text.value or b'?').decode()}")


def source(name: str) -> str:
    """One kernel with its includes written in place, each once."""
    seen: set[str] = set()

    def expand(text: str) -> str:
        def put(m: re.Match[str]) -> str:
            if m[1] in seen:
                return ""
            seen.add(m[1])
            return expand((SOURCES / m[1]).read_text())

        return INCLUDE.sub(put, text.replace("#pragma once\n", ""))

    return expand((SOURCES / name).read_text())


def specialised(name: str, variant: tuple[int, ...]) -> str:
    """A kernel's whole source with its compile-time constants."""
    return f"#define VARIANT {', '.join(map(str, variant))}\n{source(name)}"


def cache_folder() -> Path:
    return Path(os.environ.get("KVFOLD_CUDA_CACHE") or Path.home() / ".cache" / "kvfold" / "cuda")


def compile_cubin(name: str, variant: tuple[int, ...], arch: str) -> bytes:
    """Machine code of kernels/`name` for `arch` (such as "90a"), from the cache on disk or by NVRTC."""
    lib = nvrtc()
    version = (ctypes.c_int * 2)()
    lib.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, 4))
    text = specialised(name, variant)
    tag = hashlib.sha256(f"{arch} {version[0]}.{version[1]}\n{text}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{name.split('.')[0]}-{tag}.cubin"
    if path.exists():
        return path.read_bytes()
    code, _ = compile_text(name, text, arch)
    _store(path, code)
    return code


def compile_text(name: str, text: str, arch: str) -> tuple[bytes, str]:
    """Machine code of a source and the compiler's report on its resources."""
    # Long unrolled loops overflow the compiler's recursion on a thread of the usual size.
    with _STACK:
        before = threading.stack_size(COMPILER_STACK)
        try:
            pool = concurrent.futures.ThreadPoolExecutor(1)
            job = pool.submit(_compile, name, text, arch)
        finally:
            threading.stack_size(before)
    with pool:
        return job.result()


def _compile(name: str, text: str, arch: str) -> tuple[bytes, str]:
    lib, program = nvrtc(), ctypes.c_void_p()
    _nvrtc(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None), "create")
    options = [
        f"--gpu-architecture=sm_{arch}",
        "--std=c++17",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    ]
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    report = log.value.decode(errors="replace")
    if failed:
        raise CudaError(f"NVRTC could not compile {name} for sm_{arch}: {report[:2000]}")
    _nvrtc(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "get the size of the machine code")
    code = ctypes.create_string_buffer(size.value)
    _nvrtc(lib.nvrtcGetCUBIN(program, code), "get the machine code")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw, report


def _nvrtc(code: int, what: str) -> None:
    if code:
        raise CudaError(f"NVRTC could not {what}: error {code}")


def _store(path: Path, data: bytes) -> None:
    """Write by rename, so that another process never reads half a file. A folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(data)
        os.replace(f.name, path)
    except OSError:
        return


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        *((f"grid_{a}", ctypes.c_uint) for a in "xyz"),
        *((f"block_{a}", ctypes.c_uint) for a in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Kernel:
    """One compiled variant, loaded on the current device of the calling thread."""

    def __init__(self, name: str, variant: tuple[int, ...], arch: str, info: int) -> None:
        """info: how many ints the kernel's info array holds; the first is its shared memory in bytes."""
        cuda, stem = driver(), name.split(".")[0]
        self._code = compile_cubin(name, variant, arch)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(cuda.cuModuleLoadData(ctypes.byref(module), self._code), f"loading {name}")
        entry = f"kvfold_{stem}".encode()
        _check(cuda.cuModuleGetFunction(ctypes.byref(self._function), module, entry), f"finding {entry!r}")
        address, size = ctypes.c_uint64(), ctypes.c_size_t()
        _check(
            cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, entry + b"_info"),
            "reading info",
        )
        self.info = (ctypes.c_int * info)()
        _check(cuda.cuMemcpyDtoH_v2(self.info, address, ctypes.c_size_t(4 * info)), "reading info")
        self.shared_bytes = self.info[0]
        _check(
            cuda.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, self.shared_bytes), "asking for shared memory"
        )
        _check(cuda.cuFuncSetAttribute(self._function, CARVEOUT, 100), "asking for shared memory")
        self._attribute = _Attribute(PROGRAMMATIC, b"", 1, b"")

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        arguments: ctypes.Structure,
        dependent: bool = False,
    ) -> None:
        """Enqueue on a stream. dependent: may start while the launch before it still runs (the kernel waits by itself)."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        config = _Config(
            *grid, threads, 1, 1, self.shared_bytes, stream, ctypes.pointer(self._attribute), int(dependent)
        )
        _check(driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "launch")


@functools.cache
def kernel(name: str, variant: tuple[int, ...], capability: tuple[int, int], info: int) -> Kernel:
    """The variant for a chip, compiled and loaded once per process."""
    return Kernel(name, variant, f"{capability[0]}{capability[1]}", info)
