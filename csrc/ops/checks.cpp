#include "checks.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace flash_attn2 {
namespace {

constexpr int64_t kHeadDimStep = 8;  // 16 bytes: what one asynchronous copy moves

// The plan knows nothing of torch and throws std::invalid_argument.
template <typename Body>
auto with_torch_error(Body body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, error.what());
  }
}

std::string dtype_of(at::ScalarType dtype) { return "torch." + c10::getDtypeNames(dtype).first; }

void check_device(const char* name, const at::Tensor& t, const at::Tensor& q) {
  TORCH_CHECK(t.device() == q.device(), name, ": device is ", t.device(), ", it must be q's ",
              q.device());
}

void check_dtype(const char* name, const at::Tensor& t, const at::Tensor& q) {
  TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, ": dtype is ", dtype_of(t.scalar_type()),
              ", it must be q's ", dtype_of(q.scalar_type()));
}

void check_layout(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 4, name, ": has ", t.dim(),
              " dimensions, it must have 4: (batch, seqlen, heads, head_dim)");
  TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, name,
              ": the last dimension has stride ", t.stride(3), ", it must be 1");
}

void check_size(const char* name, const at::Tensor& t, int dim, const char* what,
                const char* other_name, const at::Tensor& other) {
  TORCH_CHECK(t.size(dim) == other.size(dim), name, ": ", what, " is ", t.size(dim),
              ", it must be ", other_name, "'s ", other.size(dim));
}

std::string shape_of(at::IntArrayRef sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

void check_shape(const char* name, const at::Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, name, ": shape is ", shape_of(t.sizes()), ", it must be ",
              shape_of(expected));
}

void check_heads(const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK(q.size(2) >= 1, "q: heads is ", q.size(2), ", it must be at least 1");
  TORCH_CHECK(k.size(2) >= 1, "k: heads is ", k.size(2), ", it must be at least 1");
  TORCH_CHECK(q.size(2) % k.size(2) == 0, "k: has ", k.size(2),
              " heads, which does not divide q's ", q.size(2), " heads");
}

void check_head_dim(const char* name, const at::Tensor& t) {
  const int64_t head_dim = t.size(3);
  TORCH_CHECK(head_dim <= kMaxHeadDim, name, ": head_dim is ", head_dim, ", the limit is ",
              kMaxHeadDim);
  TORCH_CHECK(head_dim >= kHeadDimStep && head_dim % kHeadDimStep == 0, name, ": head_dim is ",
              head_dim, ", it must be a positive multiple of ", kHeadDimStep,
              " (flash_attn_func pads others with zeros)");
}

Problem check_qkv(Direction direction, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, int64_t window_left, int64_t window_right,
                  bool deterministic) {
  check_device("k", k, q);
  check_device("v", v, q);
  TORCH_CHECK(q.is_cuda(), "q: device is ", q.device(),
              ", it must be a CUDA device, as another argument's is");
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16, "q: dtype is ",
              dtype_of(q.scalar_type()), ", on CUDA it must be torch.float16 or torch.bfloat16");
  check_dtype("k", k, q);
  check_dtype("v", v, q);
  check_layout("q", q);
  check_layout("k", k);
  check_layout("v", v);
  check_size("k", k, 0, "batch", "q", q);
  check_size("k", k, 3, "head_dim", "q", q);
  check_size("v", v, 0, "batch", "q", q);
  check_size("v", v, 1, "seqlen", "k", k);
  check_size("v", v, 2, "heads", "k", k);
  check_heads(q, k);
  check_head_dim("q", q);
  check_head_dim("v", v);

  Problem problem;
  problem.direction = direction;
  problem.dtype = q.scalar_type() == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
  problem.shape = with_torch_error([&] {
    return make_shape(q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3));
  });
  problem.window = make_window(window_left, window_right, problem.shape);
  problem.deterministic = deterministic;
  problem.family = with_torch_error([] { return forced_family(); });
  return problem;
}

void check_output(const char* name, const at::Tensor& t, const at::Tensor& q, const at::Tensor& v) {
  check_shape(name, t, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_dtype(name, t, q);
  check_device(name, t, q);
}

void check_row_statistic(const char* name, const at::Tensor& t, const at::Tensor& q) {
  check_shape(name, t, {q.size(0), q.size(2), q.size(1)});
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, ": dtype is ", dtype_of(t.scalar_type()),
              ", it must be torch.float32");
  check_device(name, t, q);
}

// What a build has, for the error when nothing in it serves.
std::string list_refusals(const Problem& problem, const DeviceLimits& device) {
  std::string text;
  for (const Refusal& refusal : refusals(problem, device)) {
    text += "\n  " + refusal.kernel + ": " + refusal.reason;
  }
  return text.empty() ? " none" : text;
}

}  // namespace

Problem check_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      int64_t window_left, int64_t window_right, bool deterministic) {
  return check_qkv(Direction::kForward, q, k, v, window_left, window_right, deterministic);
}

Problem check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                       const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                       const std::optional<at::Tensor>& dlse, int64_t window_left,
                       int64_t window_right, bool deterministic) {
  const Problem problem =
      check_qkv(Direction::kBackward, q, k, v, window_left, window_right, deterministic);
  check_output("dout", dout, q, v);
  check_output("out", out, q, v);
  check_row_statistic("lse", lse, q);
  if (dlse.has_value()) check_row_statistic("dlse", *dlse, q);
  return problem;
}

Plan plan_or_raise(const Problem& problem, c10::DeviceIndex device) {
  const DeviceLimits& limits = running_device(device);
  const Plan plan = with_torch_error([&] { return make_plan(problem, limits); });
  TORCH_CHECK(plan.row != nullptr, "q: head_dim is ", problem.shape.head_dim, ", v's is ",
              problem.shape.head_dim_v, ", dtype is torch.", dtype_name(problem.dtype), ", on ",
              limits.name, " (sm_", limits.arch, "), they must be what a ",
              direction_name(problem.direction),
              " kernel of this build serves:", list_refusals(problem, limits));
  return plan;
}

}  // namespace flash_attn2
