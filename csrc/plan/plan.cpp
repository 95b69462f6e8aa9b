#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "forward_order.h"
#include "tiles.h"

namespace flash_attn2 {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
// Kernels compute positions up to seqlen_q + seqlen_k, plus a tile, in an int.
constexpr int64_t kMaxLengthSum = kMaxInt - 1024;
constexpr int64_t kWorkspaceAlignment = 256;
// See clusters_fit.
constexpr int kMaskedLengthOfCluster = 8192;
// See ring_pays.
constexpr int64_t kRowsOfRing = 1024;
constexpr int64_t kRowsOfDeterministicRing = 2048;
constexpr int64_t kMaskedRowsOfRing = 4096;
constexpr int64_t kKeysOfWindowRing = 1024;
constexpr int64_t kRowsOfTallRing = 4096;
constexpr int kTallestOfLongRing = 64;
// See whole_heads_pay.
constexpr int64_t kTimeOfHeadsBlock = 3;
constexpr int64_t kTimeOfBlock = 4;
// See head_parts.
constexpr int64_t kRoundsOfWholeGroups = 2;
constexpr int64_t kStepsToAddParts = 4;
// See heads_in_turn, and the former of the two.
constexpr int64_t kRoundsInTurn = 12;
constexpr int64_t kStepsToStartAndEnd = 2;

[[noreturn]] void refuse(const std::string& what, int64_t value, const std::string& limit) {
  throw std::invalid_argument(what + ": is " + std::to_string(value) + ", it must be " + limit);
}

void require_range(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  refuse(what, value, "at least " + std::to_string(low) + " and at most " + std::to_string(high));
}

// Of a backward: keys that add to dQ as one, those of a cluster.
int key_block(const KernelRow& row) { return row.tile_n * row.cluster; }

// Forward clusters save power, for K and V leave L2 once for all of their thread blocks, but these
// wait for each other, and rows to spare leave some without work. Without a mask there are to be
// none; under a causal one they are in the shortest tile, and it takes long sequences to pay.
bool clusters_fit(const KernelRow& row, const Problem& problem) {
  if (row.cluster == 1 || row.direction == Direction::kBackward) return true;
  const AttentionShape& shape = problem.shape;
  if (!is_masked(problem.window)) {
    return ceil_div(shape.seqlen_q, row.tile_m) % row.cluster == 0;
  }
  return !tiles_are_equal(problem.window) &&
         std::min(shape.seqlen_q, shape.seqlen_k) >= kMaskedLengthOfCluster;
}

int most_keys(const KernelRow& row, const Problem& problem) {
  return is_masked(problem.window) ? row.max_keys : row.max_unmasked_keys;
}

bool fits_whole_heads(const KernelRow& row, const AttentionShape& shape) {
  return shape.seqlen_q > 0 && shape.seqlen_q <= row.head_rows && shape.seqlen_k > 0 &&
         shape.heads_q == shape.heads_k;
}

// A thread block that takes whole heads is done with a key block in three quarters of the time that
// others take, but where heads are few, multiprocessors are left without one.
bool whole_heads_pay(const KernelRow& row, const AttentionShape& shape,
                     const DeviceLimits& device) {
  const int64_t heads = int64_t{shape.batch} * shape.heads_k;
  const int64_t blocks = ceil_div(shape.seqlen_k, row.tile_n);
  const int64_t at_a_time = clusters_at_a_time(row, device);
  return ceil_div(heads, at_a_time) * blocks * kTimeOfHeadsBlock <=
         ceil_div(heads * blocks, at_a_time) * kTimeOfBlock;
}

bool takes_heads(const KernelRow& row, const AttentionShape& shape, const DeviceLimits& device) {
  return row.head_rows == 0 ||
         (fits_whole_heads(row, shape) && whole_heads_pay(row, shape, device));
}

bool serves(const KernelRow& row, const Problem& problem, const DeviceLimits& device) {
  return row.direction == problem.direction && row.dtype == problem.dtype &&
         row.head_dim >= problem.shape.head_dim && row.head_dim_v >= problem.shape.head_dim_v &&
         (problem.family.empty() || problem.family == row.family) && row.min_arch <= device.arch &&
         device.arch <= row.max_arch && row.smem_bytes <= device.smem_per_block_optin &&
         problem.shape.seqlen_k <= most_keys(row, problem) && clusters_fit(row, problem) &&
         takes_heads(row, problem.shape, device);
}

// Columns of S = Q K^T and O = P V: what a pair of a query and a key costs the forward.
int padded_columns(const KernelRow& row) { return row.head_dim + row.head_dim_v; }

bool better(const KernelRow& a, const KernelRow& b) {
  if (padded_columns(a) != padded_columns(b)) return padded_columns(a) < padded_columns(b);
  if (a.min_arch != b.min_arch) return a.min_arch > b.min_arch;
  // Three of the backward's five products have Q's columns, two have V's.
  if (a.head_dim != b.head_dim) return a.head_dim < b.head_dim;
  return a.preference < b.preference;
}

const KernelRow* choose(const Problem& problem, const DeviceLimits& device) {
  const KernelRow* best = nullptr;
  for (const KernelRow& row : kernel_rows()) {
    if (serves(row, problem, device) && (best == nullptr || better(row, *best))) best = &row;
  }
  return best;
}

std::string buckets_of(const KernelRow& row) {
  return std::to_string(row.head_dim) + " + " + std::to_string(row.head_dim_v);
}

// Why `row` is not `chosen` (null when no row serves).
std::string refusal_reason(const KernelRow& row, const KernelRow* chosen, const Problem& problem,
                           const DeviceLimits& device) {
  if (row.direction != problem.direction) {
    return std::string("is a ") + direction_name(row.direction) + " kernel";
  }
  if (row.dtype != problem.dtype) {
    return std::string("is for ") + dtype_name(row.dtype) + ", the inputs are " +
           dtype_name(problem.dtype);
  }
  if (row.head_dim < problem.shape.head_dim) {
    return "serves head_dim <= " + std::to_string(row.head_dim) + ", the inputs have " +
           std::to_string(problem.shape.head_dim);
  }
  if (row.head_dim_v < problem.shape.head_dim_v) {
    return "serves head_dim_v <= " + std::to_string(row.head_dim_v) + ", the inputs have " +
           std::to_string(problem.shape.head_dim_v);
  }
  if (!problem.family.empty() && problem.family != row.family) {
    return "is of family " + row.family + ", asked for is " + std::string(problem.family);
  }
  if (row.min_arch > device.arch) {
    return "needs sm_" + std::to_string(row.min_arch) + ", " + device.name + " is sm_" +
           std::to_string(device.arch);
  }
  if (row.max_arch < device.arch) {
    return "runs up to sm_" + std::to_string(row.max_arch) + ", " + device.name + " is sm_" +
           std::to_string(device.arch);
  }
  if (row.smem_bytes > device.smem_per_block_optin) {
    return "needs " + std::to_string(row.smem_bytes) + " bytes of shared memory, " + device.name +
           " gives a block " + std::to_string(device.smem_per_block_optin);
  }
  if (most_keys(row, problem) < problem.shape.seqlen_k) {
    return "serves seqlen_k <= " + std::to_string(most_keys(row, problem)) +
           (is_masked(problem.window) ? "" : " without a mask") + ", the inputs have " +
           std::to_string(problem.shape.seqlen_k);
  }
  if (!clusters_fit(row, problem)) {
    if (is_masked(problem.window)) {
      return "takes no mask but one of one bound, from " + std::to_string(kMaskedLengthOfCluster) +
             " queries and keys on";
    }
    return "takes " + std::to_string(row.cluster) + " tiles of a head at a time, the inputs have " +
           std::to_string(ceil_div(problem.shape.seqlen_q, row.tile_m));
  }
  if (!takes_heads(row, problem.shape, device)) {
    const AttentionShape& shape = problem.shape;
    const std::string heads =
        std::to_string(shape.heads_q) + " and " + std::to_string(shape.heads_k) + " heads, " +
        std::to_string(shape.seqlen_q) + " queries and " + std::to_string(shape.seqlen_k) + " keys";
    return fits_whole_heads(row, shape)
               ? "takes whole heads, too few of them at batch " + std::to_string(shape.batch)
               : "takes whole heads, each of Q with its own of K, of 1 to " +
                     std::to_string(row.head_rows) + " queries and at least one key, the inputs " +
                     "have " + heads;
  }
  const std::string fits = "fits, but " + chosen->name;
  if (padded_columns(row) > padded_columns(*chosen)) {
    return fits + " has smaller head_dim buckets (" + buckets_of(*chosen) + " < " +
           buckets_of(row) + ")";
  }
  if (row.min_arch < chosen->min_arch) {
    return fits + " is of a newer family (" + chosen->family + " before " + row.family + ")";
  }
  if (row.head_dim > chosen->head_dim) {
    return fits + " has a smaller head_dim bucket (" + std::to_string(chosen->head_dim) + " < " +
           std::to_string(row.head_dim) + ")";
  }
  return fits + " is preferred (" + std::to_string(chosen->preference) + " before " +
         std::to_string(row.preference) + ")";
}

// Row blocks of Q, or column blocks of K and V, over all heads and batches: of a head whole
// clusters. The caller checked that batch * heads fits in an int, so the product stays far below
// 2^63.
int64_t count_blocks(const char* length_name, int64_t length, int tile, int64_t batch_heads,
                     int cluster = 1) {
  const int64_t blocks = ceil_div(length, int64_t{tile} * cluster) * cluster * batch_heads;
  if (blocks > kMaxGrid) {
    throw std::invalid_argument(std::string(length_name) + ": is " + std::to_string(length) +
                                ", which in blocks of " + std::to_string(tile) + " for each of " +
                                std::to_string(batch_heads) + " (batch * heads) makes a grid of " +
                                std::to_string(blocks) + ", it must be at most " +
                                std::to_string(kMaxGrid));
  }
  return blocks;
}

// Whether to convert dQ on the way. Under a causal mask thread blocks end at different times, and
// those that convert wait for them; with few products the conversion is not hidden, with one warp
// that converts, as in deterministic mode, less than with three; and the tall tiles of small head
// dims gain only where the memory is the limit. docs/performance.md has the measurements. Between
// two bounds of a narrow window there are few products a row.
bool ring_pays(const KernelRow& row, const Problem& problem) {
  const Window& window = problem.window;
  const int64_t rows = problem.shape.seqlen_q;
  if (!row.dq_ring) return false;
  const bool narrow = window.left >= 0 && window.right >= 0 &&
                      int64_t{window.left} + window.right + 1 < kKeysOfWindowRing;
  if (is_masked(window)) return rows >= kMaskedRowsOfRing && !narrow;
  if (problem.deterministic && rows < kRowsOfDeterministicRing) return false;
  return row.tile_m > kTallestOfLongRing ? rows <= kRowsOfTallRing : rows >= kRowsOfRing;
}

// Deterministic, without a mask: how many KV heads go side by side, so that a key block of a head
// starts when the one before is ahead by two steps and a half, as steps and starts differ
// (core/turn_order.h); 0: none. At the start of the grid a head's key blocks start together and
// have to get there, so it pays where rounds of the GPU are many, and walks that go around would
// follow each other closely, or have more of a head in use at a time than L2 holds.
int64_t heads_in_turn(const KernelRow& row, const Problem& problem, int64_t key_blocks,
                      const DeviceLimits& device) {
  const AttentionShape& shape = problem.shape;
  if (!problem.deterministic || is_masked(problem.window)) return 0;
  const int64_t row_bytes = (kBytesPerElement + sizeof(float)) * shape.head_dim +
                            kBytesPerElement * shape.head_dim_v;  // of Q, dQ's sums and dO
  const int64_t at_a_time = clusters_at_a_time(row, device);
  const bool close = key_block(row) <= row.tile_m;
  const bool large = shape.seqlen_q * row_bytes > device.l2_bytes / 2;
  if (!(close || large) || key_blocks < kRoundsInTurn * at_a_time) return 0;
  const int64_t steps =
      shape.heads_q / shape.heads_k * query_tiles(row, shape) + kStepsToStartAndEnd;
  return ceil_div(5 * at_a_time, 2 * steps);
}

// Deterministic, under a mask: how many KV heads go side by side, so that under a causal one a key
// block of a head starts half a step after the one before. With more of them, key blocks of many
// lengths wait for each other; no more than a round of the GPU takes (see plan_heads). 0: without
// that order.
int heads_in_reverse(const KernelRow& row, const Problem& problem, int64_t key_blocks,
                     const DeviceLimits& device) {
  // sm80 adds in the order of the keys.
  if (row.family != "sm90" || !problem.deterministic || !is_masked(problem.window)) return 0;
  const AttentionShape& shape = problem.shape;
  const int64_t steps = shape.heads_q / shape.heads_k * query_tiles(row, shape);
  const int64_t at_a_time = clusters_at_a_time(row, device);
  return static_cast<int>(std::max<int64_t>(at_a_time / std::max(steps, key_blocks), 1));
}

// A thread block works on some keys of a KV head, for all query heads of its group. Where thread
// blocks are few, the group is divided in parts that work side by side, each with dK and dV of its
// own, which are added up afterwards. How many is estimated in steps, query tiles of a thread
// block: without a mask in rounds of the GPU, with one by the longest block or by what there is to
// do in all. Where the GPU is full, dK and dV are made for as many heads as K and V have.
int head_parts(const KernelRow& row, const Problem& problem, const DeviceLimits& device) {
  const AttentionShape& shape = problem.shape;
  const int group = shape.heads_q / shape.heads_k;
  const int64_t blocks = ceil_div(shape.seqlen_k, key_block(row)) * shape.batch * shape.heads_k;
  const int64_t at_a_time = clusters_at_a_time(row, device);
  const bool many = blocks >= kRoundsOfWholeGroups * at_a_time;
  if (row.family != "sm90" || blocks == 0 || many) return 1;
  const int64_t steps = group * query_tiles(row, shape);
  const auto estimate = [&](int parts) {
    const int64_t longest = steps / parts + kStepsToStartAndEnd;
    const int64_t adding = parts > 1 ? kStepsToAddParts : 0;
    if (tiles_are_equal(problem.window)) {
      return ceil_div(blocks * parts, at_a_time) * longest + adding;
    }
    const int64_t mean = steps / 2 / parts + kStepsToStartAndEnd;
    return std::max(longest, ceil_div(blocks * parts * mean, at_a_time)) + adding;
  };
  int best = 1;
  for (int parts = 2; parts <= group; ++parts) {
    if (group % parts == 0 && estimate(parts) < estimate(best)) best = parts;
  }
  return best;
}

// The order of the key blocks (core/schedule.h), how far ahead D is made (sm90/delta_ahead.cuh) and
// how far behind dQ is converted (sm90/dq_accumulator.cuh). Where key blocks differ in length, the
// heads of the last round go side by side.
//
// Where dQ is converted on the way: thread blocks whose index is lower by a whole round of the GPU
// have mostly ended, so that what they added can be converted; and one round later that has been
// done, too. Two rounds where a head's key blocks start all over a round, and two times the heads
// that go side by side. A key block waits for heads that come a lag before: those must not be side
// by side with its own, so a lag is no fewer than those. Else all KV heads have a slot, and the
// post-process converts them.
void plan_heads(Plan& plan, const Problem& problem, const DeviceLimits& device) {
  const KernelRow& row = *plan.row;
  const int64_t heads = int64_t{problem.shape.batch} * problem.shape.heads_k;
  if (row.head_rows > 0) {  // in the order of their numbers, and all of dQ in shared memory
    plan.delta_lead = static_cast<int>(heads);
    plan.dq_slots = 0;
    return;
  }
  const int64_t key_blocks = std::max<int64_t>(ceil_div(problem.shape.seqlen_k, key_block(row)), 1);
  const int64_t round = ceil_div(clusters_at_a_time(row, device), key_blocks) + 1;
  const int64_t in_turn = heads_in_turn(row, problem, heads * key_blocks, device);
  plan.heads_in_reverse = heads_in_reverse(row, problem, key_blocks, device);
  int64_t lag = plan.heads_in_reverse > 0 ? 2 * round : round, tail = 0, together = 1;
  if (in_turn > 0) {
    tail = heads;
    together = in_turn;
    lag = 2 * in_turn;
  } else if (!tiles_are_equal(problem.window)) {
    tail = together = round;
  }
  // A round, too, and no neighbour; all heads where no thread block comes after the pre-process.
  const bool ahead = row.delta_ahead && problem.shape.seqlen_k > 0;
  plan.delta_lead = static_cast<int>(ahead ? std::min(std::max(round, together), heads) : heads);
  if (!ring_pays(row, problem)) lag = heads;
  plan.tail_heads = static_cast<int>(std::min(tail, heads));
  plan.heads_together = static_cast<int>(std::min(together, heads));
  plan.dq_lag = static_cast<int>(std::min(lag, heads));
  plan.dq_slots = static_cast<int>(std::min(2 * lag, heads));
}

Workspace lay_out(const KernelRow& row, const Problem& problem, const Plan& plan) {
  const AttentionShape& shape = problem.shape;
  const int64_t batch_heads = int64_t{shape.batch} * shape.heads_q;
  const int64_t row_blocks = batch_heads * query_tiles(row, shape);
  const int64_t rows_of_head = query_tiles(row, shape) * row.tile_m;
  const int64_t rows = batch_heads * rows_of_head;
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t offset = end;
    end = ceil_div(end + bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
    return offset;
  };
  Workspace workspace;
  workspace.lse_log2 = take(rows * sizeof(float));
  workspace.delta = take(rows * sizeof(float));
  const int64_t group = shape.heads_q / shape.heads_k;
  workspace.dq_accum = take(plan.dq_slots * group * rows_of_head * row.head_dim * sizeof(float));
  workspace.counters = end;
  if (row.delta_ahead) {
    workspace.delta_ready = take(int64_t{shape.batch} * shape.heads_k * sizeof(int));
  }
  if (row.dq_ring) {
    workspace.dq_added = take(int64_t{shape.batch} * shape.heads_k * sizeof(int));
    workspace.dq_converted = take(int64_t{shape.batch} * shape.heads_k * sizeof(int));
  }
  if (row.head_rows == 0) {
    if (problem.deterministic) workspace.dq_turn = take(row_blocks * row.cluster * sizeof(int));
    if (problem.deterministic || row.persistent) workspace.ticket = take(sizeof(int));
  }
  workspace.counters_end = end;
  if (plan.head_parts > 1) {
    const int64_t rows_of_parts = int64_t{shape.batch} * shape.seqlen_k * shape.heads_k;
    workspace.dk_parts = take(kBytesPerElement * rows_of_parts * shape.head_dim);
    workspace.dv_parts = take(kBytesPerElement * rows_of_parts * shape.head_dim_v);
  }
  workspace.total = end;
  return workspace;
}

// Key blocks that take turns side by side: as many as run at a time, and so few that their number
// times that of the query blocks fits in an int.
int turn_group(const KernelRow& row, const AttentionShape& shape, const DeviceLimits& device) {
  const int64_t query_blocks = std::max<int64_t>(ceil_div(shape.seqlen_q, row.tile_m), 1);
  return static_cast<int>(
      std::min<int64_t>(clusters_at_a_time(row, device), kMaxInt / query_blocks));
}

}  // namespace

