// The softmax step of the sm90 forward (F4, F5), in two parts: P is computed while the tensor cores
// still add to the output, which is rescaled afterwards.
#pragma once

#include "../core/softmax.cuh"

namespace flash_attn2::sm90 {

template <int kRows>
struct OverlappedSoftmax : OnlineSoftmax<kRows> {
  using OnlineSoftmax<kRows>::max;
  using OnlineSoftmax<kRows>::sum;

  // Turns a (kRows, columns) tile of scores into P = exp2(scale_log2 * (S - max)) in place. True
  // when a maximum of this warp grew: the rows of the output have then to be multiplied by
  // `factor`, as the sums already were. scale_log2 > 0.
  template <class Scores>
  __device__ __forceinline__ bool update(Scores& scores, float (&factor)[kRows], float scale_log2) {
    using namespace cute;
    float before[kRows], block_sum[kRows];
    bool grew = false;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      before[i] = max[i];
      max[i] = fmaxf(quad_max(row_max(scores, i)), before[i]);
      grew |= max[i] > before[i];
    }
    grew = __any_sync(0xffffffffu, grew);
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float max_scaled = max[i] == -INFINITY ? 0.f : max[i] * scale_log2;
      float odd_sum = 0.f;
      block_sum[i] = 0.f;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); j += 2) {
        scores(i, j) = exp2f(scores(i, j) * scale_log2 - max_scaled);
        scores(i, j + 1) = exp2f(scores(i, j + 1) * scale_log2 - max_scaled);
        block_sum[i] += scores(i, j);
        odd_sum += scores(i, j + 1);
      }
      block_sum[i] += odd_sum;
    }
    // After the exponentials: a branch before them would let ptxas wait for the products first.
    if (grew) {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        // Equal maxima cover -inf == -inf, where the difference would be NaN.
        factor[i] = max[i] == before[i] ? 1.f : exp2f((before[i] - max[i]) * scale_log2);
        sum[i] *= factor[i];
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) sum[i] += block_sum[i];
    return grew;
  }
};

// Multiplies the rows of `out` (kRows, columns).
template <int kRows, class Out>
__device__ __forceinline__ void scale_rows(Out& out, const float (&factor)[kRows]) {
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(out); ++j) out(i, j) *= factor[i];
  }
}

}  // namespace flash_attn2::sm90
