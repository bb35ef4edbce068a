"""What kernels are handed: rows of memory, and how blocks share them, by the host and in the kernels. Runs without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.engine.cuda.arguments import share
from kvfold.engine.cuda.memory import dense


@given(st.integers(1, 4096), st.integers(1, 200))
def test_no_block_has_part_of_a_row_and_another(rows: int, all_blocks: int) -> None:
    blocks, parts = share(rows, all_blocks)
    assert 1 <= blocks <= all_blocks
    if parts:
        assert blocks == parts * rows
        assert 4 * blocks >= 3 * all_blocks
    else:
        assert rows % blocks == 0 or blocks == all_blocks
        assert blocks >= all_blocks - all_blocks // 16


def test_batches_of_a_small_model_on_an_h200() -> None:
    """8 KV heads, 132 multiprocessors: a row of a batch of 1, 2, 4, 8, 16, 32 sequences by 16, 8, 4, 2, 1 blocks, two by one."""
    got = [share(8 * batch, 132) for batch in (1, 2, 4, 8, 16, 32)]
    assert got == [(128, 16), (128, 8), (128, 4), (128, 2), (128, 1), (128, 0)]


@pytest.mark.parametrize("blocks", [1, 68, 132, 148])
def test_kernels_leave_nothing_out(blocks: int, tmp_path: Path) -> None:
    """The kernels' own source, compiled for this machine, walks through random batches."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    program = tmp_path / "share_covers"
    source = Path(__file__).with_name("share_covers.cpp")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True, capture_output=True)
    cases = [
        str(x)
        for rows in (*range(1, 41), 64, 72, 96, 100, 128, 129, 132, 200, 256, 264, 512)
        for x in (rows, *share(rows, blocks))
    ]
    done = subprocess.run([program, str(blocks), str(blocks), *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_rows_of_exact_tokens_lie_one_after_the_other() -> None:
    """The kernels step from row to row by D; keys and values that were copied together are 2 D apart."""
    both = torch.randn(2, 7, 2 * 64)
    for x in (*both.chunk(2, dim=-1), both[..., :64].contiguous()):
        rows = dense(x)
        assert torch.equal(rows, x)
        assert rows.stride(-2) == 64
    assert dense(both) is both
