// flash_attn2::backward on CUDA. The schema is defined in flash_attn2/ops.py.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace flash_attn2 {
namespace {

// Gradients of q, k and v, contiguous, from dout (like out) and dlse (like lse; none: zero).
// The workspace goes back to the caching allocator when this returns, which is safe because the
// allocator hands it out again on this stream only.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& dlse,
    double softmax_scale, int64_t window_left, int64_t window_right, bool deterministic) {
  const Problem problem =
      check_backward(dout, q, k, v, out, lse, dlse, window_left, window_right, deterministic);
  const c10::cuda::CUDAGuard guard(q.device());
  const Plan plan = plan_or_raise(problem, q.device().index());

  at::Tensor dq = empty_like_device(q, q.sizes(), q.scalar_type());
  at::Tensor dk = empty_like_device(q, k.sizes(), q.scalar_type());
  at::Tensor dv = empty_like_device(q, v.sizes(), q.scalar_type());
  if (dq.numel() == 0 && dk.numel() == 0) return {std::move(dq), std::move(dk), std::move(dv)};

  const PositiveScale scaled = with_positive_scale(q, softmax_scale);
  const at::Tensor q_in = servable(scaled.q), k_in = servable(k), v_in = servable(v);
  const at::Tensor out_in = servable(out), dout_in = servable(dout);
  const at::Tensor lse_in = lse.contiguous();
  const at::Tensor dlse_in = dlse.has_value() ? dlse->contiguous() : at::Tensor();
  const at::Tensor workspace = empty_like_device(q, {plan.workspace.total}, at::kByte);
  BackwardParams params;
  params.shape = problem.shape;
  params.shape.heads_k *= plan.head_parts;
  params.head_parts = plan.head_parts;
  params.window = problem.window;
  params.q = view_of(q_in);
  params.k = view_of(k_in);
  params.v = view_of(v_in);
  params.out = view_of(out_in);
  params.dout = view_of(dout_in);
  params.dq = view_of(dq);
  params.dk = view_of(dk);
  params.dv = view_of(dv);
  params.lse = lse_in.const_data_ptr<float>();
  params.dlse = dlse_in.defined() ? dlse_in.const_data_ptr<float>() : nullptr;
  params.softmax_scale = scaled.scale;
  params.dq_parts = plan.row->cluster;
  params.delta_lead = plan.delta_lead;
  params.dq_slots = plan.dq_slots;
  params.dq_lag = plan.dq_lag;
  params.tail_heads = plan.tail_heads;
  params.turn_group = plan.turn_group;
  params.heads_together = plan.heads_together;
  params.heads_in_reverse = plan.heads_in_reverse;
  carve_workspace(params, workspace.mutable_data_ptr(), plan.workspace);
  plan.row->backward(params, plan.launch, c10::cuda::getCurrentCUDAStream().stream());
  if (scaled.q_factor != 1) dq.mul_(scaled.q_factor);
  return {std::move(dq), std::move(dk), std::move(dv)};
}

}  // namespace
}  // namespace flash_attn2

TORCH_LIBRARY_IMPL(flash_attn2, CUDA, m) { m.impl("backward", &flash_attn2::backward); }
