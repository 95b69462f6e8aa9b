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

// State of kRows rows held by one thread (replicated over its quad).
//
// The row maximum that the exponentials are taken against may lag behind the true one by up to
// kLag powers of two: P then stays below 2^kLag, which neither fp16 nor fp32 sums mind, and the
// output, the most expensive thing to rescale, is rescaled only when a row's maximum really grew.
// The result is the same function: the reference maximum cancels in O / l and in m + log l.
template <int kRows>
struct OnlineSoftmax {
  static constexpr float kLag = 8.f;

  float max[kRows];  // reference maximum of the unscaled scores; -inf until a key was seen
  float sum[kRows];  // this thread's share of the row sum of P

  __device__ __forceinline__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
  }

  // F4, F5: turns a (kRows, columns) tile of scores into P = exp(scale * (S - max)) in place,
  // rescales `out` (kRows, head_dim columns) and the sums when a reference maximum moves.
  template <class Scores, class Out>
  __device__ __forceinline__ void update(Scores& scores, Out& out, float scale_log2) {
    using namespace cute;
    float block_max[kRows];
    bool grew = false;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      block_max[i] = scores(i, 0);
      CUTE_UNROLL
      for (int j = 1; j < size<1>(scores); ++j) block_max[i] = fmaxf(block_max[i], scores(i, j));
      block_max[i] = fmaxf(quad_max(block_max[i]), max[i]);
      // False for -inf - -inf (NaN): a row that has seen no key yet stays as it is.
      grew |= (block_max[i] - max[i]) * scale_log2 > kLag;
    }
    if (__any_sync(0xffffffffu, grew)) rescale(block_max, out, scale_log2);
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
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

 private:
  template <class Out>
  __device__ __forceinline__ void rescale(const float (&new_max)[kRows], Out& out,
                                          float scale_log2) {
    using namespace cute;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // new_max == max covers -inf == -inf, where the difference would be NaN.
      const float factor = new_max[i] == max[i] ? 1.f : exp2f((max[i] - new_max[i]) * scale_log2);
      max[i] = new_max[i];
      sum[i] *= factor;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(out); ++j) out(i, j) *= factor;
    }
  }
};

}  // namespace flash_attn2
