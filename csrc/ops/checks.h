// Validation of the ops' arguments, before anything is allocated or launched. Every error is a
// RuntimeError that names the argument, its value and the limit, worded as in flash_attn2/ops.py,
// which checks CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../plan/plan.h"

namespace flash_attn2 {

// q (b, sq, h, d); k (b, sk, hk, d); v (b, sk, hk, dv): CUDA tensors on one device, fp16 or bf16, d
// and dv multiples of 8, the last dimension contiguous.
Problem check_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      int64_t window_left, int64_t window_right, bool deterministic);

// As above; besides out and dout (b, sq, h, dv) of q's dtype, lse and dlse (b, h, sq) in fp32.
Problem check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                       const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                       const std::optional<at::Tensor>& dlse, int64_t window_left,
                       int64_t window_right, bool deterministic);

// The plan on the device that q is on. Raises when the GPU is too old or not built for, when a grid
// would be too large, and when no compiled kernel serves (listing every kernel with the reason).
Plan plan_or_raise(const Problem& problem, c10::DeviceIndex device);

}  // namespace flash_attn2