AttentionShape make_shape(int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads_q,
                          int64_t heads_k, int64_t head_dim, int64_t head_dim_v) {
  require_range("batch", batch, 0, kMaxInt);
  require_range("seqlen_q", seqlen_q, 0, kMaxInt);
  require_range("seqlen_k", seqlen_k, 0, kMaxInt);
  require_range("heads_q", heads_q, 1, kMaxInt);
  require_range("heads_k", heads_k, 1, kMaxInt);
  require_range("head_dim", head_dim, 1, kMaxHeadDim);
  require_range("head_dim_v", head_dim_v, 1, kMaxHeadDim);
  if (heads_q % heads_k != 0) {
    refuse("heads_q", heads_q, "a multiple of heads_k, which is " + std::to_string(heads_k));
  }
  require_range("batch * heads_q", batch * heads_q, 0, kMaxInt);
  require_range("seqlen_q + seqlen_k", seqlen_q + seqlen_k, 0, kMaxLengthSum);
  AttentionShape shape;
  shape.batch = static_cast<int>(batch);
  shape.seqlen_q = static_cast<int>(seqlen_q);
  shape.seqlen_k = static_cast<int>(seqlen_k);
  shape.heads_q = static_cast<int>(heads_q);
  shape.heads_k = static_cast<int>(heads_k);
  shape.head_dim = static_cast<int>(head_dim);
  shape.head_dim_v = static_cast<int>(head_dim_v);
  return shape;
}

