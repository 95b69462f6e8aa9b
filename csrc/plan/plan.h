// From a problem to a plan: which kernel serves it, with what grid, shared memory and workspace,
// and why the other kernels do not. Plain host C++ on plain structs: no torch, no CUDA, no GPU.
//
// The common path of a call (make_shape, make_window, make_plan, carve_workspace) neither allocates
// nor builds a string; reasons are written only when somebody asks (refusals).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../core/params.h"
#include "device.h"
#include "registry.h"

namespace flash_attn2 {

constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxGrid = 2147483647;  // blocks of a one-dimensional CUDA grid

struct Problem {
  Direction direction = Direction::kForward;
  DType dtype = DType::kBFloat16;
  AttentionShape shape;
  Window window;  // normalised, see make_window
  bool deterministic = false;
  std::string_view family;  // "sm80": kernels of that family only; empty: any
};

// Byte offsets into the backward's one workspace allocation, each a multiple of 256; the arrays'
// shapes are those of BackwardParams. kAbsent where the plan does not need the array.
struct Workspace {
  static constexpr int64_t kAbsent = -1;
  int64_t lse_log2 = kAbsent;
  int64_t delta = kAbsent;
  int64_t dq_accum = kAbsent;
  int64_t delta_ready = kAbsent;  // only for rows with delta_ahead
  int64_t dq_added = kAbsent;     // this and the next only for rows with dq_ring
  int64_t dq_converted = kAbsent;
  int64_t dq_turn = kAbsent;   // only when deterministic
  int64_t ticket = kAbsent;    // only when deterministic or of a persistent grid
  int64_t dk_parts = kAbsent;  // this and the next only where there are head_parts
  int64_t dv_parts = kAbsent;
  int64_t counters = 0, counters_end = 0;  // where delta_ready to ticket lie
  int64_t total = 0;                       // bytes of the allocation
};

struct Plan {
  const KernelRow* row = nullptr;  // null: no compiled kernel serves the problem
  LaunchConfig launch;
  int heads_per_group = 1;  // forward: query heads whose K and V share the L2 cache
  Workspace workspace;      // backward
  int head_parts = 1;       // backward: dK and dV for each of K and V, which are then summed
  int delta_lead = 0;       // backward: see sm90/delta_ahead.cuh
  int dq_slots = 1;         // backward: see sm90/dq_accumulator.cuh
  int dq_lag = 0;
  int tail_heads = 0;                            // see core/schedule.h
  bool groups_turn = false, rounds_turn = true;  // persistent forward: see sm90/schedule.cuh
  int heads_together = 1;
  int heads_in_reverse = 0;
  int turn_group = 1;  // deterministic backward: see core/turn_order.h
};

// A row that was not chosen, and why.
struct Refusal {
  std::string kernel;
  std::string reason;
};

// Range-checked sizes. Throws std::invalid_argument naming the argument, its value and the limit:
// every size fits in an int, as do batch * heads_q and seqlen_q + seqlen_k; heads_k >= 1 divides
// heads_q; 1 <= head_dim, head_dim_v <= 256. Batch and lengths may be 0.
AttentionShape make_shape(int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads_q,
                          int64_t heads_k, int64_t head_dim, int64_t head_dim_v);

// The window in the form that kernels take: a negative bound, or one that hides no key of any
// query of this shape, becomes -1 (no bound), so what is left fits in an int.
Window make_window(int64_t left, int64_t right, const AttentionShape& shape);

// The one family whose kernels serve: what force_family set last, at first FLASH_ATTN2_FAMILY;
// empty: any. Like check_family, which returns `name`, they throw std::invalid_argument, naming
// `what`, for a name that no family has.
std::string_view forced_family();
void force_family(std::string_view name);
std::string_view check_family(const char* what, std::string_view name);

// Among the rows that can serve: the smallest sum of the head dim buckets of Q and V (the forward's
// work, padding included), then the newest family, then the smaller bucket of Q, then the lowest
// preference, then the first registered. row is null when there is none. Throws
// std::invalid_argument when a grid would pass kMaxGrid.
Plan make_plan(const Problem& problem, const DeviceLimits& device);

// Every row except the one that make_plan chooses, with the reason.
std::vector<Refusal> refusals(const Problem& problem, const DeviceLimits& device);

// Points the workspace members of `params` into the allocation at `base`.
void carve_workspace(BackwardParams& params, void* base, const Workspace& workspace);

const char* direction_name(Direction direction);  // "forward", "backward"
const char* dtype_name(DType dtype);              // "float16", "bfloat16"

// One line for people, e.g. "sm80_fwd_bf16_d128_128x64: grid 4096, 128 threads, ...".
std::string describe(const Plan& plan);

}  // namespace flash_attn2
