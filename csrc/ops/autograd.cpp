// Autograd of the CUDA ops. In C++ because an eager call through a Python autograd.Function costs
// more host time than the rest of the call; CPU tensors take the Python formula (ops.py).
//
// Nothing here looks at sizes: torch.compile and torch.export trace through this file with
// symbolic shapes.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

namespace flash_attn2 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;
using ForwardOp = ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                                int64_t, int64_t, bool);
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using BackwardOp = BackwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  const std::optional<at::Tensor>&, double, int64_t, int64_t, bool);

// The schemas are defined in Python after this library is loaded, so the handles are looked up on
// the first call.
const c10::TypedOperatorHandle<ForwardOp>& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flash_attn2::forward", "").typed<ForwardOp>();
  return op;
}

const c10::TypedOperatorHandle<BackwardOp>& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_attn2::backward", "")
                             .typed<BackwardOp>();
  return op;
}

// Whether autograd must record this call. A forward-mode tangent has no formula, and dropping it
// silently would be a wrong answer.
bool must_record(const char* op, std::initializer_list<const at::Tensor*> inputs) {
  bool requires_grad = false;
  for (const at::Tensor* input : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!input->_fw_grad(/*level=*/0).defined(), "flash_attn2::", op,
                                ": forward-mode automatic differentiation is not supported");
    requires_grad = requires_grad || input->requires_grad();
  }
  return requires_grad && c10::GradMode::is_enabled();
}

struct Forward : torch::autograd::Function<Forward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, double softmax_scale, int64_t window_left,
                               int64_t window_right, bool deterministic) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] =
        forward_op().call(q, k, v, softmax_scale, window_left, window_right, deterministic);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["softmax_scale"] = softmax_scale;
    ctx->saved_data["window_left"] = window_left;
    ctx->saved_data["window_right"] = window_right;
    ctx->saved_data["deterministic"] = deterministic;
    ctx->set_materialize_grads(false);
    return {std::move(out), std::move(lse)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor& dout = grads[0];
    const at::Tensor& dlse = grads[1];
    variable_list result(7);  // one per argument of forward
    if (!dout.defined() && !dlse.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    std::tie(result[0], result[1], result[2]) = backward_op().call(
        dout.defined() ? dout : at::zeros_like(out), q, k, v, out, lse,
        dlse.defined() ? std::optional<at::Tensor>(dlse) : std::nullopt,
        ctx->saved_data["softmax_scale"].toDouble(), ctx->saved_data["window_left"].toInt(),
        ctx->saved_data["window_right"].toInt(), ctx->saved_data["deterministic"].toBool());
    return result;
  }
};

// The backward has no derivative of its own. create_graph=True still gives first gradients; the
// error comes when somebody differentiates them.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext*, const at::Tensor& dout, const at::Tensor& q,
                               const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                               const at::Tensor& lse, const std::optional<at::Tensor>& dlse,
                               double softmax_scale, int64_t window_left, int64_t window_right,
                               bool deterministic) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv] = backward_op().call(dout, q, k, v, out, lse, dlse, softmax_scale,
                                           window_left, window_right, deterministic);
    return {std::move(dq), std::move(dk), std::move(dv)};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "flash_attn2::backward has no derivative: gradients of gradients are not "
                "implemented. For them, use torch.nn.functional.scaled_dot_product_attention with "
                "SDPBackend.MATH");
  }
};

ForwardResult forward_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               double softmax_scale, int64_t window_left, int64_t window_right,
                               bool deterministic) {
  if (!must_record("forward", {&q, &k, &v})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(q, k, v, softmax_scale, window_left, window_right, deterministic);
  }
  variable_list result =
      Forward::apply(q, k, v, softmax_scale, window_left, window_right, deterministic);
  return {std::move(result[0]), std::move(result[1])};
}

BackwardResult backward_autograd(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                                 const std::optional<at::Tensor>& dlse, double softmax_scale,
                                 int64_t window_left, int64_t window_right, bool deterministic) {
  const at::Tensor& dlse_or_q = dlse.has_value() ? *dlse : q;
  if (!must_record("backward", {&dout, &q, &k, &v, &out, &lse, &dlse_or_q})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return backward_op().call(dout, q, k, v, out, lse, dlse, softmax_scale, window_left,
                              window_right, deterministic);
  }
  variable_list result = Backward::apply(dout, q, k, v, out, lse, dlse, softmax_scale, window_left,
                                         window_right, deterministic);
  return {std::move(result[0]), std::move(result[1]), std::move(result[2])};
}

}  // namespace
}  // namespace flash_attn2

TORCH_LIBRARY_IMPL(flash_attn2, AutogradCUDA, m) {
  m.impl("forward", &flash_attn2::forward_autograd);
  m.impl("backward", &flash_attn2::backward_autograd);
}
