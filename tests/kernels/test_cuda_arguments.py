"""How the host shares rows among blocks. Runs without a GPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfold.engine.cuda.arguments import share


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
