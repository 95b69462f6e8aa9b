// Between at::Tensor and the plain structs that kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/params.h"

namespace flash_attn2 {

// Kernels move 16 bytes at a time: the pointer and every stride that is stepped along must keep
// 16-byte alignment, and the last dimension must be contiguous. `t` itself where that holds, else
// a contiguous copy.
at::Tensor servable(const at::Tensor& t);

// Kernels want a positive scale: the row maximum of the scaled scores is then that of the raw ones.
// A negative scale moves its sign into q, exactly; a scale of zero makes q zero.
struct PositiveScale {
  at::Tensor q;
  float scale;
  double q_factor;  // 1, -1 or 0: what q was multiplied by, so what dq has to be multiplied by
};
PositiveScale with_positive_scale(const at::Tensor& q, double softmax_scale);

// Pointer and strides of a 4-d tensor.
TensorView view_of(const at::Tensor& t);

// Uninitialised contiguous tensor on q's device, straight from the caching allocator: these ops
// run below every dispatch key, so a dispatched at::empty would only cost host time.
at::Tensor empty_like_device(const at::Tensor& q, at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace flash_attn2
