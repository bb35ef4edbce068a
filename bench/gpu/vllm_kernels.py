"""The kernels that the programs of vLLM in this folder need, compiled on a machine without a GPU for one that has.

    pip install --target NVRTC nvidia-cuda-nvrtc==13.0.*        # the version that the other machine's torch brings
    PYTHONPATH=src:NVRTC KVFOLD_CUDA_CACHE=.carry/vllm/kernels python bench/gpu/vllm_kernels.py [--arch 90]

With KVFOLD_CUDA_CACHE naming that folder there, an engine starts without half a minute of compiling.
"""

from __future__ import annotations

import argparse

from kvfold import profiles
from kvfold.codebook.trellis import code
from kvfold.config import CacheSpec
from kvfold.engine.cuda.arguments import plan_rings, shared_limit
from kvfold.engine.cuda.driver import compile_cubin
from kvfold.engine.cuda.folding import parities_of
from kvfold.engine.cuda.formats import format_of

DIM = 128  # of the shipped model and of Llama-3.1-8B
COLUMN_GROUPS = (1, 2, 4)


def variants(spec: CacheSpec, dtype: int, capability: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Of one layer, in bfloat16 (0) or float16 (1)."""
    sides = (spec.key, spec.value)
    k, v = (format_of(s.codec, s.bits) for s in sides)
    centre, bulk = int(spec.centre), int(capability >= (9, 0))
    out: list[tuple[str, tuple[int, ...]]] = [("enter.cu", (DIM,)), ("unfold.cu", (DIM, k, v, centre, dtype))]
    for groups in COLUMN_GROUPS:
        rings = plan_rings(DIM, (k, v), spec.centre, groups, shared_limit(capability))
        out.append(("decode.cu", (DIM, k, v, centre, groups, *rings, bulk, dtype, 0)))
    if spec.key.codec != "trellis":
        return [*out, ("fold.cu", (DIM, k, v, centre, dtype))]
    for side, s in enumerate(sides):
        book = code(s.bits)
        out.append(("fold_trellis.cu", (DIM, k, v, centre, dtype, side, *parities_of(book))))
        out.append(("viterbi.cu", (DIM, book.widths[0], book.widths[-1])))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="turbo-3,balanced")
    parser.add_argument("--arch", default="90")
    given = parser.parse_args()
    capability = (int(given.arch[:-1]), int(given.arch[-1]))
    specs = [profiles.load(name).spec for name in given.profiles.split(",")]
    wanted = {x for spec in specs for dtype in (0, 1) for x in variants(spec, dtype, capability)}
    for name, variant in sorted(wanted):
        print(name, variant, len(compile_cubin(name, variant, given.arch)), "bytes", flush=True)


if __name__ == "__main__":
    main()
