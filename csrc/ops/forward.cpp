// flash_attn2::forward on CUDA. The schema is defined in flash_attn2/ops.py.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace flash_attn2 {
namespace {

// q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv) -> out (b, sq, h, dv), contiguous, and lse
// (b, h, sq) in fp32.
// `deterministic` concerns the backward that autograd calls; the forward always is.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, double softmax_scale,
                                           int64_t window_left, int64_t window_right,
                                           bool deterministic) {
  const Problem problem = check_forward(q, k, v, window_left, window_right, deterministic);
  const c10::cuda::CUDAGuard guard(q.device());
  const Plan plan = plan_or_raise(problem, q.device().index());

  at::Tensor out =
      empty_like_device(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  at::Tensor lse = empty_like_device(q, {q.size(0), q.size(2), q.size(1)}, at::kFloat);
  if (out.numel() == 0) return {std::move(out), std::move(lse)};

  const PositiveScale scaled = with_positive_scale(q, softmax_scale);
  const at::Tensor q_in = servable(scaled.q), k_in = servable(k), v_in = servable(v);
  ForwardParams params;
  params.shape = problem.shape;
  params.window = problem.window;
  params.q = view_of(q_in);
  params.k = view_of(k_in);
  params.v = view_of(v_in);
  params.out = view_of(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.softmax_scale = scaled.scale;
  params.heads_per_group = plan.heads_per_group;
  params.tail_heads = plan.tail_heads;
  params.groups_turn = plan.groups_turn;
  params.rounds_turn = plan.rounds_turn;
  plan.row->forward(params, plan.launch, c10::cuda::getCurrentCUDAStream().stream());
  return {std::move(out), std::move(lse)};
}

}  // namespace
}  // namespace flash_attn2

TORCH_LIBRARY_IMPL(flash_attn2, CUDA, m) { m.impl("forward", &flash_attn2::forward); }
