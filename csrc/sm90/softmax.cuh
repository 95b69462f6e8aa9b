// The softmax step of the sm90 forward (F4, F5), row by row, so that the exponentials of one row
// run beside the maximum of the other.
#pragma once

#include "../core/softmax.cuh"

namespace flash_attn2::sm90 {

// The largest of a thread's scores of row i if one of them has no sign, else any of them. As
// integers: of three of them one instruction takes the largest, of floats only of two, and floats
// without a sign sort as their bits do, above those with one.
template <class Scores>
__device__ __forceinline__ float row_max_of_bits(const Scores& scores, int i) {
  constexpr int kColumns = decltype(cute::size<1>(scores))::value;
  static_assert(kColumns % 4 == 0);
  const auto bits = [&](int j) { return __float_as_int(scores(i, j)); };
  int even = ::max(bits(0), bits(2)), odd = ::max(bits(1), bits(3));
  CUTE_UNROLL
  for (int j = 4; j < kColumns; j += 4) {
    even = __vimax3_s32(even, bits(j), bits(j + 2));
    odd = __vimax3_s32(odd, bits(j + 1), bits(j + 3));
  }
  return __int_as_float(::max(even, odd));
}

template <int kRows>
struct RowSoftmax : OnlineSoftmax<kRows> {
  using OnlineSoftmax<kRows>::max;
  using OnlineSoftmax<kRows>::sum;

  // Whether a maximum of the warp's rows has a sign: then row_max_of_bits may not give the largest
  // of the next scores. Below a maximum without a sign it does not matter which of them it gives.
  __device__ __forceinline__ bool any_sign() const {
    int bits = 0;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) bits |= __float_as_int(max[i]);
    return __any_sync(0xffffffffu, bits < 0);
  }

  // Takes the largest of the thread's scores of row i into its maximum; true when it grew.
  __device__ __forceinline__ bool update_max(int i, float of_thread) {
    before[i] = max[i];
    max[i] = fmaxf(quad_max(of_thread), before[i]);
    return max[i] > before[i];
  }

  // The same again, where what was taken was not the largest.
  __device__ __forceinline__ void raise_max(int i, float of_thread) {
    max[i] = fmaxf(quad_max(of_thread), max[i]);
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