Window make_window(int64_t left, int64_t right, const AttentionShape& shape) {
  // Positions run from seqlen_k - seqlen_q to seqlen_k - 1. The last one sees key 0 when
  // left >= seqlen_k - 1, the first one sees key seqlen_k - 1 when right >= seqlen_q - 1.
  Window window;
  window.left = left < 0 || left >= int64_t{shape.seqlen_k} - 1 ? -1 : static_cast<int>(left);
  window.right = right < 0 || right >= int64_t{shape.seqlen_q} - 1 ? -1 : static_cast<int>(right);
  return window;
}

std::string_view check_family(const char* what, std::string_view name) {
  for (const char* known : {"", "sm80", "sm90"}) {
    if (name == known) return known;
  }
  throw std::invalid_argument(std::string(what) + ": is '" + std::string(name) +
                              "', it must be 'sm80' or 'sm90'");
}

namespace {

// Points to one of check_family's names.
std::atomic<const char*>& family_setting() {
  static std::atomic<const char*> setting = [] {
    const char* const value = std::getenv("FLASH_ATTN2_FAMILY");
    return check_family("FLASH_ATTN2_FAMILY", value == nullptr ? "" : value).data();
  }();
  return setting;
}

}  // namespace

std::string_view forced_family() { return family_setting().load(); }

