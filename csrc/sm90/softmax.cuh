// The softmax step of the sm90 forward (F4, F5), row by row, so that the exponentials of one row
// run beside the maximum of the other.
#pragma once

#include "../core/softmax.cuh"

namespace flash_attn2::sm90 {

template <int kRows>
struct RowSoftmax : OnlineSoftmax<kRows> {
  using OnlineSoftmax<kRows>::max;
  using OnlineSoftmax<kRows>::sum;

  // Takes row i of a (kRows, columns) tile of scores into its maximum; true when it grew.
  template <class Scores>
  __device__ __forceinline__ bool update_max(int i, const Scores& scores) {
    before[i] = max[i];
    max[i] = fmaxf(quad_max(row_max(scores, i)), before[i]);
    return max[i] > before[i];
  }

  // When one grew, after all of update_max and before add: what the rows of the output have to be
  // multiplied by, as the sums are here. scale_log2 > 0.
  __device__ __forceinline__ void rescale(float (&factor)[kRows], float scale_log2) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // Equal maxima cover -inf == -inf, where the difference would be NaN.
      factor[i] = max[i] == before[i] ? 1.f : exp2f((before[i] - max[i]) * scale_log2);
      sum[i] *= factor[i];
    }
  }

  // Turns row i into P = exp2(scale_log2 * (S - max)) in place; its sum, for add.
  template <class Scores>
  __device__ __forceinline__ float exponentiate(int i, Scores& scores, float scale_log2) const {
    using namespace cute;
    const float max_scaled = max[i] == -INFINITY ? 0.f : max[i] * scale_log2;
    float even_sum = 0.f, odd_sum = 0.f;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); j += 2) {
      scores(i, j) = exp2f(scores(i, j) * scale_log2 - max_scaled);
      scores(i, j + 1) = exp2f(scores(i, j + 1) * scale_log2 - max_scaled);
      even_sum += scores(i, j);
      odd_sum += scores(i, j + 1);
    }
    return even_sum + odd_sum;
  }

  __device__ __forceinline__ void add(int i, float row_sum) { sum[i] += row_sum; }

 private:
  float before[kRows];  // maxima before the last update_max
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
