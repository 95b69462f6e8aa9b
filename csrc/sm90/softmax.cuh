// The softmax step of the sm90 forward (F4, F5), row by row, so that the exponentials of one row
// run beside the maximum of the other.
#pragma once

#include "../core/softmax.cuh"

namespace flash_attn2::sm90 {

template <int kRows>
struct RowSoftmax : OnlineSoftmax<kRows> {
  using OnlineSoftmax<kRows>::max;
  using OnlineSoftmax<kRows>::sum;

  // Takes row i of a (kRows, columns) tile of scores into its maximum. True when it grew: the row
  // of the output has then to be multiplied by `factor`, as its sum already was. scale_log2 > 0.
  template <class Scores>
  __device__ __forceinline__ bool update_max(int i, const Scores& scores, float& factor,
                                             float scale_log2) {
    const float before = max[i];
    max[i] = fmaxf(quad_max(row_max(scores, i)), before);
    // Equal maxima cover -inf == -inf, where the difference would be NaN.
    factor = max[i] == before ? 1.f : exp2f((before - max[i]) * scale_log2);
    sum[i] *= factor;
    return max[i] > before;
  }

  // Turns row i into P = exp2(scale_log2 * (S - max)) in place.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(int i, Scores& scores, float scale_log2) {
    using namespace cute;
    const float max_scaled = max[i] == -INFINITY ? 0.f : max[i] * scale_log2;
    float odd_sum = 0.f;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); j += 2) {
      scores(i, j) = exp2f(scores(i, j) * scale_log2 - max_scaled);
      scores(i, j + 1) = exp2f(scores(i, j + 1) * scale_log2 - max_scaled);
      sum[i] += scores(i, j);
      odd_sum += scores(i, j + 1);
    }
    sum[i] += odd_sum;
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
