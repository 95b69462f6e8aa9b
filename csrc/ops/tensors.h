// Between at::Tensor and the plain structs that kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/params.h"

namespace flash_attn2 {

// Kernels move 16 bytes at a time: the pointer and every stride that is stepped along must keep
// 16-byte alignment, and the last dimension must be contiguous. `t` itself where that holds, else
// a contiguous copy.
at::Tensor servable(const at::Tensor& t);

// Pointer and strides of a 4-d tensor.
TensorView view_of(const at::Tensor& t);

// Uninitialised contiguous tensor on q's device, straight from the caching allocator: these ops
// run below every dispatch key, so a dispatched at::empty would only cost host time.
at::Tensor empty_like_device(const at::Tensor& q, at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace flash_attn2
