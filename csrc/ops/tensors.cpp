#include "tensors.h"

#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/mul.h>

#include <cstdint>

namespace flash_attn2 {
namespace {

constexpr int64_t kAlignment = 16;  // bytes

bool is_servable(const at::Tensor& t) {
  if (t.size(3) > 1 && t.stride(3) != 1) return false;
  if (reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % kAlignment != 0) return false;
  const int64_t step = kAlignment / t.element_size();
  for (int dim = 0; dim < 3; ++dim) {
    if (t.size(dim) > 1 && t.stride(dim) % step != 0) return false;
  }
  return true;
}

}  // namespace

at::Tensor servable(const at::Tensor& t) {
  // clone, not contiguous(): a contiguous view with an odd storage offset needs a copy as well.
  return is_servable(t) ? t : t.clone(at::MemoryFormat::Contiguous);
}

PositiveScale with_positive_scale(const at::Tensor& q, double softmax_scale) {
  if (softmax_scale > 0) return {q, static_cast<float>(softmax_scale), 1};
  if (softmax_scale < 0) return {at::mul(q, -1), static_cast<float>(-softmax_scale), -1};
  return {at::mul(q, 0), 1.f, 0};
}

TensorView view_of(const at::Tensor& t) {
  TensorView view;
  view.ptr = const_cast<void*>(t.const_data_ptr());  // kernels write fresh outputs only
  view.batch_stride = t.stride(0);
  view.row_stride = t.stride(1);
  view.head_stride = t.stride(2);
  return view;
}

at::Tensor empty_like_device(const at::Tensor& q, at::IntArrayRef shape, at::ScalarType dtype) {
  return at::detail::empty_cuda(shape, dtype, q.device(), std::nullopt);
}

}  // namespace flash_attn2
