// The element half of the mask in wgmma's accumulators (steps F3 and B2).
#pragma once

#include <cute/tensor.hpp>

#include "../core/window.h"

namespace flash_attn2::sm90 {

// A thread holds columns 8 n and 8 n + 1, counted from its first, of two rows. Which of these lie
// below `limit`: bit 2 n + c for column 8 n + c, of at most 128 columns.
__device__ __forceinline__ uint32_t columns_below(int limit) {
  const int columns = clamp(limit, 0, 128);
  return uint32_t((uint64_t{1} << (columns / 8 * 2 + min(columns % 8, 2))) - 1);
}

// Sets what is hidden in a thread's accumulators, ((2, 2, columns / 8), 1, 1), to -inf. visible(j):
// the columns [begin, end) of row j that are not, counted from the thread's first. As bits, of
// which one instruction makes seven predicates; comparing with the bounds takes two for each
// element.
template <class Acc, class Visible>
__device__ __forceinline__ void hide_columns(Acc& acc, const Visible& visible) {
  CUTE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const BlockRange columns = visible(j);
    const uint32_t bits = columns_below(columns.end) & ~columns_below(columns.begin);
    CUTE_UNROLL
    for (int n = 0; n < cute::size(acc) / 2; ++n) {
      if (!(bits >> n & 1)) acc(n / 2 * 4 + j * 2 + n % 2) = -INFINITY;
    }
  }
}

}  // namespace flash_attn2::sm90
