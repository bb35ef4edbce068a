"""The Triton kernels compile for GPUs that are not here, NVIDIA's and AMD's, within budgets of shared memory and spills.

Compiling needs Triton without its interpreter, so this file runs itself in another process: python test_triton_compile.py ARCH.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Shared memory of a block, bytes. AMD's chips have 64 kB.
SHARED = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}
# (codec and bits of both sides, head_dim, columns of a tile, dtype, bytes of spills a thread)
CASES = [
    ("mse", 3, 128, 16, "bf16", 0),
    ("mse", 4, 96, 64, "fp16", 256),
    ("uniform", 2, 256, 32, "bf16", 1024),  # on gfx942 only; 40 elsewhere
    ("trellis", 3.5, 128, 16, "bf16", 256),
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_fit(arch: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, arch], capture_output=True, text=True, env={**env, "TRITON_CACHE_DIR": cache}
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(CASES) + 1  # and the search of a trellis code
    for kernel in found:
        print(kernel)
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["spilled"] <= kernel["budget"], kernel


def spilled(binary: Any) -> int:
    """Bytes of a thread's local memory."""
    if "amdgcn" in binary.asm:
        return int(re.findall(r"ScratchSize: (\d+)", binary.asm["amdgcn"])[0])
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


def compile_case(arch: str, codec: str, bits: float, dim: int, tile: int, dtype: str) -> list[Any]:
    """The kernels of a layer with 8 KV heads and groups of 4, softcapped, with a window and sink logits."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvfold.codebook.trellis import code
    from kvfold.config import CacheSpec, SideSpec
    from kvfold.engine.request import LayerShape
    from kvfold.engine.triton import OPTIONS, engine, kernels, viterbi

    side = SideSpec(codec, bits)
    engine.DEVICES = ("cpu",)
    layer = engine.TritonEngine(CacheSpec(side, side), LayerShape(0, 8, dim, 2), torch.bfloat16, torch.device("cpu"))
    call = (8, 4, tile, dim, dim, 4, 50.0, 4096)
    book = "*i16" if codec == "trellis" else "*i32"
    pages = {"queries": "*fp32", "rows": "*i64", "key_book": book, "value_book": book, "parts": "*fp32", "new": "i32"}
    finish = {"q": f"*{dtype}", "out": f"*{dtype}", "rows": "*i64", "turns": "*fp32", "parts": "*fp32"}
    finish |= {"splits": "i32", "new": "i32", "scale": "fp32", "sink_logits": "*fp32"}
    dot = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16}[dtype]
    sources = [
        ASTSource(
            kernels.pages,
            pages | {"CALL": "constexpr", "PAGES": "constexpr"},
            {"CALL": call, "PAGES": layer._page_shape},
        ),
        ASTSource(kernels.finish, finish | {"CALL": "constexpr", "DOT": "constexpr"}, {"CALL": call, "DOT": dot}),
    ]
    if codec == "trellis":
        search = {"inputs": "*i32", "levels": "*i32", "back": "*u8", "symbols": "*u8", "first": "*u8"}
        search |= {"count": "i32", "start": "*i32", "CODE": "constexpr", "D": "constexpr", "N": "constexpr"}
        numbers = viterbi.Search(code(bits), torch.device("cpu")).code
        sources.append(ASTSource(viterbi.search, search, {"CODE": numbers, "D": dim, "N": viterbi.VECTORS}))
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    return [triton.compile(s, target=target, options=OPTIONS) for s in sources]


def main() -> None:
    for *case, budget in CASES:
        for binary in compile_case(sys.argv[1], *case):
            usage = {"shared": binary.metadata.shared, "spilled": spilled(binary), "budget": budget}
            print(json.dumps({"case": case, "kernel": binary.metadata.name, **usage}), flush=True)


if __name__ == "__main__":
    main()
