"""Which tiles need a mask, as the kernels ask (csrc/core/window.h)."""

import random

import pytest
from plans import EXTENSION, RANDOM_WINDOWS, needs_extension

pytestmark = needs_extension


def is_hidden(row: int, key: int, seqlens: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether ``row`` does not see ``key``; -1 for a side without bound."""
    (seqlen_q, seqlen_k), (left, right) = seqlens, window
    position = row + seqlen_k - seqlen_q
    before, after = left >= 0 and key < position - left, right >= 0 and key > position + right
    return key >= seqlen_k or before or after


@pytest.mark.parametrize("mask", RANDOM_WINDOWS)
def test_tiles_need_a_mask_when_some_of_them_is_hidden(mask):
    rng = random.Random(mask)
    for _ in range(150):
        seqlens = rng.randint(1, 700), rng.randint(1, 700)
        window = RANDOM_WINDOWS[mask](rng, *seqlens)
        tile_m, tile_n = rng.choice((64, 128, 192)), rng.choice((40, 48, 64, 80, 96, 112, 128))
        for row, key, *answers in EXTENSION.tiles_to_mask(*seqlens, *window, tile_m, tile_n):
            # What is hidden reaches a corner: the last key of the first row or the other way round.
            # Rows past the sequence's end may count or not.
            first_row_is_cut = is_hidden(row, key + tile_n - 1, seqlens, window)
            allowed = {
                first_row_is_cut or is_hidden(last_row, key, seqlens, window)
                for last_row in (row + tile_m - 1, min(row + tile_m, seqlens[0]) - 1)
            }
            problem = (seqlens, window, tile_m, tile_n, row, key)
            assert len(set(answers)) == 1 and answers[0] in allowed, (problem, answers)
