// Online softmax (paper, section 3.1.1; steps F4, F5 and F7).
#pragma once

#include <cute/tensor.hpp>

namespace flash_attn2 {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// How raw scores q k become exponents of two: exponent = log2 * score, a factor that is folded into
// the exponential. Maximum and mask want a positive factor; where the caller's scale is zero or
// negative, prepare() multiplies the scores by it beforehand and the factor is one.
struct ScoreScale {
  float log2;
  float beforehand;

  __device__ __forceinline__ explicit ScoreScale(float softmax_scale)
      : log2(softmax_scale > 0.f ? softmax_scale * kLog2e : 1.f),
        beforehand(softmax_scale > 0.f ? 1.f : softmax_scale * kLog2e) {}

  template <class Acc>
  __device__ __forceinline__ void prepare(Acc& scores) const {
    if (beforehand == 1.f) return;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) *= beforehand;
  }
};

// The four threads of a quad share the rows of an mma.sync accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x + __shfl_xor_sync(0xffffffffu, x, 1);
}

// State of kRows rows held by one thread (replicated over its quad). The eight rows that a warp
// holds in one slot are rescaled only when a maximum among them grew: later blocks seldom raise
// one, and the output is the most expensive thing to rescale. (Letting the maximum lag behind saves
// more but costs 5% of accuracy: the largest P of a row is then no longer exactly 1 in fp16 and
// bf16.)
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
  // and rescales `out` (kRows, head_dim columns) and the sums where a maximum grew.
  template <class Scores, class Out>
  __device__ __forceinline__ void update(Scores& scores, Out& out, float scale_log2) {
    using namespace cute;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float new_max = scores(i, 0);
      CUTE_UNROLL
      for (int j = 1; j < size<1>(scores); ++j) new_max = fmaxf(new_max, scores(i, j));
      new_max = fmaxf(quad_max(new_max), max[i]);
      if (__any_sync(0xffffffffu, new_max > max[i])) {
        // Equal maxima cover -inf == -inf, where the difference would be NaN.
        const float factor = new_max == max[i] ? 1.f : exp2f((max[i] - new_max) * scale_log2);
        max[i] = new_max;
        sum[i] *= factor;
        CUTE_UNROLL
        for (int j = 0; j < size<1>(out); ++j) out(i, j) *= factor;
      }
      const float max_scaled = max[i] == -INFINITY ? 0.f : max[i] * scale_log2;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) {
        scores(i, j) = exp2f(scores(i, j) * scale_log2 - max_scaled);
        sum[i] += scores(i, j);
      }
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