void force_family(std::string_view name) {
  family_setting().store(check_family("family", name).data());
}

Plan make_plan(const Problem& problem, const DeviceLimits& device) {
  Plan plan;
  plan.row = choose(problem, device);
  if (plan.row == nullptr) return plan;
  const KernelRow& row = *plan.row;
  const AttentionShape& shape = problem.shape;
  const int64_t row_blocks =
      count_blocks("seqlen_q", shape.seqlen_q, row.tile_m, int64_t{shape.batch} * shape.heads_q,
                   rows_of_tile(row) / row.tile_m);
  const int64_t resident = clusters_at_a_time(row, device) * row.cluster;
  plan.launch.smem_bytes = row.smem_bytes;
  if (problem.direction == Direction::kForward) {
    plan.launch.grid =
        row.persistent ? std::min(ceil_div(row_blocks, int64_t{row.teams}), resident) : row_blocks;
    plan_forward_order(plan, problem, device);
  } else {
    plan.head_parts = head_parts(row, problem, device);
    Problem in_parts = problem;
    in_parts.shape.heads_k *= plan.head_parts;
    const int64_t blocks = count_blocks("seqlen_k", shape.seqlen_k, row.tile_n,
                                        int64_t{shape.batch} * in_parts.shape.heads_k, row.cluster);
    const int64_t works =
        row.head_rows > 0 ? int64_t{shape.batch} * in_parts.shape.heads_k : blocks;
    plan.launch.grid = row.persistent ? std::min(works, resident) : works;
    plan_heads(plan, in_parts, device);
    plan.workspace = lay_out(row, in_parts, plan);
    if (problem.deterministic) plan.turn_group = turn_group(row, shape, device);
  }
  return plan;
}

