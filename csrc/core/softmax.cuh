// Online softmax (paper, section 3.1.1; steps F4, F5 and F7).
#pragma once

#include <cute/tensor.hpp>

namespace flash_attn2 {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// The four threads of a quad share the rows of an mma.sync accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x + __shfl_xor_sync(0xffffffffu, x, 1);
}

// The largest score of a thread's row i. Like the sums below, in two chains: half the latency of
// one.
template <class Scores>
__device__ __forceinline__ float row_max(const Scores& scores, int i) {
  float even = scores(i, 0), odd = scores(i, 1);
  CUTE_UNROLL
  for (int j = 2; j < cute::size<1>(scores); j += 2) {
    even = fmaxf(even, scores(i, j));
    odd = fmaxf(odd, scores(i, j + 1));
  }
  return fmaxf(even, odd);
}

// State of kRows rows held by one thread (replicated over its quad). The maximum is exact: one that
// lags behind would save most of the rescaling, but costs 5% of accuracy, for the largest P of a
// row is then no longer exactly 1 in fp16 and bf16.
template <int kRows>
struct OnlineSoftmax {
  float max[kRows];  // row maximum of the raw scores; -inf until a key was seen
  float sum[kRows];  // this thread's share of the row sum of P

  __device__ __forceinline__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
  }

  // F4, F5: turns a (kRows, columns) tile of scores into P = exp2(scale_log2 * (S - max)) in place
  // and rescales `out` (kRows, head_dim columns) and the sums where a maximum grew. scale_log2 > 0.
  // kVote: ask the warp first whether any did, which spares most of the rescaling; the branch keeps
  // the compiler from interleaving the rows.
  template <bool kVote, class Scores, class Out>
  __device__ __forceinline__ void update(Scores& scores, Out& out, float scale_log2) {
    using namespace cute;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float new_max = fmaxf(quad_max(row_max(scores, i)), max[i]);
      if (!kVote || __any_sync(0xffffffffu, new_max > max[i])) {
        // Equal maxima cover -inf == -inf, where the difference would be NaN.
        const float factor = new_max == max[i] ? 1.f : exp2f((max[i] - new_max) * scale_log2);
        max[i] = new_max;
        sum[i] *= factor;
        CUTE_UNROLL
        for (int j = 0; j < size<1>(out); ++j) out(i, j) *= factor;
      }
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
  }

  // F7: the factor 1 / l of every row (0 for a row without keys) and its log-sum-exp.
  __device__ __forceinline__ void finish(float (&inverse_sum)[kRows], float (&lse)[kRows],
                                         float scale_log2) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float total = quad_sum(sum[i]);
      inverse_sum[i] = total == 0.f ? 0.f : 1.f / total;
      lse[i] = total == 0.f ? -INFINITY : (max[i] * scale_log2 + log2f(total)) * kLn2;
    }
  }
};

}  // namespace flash_attn2
