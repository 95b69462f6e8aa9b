// The element half of the mask in mma.sync's accumulators (steps F3 and B2).
#pragma once

#include <cute/tensor.hpp>

#include "../core/window.h"

namespace flash_attn2::sm80 {

// Sets the hidden entries of a score tile to -inf.
//   scores, coords: (rows, columns) views of one thread's accumulators and of their coordinates
//   (row, column) inside the tile, whose first element is (row_begin, key_begin).
template <class Scores, class Coords>
__device__ __forceinline__ void apply_mask(Scores& scores, const Coords& coords,
                                           const VisibleKeys& visible, int row_begin,
                                           int key_begin) {
  using namespace cute;
  // The bounds of the rows do not change from tile to tile. Hidden from the optimizer here, they
  // are worked out in the few tiles that need them instead of held in registers through all.
  asm volatile("" : "+r"(row_begin));
  CUTE_UNROLL
  for (int i = 0; i < size<0>(scores); ++i) {
    const int row = row_begin + get<0>(coords(i, 0));
    const int first = visible.first(row) - key_begin;
    const int end = visible.end(row) - key_begin;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) {
      const int column = get<1>(coords(i, j));
      if (column < first || column >= end) scores(i, j) = -INFINITY;
    }
  }
}

}  // namespace flash_attn2::sm80
