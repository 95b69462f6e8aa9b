// flash_attn2._C: the host side for Python's introspection. Importing the library also registers
// the CUDA ops (forward.cpp, backward.cpp, autograd.cpp).
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/schedule.h"
#include "../core/turn_order.h"
#include "../plan/plan.h"
#include "device.h"

namespace py = pybind11;

namespace flash_attn2 {
namespace {

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string cutlass_version() {
  return std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
         std::to_string(CUTLASS_PATCH);
}

py::dict build_info() {
  std::set<int> head_dims;
  std::set<std::pair<int, int>> head_dim_pairs;
  std::set<std::string> dtypes;
  for (const KernelRow& row : kernel_rows()) {
    head_dims.insert(row.head_dim);
    head_dim_pairs.emplace(row.head_dim, row.head_dim_v);
    dtypes.insert(dtype_name(row.dtype));
  }
  py::dict info;
  info["version"] = FLASH_ATTN2_VERSION;
  info["archs"] = split_archs(built_archs());
  info["cuda"] = cuda_version();
  info["cutlass"] = cutlass_version();
  info["torch"] = TORCH_VERSION;
  info["head_dims"] = std::vector<int>(head_dims.begin(), head_dims.end());
  info["head_dim_pairs"] =
      std::vector<std::pair<int, int>>(head_dim_pairs.begin(), head_dim_pairs.end());
  info["dtypes"] = std::vector<std::string>(dtypes.begin(), dtypes.end());
  return info;
}

py::list list_kernels() {
  py::list kernels;
  for (const KernelRow& row : kernel_rows()) {
    py::dict kernel;
    kernel["name"] = row.name;
    kernel["family"] = row.family;
    kernel["direction"] = direction_name(row.direction);
    kernel["dtype"] = dtype_name(row.dtype);
    kernel["head_dim"] = row.head_dim;
    kernel["head_dim_v"] = row.head_dim_v;
    kernel["tile_m"] = row.tile_m;
    kernel["tile_n"] = row.tile_n;
    kernel["threads"] = row.threads;
    kernel["smem_bytes"] = row.smem_bytes;
    kernel["persistent"] = row.persistent;
    kernel["head_rows"] = row.head_rows;
    kernel["delta_ahead"] = row.delta_ahead;
    kernel["cluster"] = row.cluster;
    kernel["teams"] = row.teams;
    kernel["max_keys"] = row.max_keys;
    kernel["max_unmasked_keys"] = row.max_unmasked_keys;
    kernels.append(kernel);
  }
  return kernels;
}

Direction parse_direction(const std::string& text) {
  if (text == "forward") return Direction::kForward;
  if (text == "backward") return Direction::kBackward;
  throw std::invalid_argument("direction: is '" + text + "', it must be 'forward' or 'backward'");
}

DType parse_dtype(const std::string& text) {
  if (text == "float16") return DType::kFloat16;
  if (text == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype: is '" + text + "', it must be 'float16' or 'bfloat16'");
}

py::dict plan_to_dict(const Problem& problem, const DeviceLimits& device) {
  const Plan plan = make_plan(problem, device);
  py::dict result;
  const char* const row_keys[] = {"kernel", "family", "tile_m", "tile_n", "threads"};
  if (plan.row == nullptr) {
    for (const char* key : row_keys) result[key] = py::none();
  } else {
    const KernelRow& row = *plan.row;
    result["kernel"] = row.name;
    result["family"] = row.family;
    result["tile_m"] = row.tile_m;
    result["tile_n"] = row.tile_n;
    result["threads"] = row.threads;
  }
  result["grid"] = plan.launch.grid;
  result["smem_bytes"] = plan.launch.smem_bytes;
  result["workspace_bytes"] = plan.workspace.total;
  result["heads_per_group"] = plan.heads_per_group;
  result["head_parts"] = plan.head_parts;
  result["delta_lead"] = plan.delta_lead;
  result["dq_slots"] = plan.dq_slots;
  result["dq_lag"] = plan.dq_lag;
  result["tail_heads"] = plan.tail_heads;
  result["groups_turn"] = plan.groups_turn;
  result["rounds_turn"] = plan.rounds_turn;
  result["heads_together"] = plan.heads_together;
  result["heads_in_reverse"] = plan.heads_in_reverse;
  result["turn_group"] = plan.turn_group;
  result["window_left"] = problem.window.left;
  result["window_right"] = problem.window.right;
  result["description"] = describe(plan);
  py::list refused;
  for (const Refusal& refusal : refusals(problem, device)) {
    py::dict entry;
    entry["kernel"] = refusal.kernel;
    entry["reason"] = refusal.reason;
    refused.append(entry);
  }
  result["refused"] = refused;
  return result;
}

py::dict plan(const std::string& direction, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
              int64_t heads_q, int64_t heads_k, int64_t head_dim, int64_t head_dim_v,
              const std::string& dtype, int64_t window_left, int64_t window_right,
              bool deterministic, const std::string& gpu, const std::string& family) {
  Problem problem;
  problem.direction = parse_direction(direction);
  problem.dtype = parse_dtype(dtype);
  problem.shape = make_shape(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v);
  problem.window = make_window(window_left, window_right, problem.shape);
  problem.deterministic = deterministic;
  problem.family = family.empty() ? forced_family() : check_family("family", family);
  return plan_to_dict(problem, find_device(gpu));
}

// For every tile (first row, first key, needs a mask by itself, by the whole ones of its rows, by
// the whole ones of its keys).
std::vector<std::tuple<int, int, bool, bool, bool>> tiles_to_mask(int64_t seqlen_q,
                                                                  int64_t seqlen_k,
                                                                  int64_t window_left,
                                                                  int64_t window_right, int tile_m,
                                                                  int tile_n) {
  const AttentionShape shape = make_shape(1, seqlen_q, seqlen_k, 1, 1, 64, 64);
  const VisibleKeys visible(shape, make_window(window_left, window_right, shape));
  std::vector<std::tuple<int, int, bool, bool, bool>> tiles;
  for (int row = 0; row < seqlen_q; row += tile_m) {
    const BlockRange keys = visible.whole_key_blocks(row, tile_m, tile_n);
    for (int key = 0; key < seqlen_k; key += tile_n) {
      const int block = key / tile_n;
      tiles.emplace_back(row, key, visible.tile_needs_mask(row, tile_m, key, tile_n),
                         block < keys.begin || block >= keys.end,
                         !visible.whole_rows(tile_m, key, tile_n).contains(row));
    }
  }
  return tiles;
}

// For every thread block of the backward the (key block, head) it works on.
std::vector<std::pair<int, int>> backward_order(int key_blocks, int heads, int tail_heads,
                                                int heads_together, int heads_in_reverse) {
  std::vector<std::pair<int, int>> order;
  for (int index = 0; index < key_blocks * heads; ++index) {
    const TileCoord tile =
        backward_tile(index, key_blocks, heads, 1, tail_heads, heads_together, heads_in_reverse);
    order.emplace_back(tile.block, tile.head);
  }
  return order;
}

// For every key block of one head its walk over query blocks: pairs (query block, turn).
std::vector<std::vector<std::pair<int, int>>> turn_order(int64_t seqlen_q, int64_t seqlen_k,
                                                         int64_t window_left, int64_t window_right,
                                                         int tile_m, int tile_n, int group,
                                                         int head, int heads, int tail_heads) {
  BackwardParams params;
  params.shape = make_shape(1, seqlen_q, seqlen_k, heads, heads, 64, 64);
  params.tail_heads = tail_heads;
  params.window = make_window(window_left, window_right, params.shape);
  params.turn_group = group;
  const TurnOrder order(params, tile_m, tile_n, head);
  std::vector<std::vector<std::pair<int, int>>> walks;
  for (int key_block = 0; key_block * tile_n < seqlen_k; ++key_block) {
    const BlockRange blocks = order.visible.query_blocks(key_block * tile_n, tile_m, tile_n);
    walks.emplace_back();
    int block = order.start(key_block, blocks);
    for (int step = blocks.begin; step < blocks.end; ++step) {
      walks.back().emplace_back(block, order.turn(key_block, block));
      block += order.downwards ? -1 : 1;
      if (block == blocks.end) block = blocks.begin;
    }
  }
  return walks;
}

std::string why_unusable_gpu(int arch, const std::string& archs) {
  DeviceLimits device;
  device.name = "cuda:0";
  device.arch = arch;
  return why_unusable(device, archs);
}

py::list list_gpus() {
  py::list gpus;
  for (const DeviceLimits& device : known_devices()) {
    py::dict gpu;
    gpu["name"] = device.name;
    gpu["arch"] = device.arch;
    gpu["sm_count"] = device.sm_count;
    gpu["smem_per_block_optin"] = device.smem_per_block_optin;
    gpu["l2_bytes"] = device.l2_bytes;
    gpus.append(gpu);
  }
  return gpus;
}

}  // namespace
}  // namespace flash_attn2

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace flash_attn2;
  m.doc() = "Host side of flash_attn2: what was built, and which kernel a problem gets.";
  m.def("build_info", &build_info,
        "Version, architectures, CUDA, CUTLASS and torch of this build; head_dims of Q and K, "
        "head_dim_pairs with V's, and dtypes.");
  m.def("list_kernels", &list_kernels, "Every compiled kernel, one dict each.");
  m.def("list_gpus", &list_gpus, "The GPUs that plan() knows, one dict each.");
  m.def("why_unusable", &why_unusable_gpu, py::arg("arch"), py::arg("archs"),
        "The error that a GPU of that compute capability (90) gets from a build for `archs` "
        "(\"80;90a\"); empty where it runs.");
  m.def("turn_order", &turn_order,
        "The deterministic backward's order (csrc/core/turn_order.h) for one head: for every key "
        "block the query blocks that it visits, in order, each with the number of key blocks that "
        "add to its dQ before.",
        py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("window_left"), py::arg("window_right"),
        py::arg("tile_m"), py::arg("tile_n"), py::arg("group"), py::arg("head") = 0,
        py::arg("heads") = 1, py::arg("tail_heads") = 0);
  m.def("tiles_to_mask", &tiles_to_mask,
        "For every tile its first row, its first key, and three times whether some of it is hidden "
        "(csrc/core/window.h): by itself, by the whole tiles of its rows, by those of its keys.",
        py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("window_left"), py::arg("window_right"),
        py::arg("tile_m"), py::arg("tile_n"));
  m.def("backward_order", &backward_order,
        "The (key block, head) of every thread block of the backward, by index "
        "(csrc/core/schedule.h).",
        py::arg("key_blocks"), py::arg("heads"), py::arg("tail_heads"), py::arg("heads_together"),
        py::arg("heads_in_reverse"));
  m.def(
      "force_family",
      [](const std::string& family) {
        const std::string before(forced_family());
        force_family(family);
        return before;
      },
      py::arg("family"),
      "Holds the process to the kernels of one family (\"sm80\", \"sm90\"; \"\": any), as the "
      "environment's FLASH_ATTN2_FAMILY does, and returns what it was held to before.");
  m.def(
      "plan", &plan,
      "The kernel, grid, shared memory and workspace for one problem on a GPU by name, and why "
      "each other kernel was refused. Raises ValueError for sizes out of range and unknown names.",
      py::arg("direction"), py::arg("batch"), py::arg("seqlen_q"), py::arg("seqlen_k"),
      py::arg("heads_q"), py::arg("heads_k"), py::arg("head_dim"), py::arg("head_dim_v"),
      py::arg("dtype") = "bfloat16", py::arg("window_left") = -1, py::arg("window_right") = -1,
      py::arg("deterministic") = false, py::arg("gpu") = "H200", py::arg("family") = "");
}