std::vector<Refusal> refusals(const Problem& problem, const DeviceLimits& device) {
  const KernelRow* chosen = choose(problem, device);
  std::vector<Refusal> result;
  for (const KernelRow& row : kernel_rows()) {
    if (&row != chosen) {
      result.push_back({row.name, refusal_reason(row, chosen, problem, device)});
    }
  }
  return result;
}

void carve_workspace(BackwardParams& params, void* base, const Workspace& workspace) {
  const auto at = [base](int64_t offset) -> void* {
    return offset == Workspace::kAbsent ? nullptr : static_cast<char*>(base) + offset;
  };
  params.lse_log2 = static_cast<float*>(at(workspace.lse_log2));
  params.delta = static_cast<float*>(at(workspace.delta));
  params.dq_accum = static_cast<float*>(at(workspace.dq_accum));
  params.counters = static_cast<int*>(at(workspace.counters));
  params.counter_ints = (workspace.counters_end - workspace.counters) / int64_t{sizeof(int)};
  params.delta_ready = static_cast<int*>(at(workspace.delta_ready));
  params.dq_added = static_cast<int*>(at(workspace.dq_added));
  params.dq_converted = static_cast<int*>(at(workspace.dq_converted));
  params.dq_turn = static_cast<int*>(at(workspace.dq_turn));
  params.ticket = static_cast<int*>(at(workspace.ticket));
  params.dk_parts = at(workspace.dk_parts);
  params.dv_parts = at(workspace.dv_parts);
}

const char* direction_name(Direction direction) {
  return direction == Direction::kForward ? "forward" : "backward";
}

const char* dtype_name(DType dtype) { return dtype == DType::kFloat16 ? "float16" : "bfloat16"; }

std::string describe(const Plan& plan) {
  if (plan.row == nullptr) return "no compiled kernel serves this problem";
  const KernelRow& row = *plan.row;
  std::string text = row.name + ": grid " + std::to_string(plan.launch.grid) + ", " +
                     std::to_string(row.threads) + " threads, " +
                     std::to_string(plan.launch.smem_bytes) + " bytes of shared memory";
  if (row.direction == Direction::kForward) {
    return text + ", " + std::to_string(plan.heads_per_group) + " query heads at a time";
  }
  return text + ", " + std::to_string(plan.workspace.total) + " bytes of workspace";
}

}  // namespace flash_attn2
