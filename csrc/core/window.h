// Which blocks of keys a block of queries sees, and the reverse: the block-skipping half of the
// mask (paper, section 3.1: causal masking). Plain integers, shared by host tests and kernels.
#pragma once

#include <climits>

#include "params.h"

#ifdef __CUDACC__
#define FLASH_ATTN2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_ATTN2_HOST_DEVICE inline
#endif

namespace flash_attn2 {

// Half-open range of block or row indices; empty when end <= begin.
struct BlockRange {
  int begin, end;

  // For begin <= end, which may be further apart than an int can tell.
  FLASH_ATTN2_HOST_DEVICE bool contains(int x) const {
    return unsigned(x) - unsigned(begin) < unsigned(end) - unsigned(begin);
  }
};

FLASH_ATTN2_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
FLASH_ATTN2_HOST_DEVICE int clamp(int x, int low, int high) {
  return x < low ? low : (x > high ? high : x);
}

// The window of one problem in key coordinates, its bounds normalised by make_window (csrc/plan):
// at most the sequences' lengths, so that no sum here overflows. A query row r sees the keys
// [first(r), end(r)).
struct VisibleKeys {
  int seqlen_q, seqlen_k;
  int left, right;  // negative: unbounded

  FLASH_ATTN2_HOST_DEVICE VisibleKeys(const AttentionShape& shape, const Window& window)
      : seqlen_q(shape.seqlen_q),
        seqlen_k(shape.seqlen_k),
        left(window.left),
        right(window.right) {}

  FLASH_ATTN2_HOST_DEVICE int position(int row) const { return row + seqlen_k - seqlen_q; }

  FLASH_ATTN2_HOST_DEVICE int first(int row) const {
    return left < 0 ? 0 : clamp(position(row) - left, 0, seqlen_k);
  }
  // One past the last visible key.
  FLASH_ATTN2_HOST_DEVICE int end(int row) const {
    return right < 0 ? seqlen_k : clamp(position(row) + right + 1, 0, seqlen_k);
  }

  // Key blocks that at least one of the rows [row_begin, row_begin + tile_m) sees.
  FLASH_ATTN2_HOST_DEVICE BlockRange key_blocks(int row_begin, int tile_m, int tile_n) const {
    const int row_end = row_begin + tile_m < seqlen_q ? row_begin + tile_m : seqlen_q;
    return {first(row_begin) / tile_n, ceil_div(end(row_end - 1), tile_n)};
  }

  // Those of them of which each of the rows sees every key; a mask is for the others.
  FLASH_ATTN2_HOST_DEVICE BlockRange whole_key_blocks(int row_begin, int tile_m, int tile_n) const {
    return {ceil_div(first(row_begin + tile_m - 1), tile_n), end(row_begin) / tile_n};
  }

  // Query blocks with at least one row that sees a key of [key_begin, key_begin + tile_n).
  FLASH_ATTN2_HOST_DEVICE BlockRange query_blocks(int key_begin, int tile_m, int tile_n) const {
    const int key_end = key_begin + tile_n < seqlen_k ? key_begin + tile_n : seqlen_k;
    const int offset = seqlen_k - seqlen_q;
    const int row_begin = right < 0 ? 0 : clamp(key_begin - right - offset, 0, seqlen_q);
    const int row_end = left < 0 ? seqlen_q : clamp(key_end + left - offset, 0, seqlen_q);
    return {row_begin / tile_m, ceil_div(row_end, tile_m)};
  }

  // Rows that see `key`, not yet cut to the sequence: [begin, end), and none past the keys' end.
  FLASH_ATTN2_HOST_DEVICE BlockRange rows_of_key(int key) const {
    const int row = key - (seqlen_k - seqlen_q);
    if (key >= seqlen_k) return {0, 0};
    return {right < 0 ? 0 : row - right, left < 0 ? seqlen_q : row + left + 1};
  }

  // The rows at which a tile may begin that needs no mask, not yet cut to the sequence.
  FLASH_ATTN2_HOST_DEVICE BlockRange whole_rows(int tile_m, int key_begin, int tile_n) const {
    const int offset = seqlen_k - seqlen_q;
    const int begin = right < 0 ? INT_MIN / 2 : key_begin + tile_n - 1 - right - offset;
    const int end = left < 0 ? INT_MAX : key_begin + left - offset - tile_m + 2;
    if (key_begin + tile_n > seqlen_k || end < begin) return {0, 0};
    return {begin, end};
  }

  // True when some (row, key) of the tile is hidden, or lies outside the sequences' keys.
  FLASH_ATTN2_HOST_DEVICE bool tile_needs_mask(int row_begin, int tile_m, int key_begin,
                                               int tile_n) const {
    return key_begin + tile_n > end(row_begin) || key_begin < first(row_begin + tile_m - 1);
  }
};

}  // namespace flash_attn2
