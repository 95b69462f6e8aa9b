// The list of compiled kernels. Each instance file (csrc/*/instances/*.cu) adds its rows at load
// time; the plan reads the list, and list_kernels() shows it.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "../core/params.h"

struct CUstream_st;

namespace flash_attn2 {

enum class Direction { kForward, kBackward };
enum class DType { kFloat16, kBFloat16 };

// Launch geometry that the plan decided on the host.
struct LaunchConfig {
  int64_t grid = 0;  // thread blocks of the main kernel
  int smem_bytes = 0;
};

using ForwardLaunch = void (*)(const ForwardParams&, const LaunchConfig&, CUstream_st*);
using BackwardLaunch = void (*)(const BackwardParams&, const LaunchConfig&, CUstream_st*);

struct KernelRow {
  std::string name;  // e.g. sm80_fwd_bf16_d128_128x64, sm90_fwd_bf16_d192_v128_128x128,
                     // sm90_fwd_bf16_d128_128x128_x2
  std::string family;
  Direction direction;
  DType dtype;
  int head_dim;    // bucket: serves every head_dim of Q and K <= this
  int head_dim_v;  // likewise for V and the output
  int tile_m, tile_n;
  int threads;
  int smem_bytes;  // dynamic shared memory of one thread block
  int min_arch;    // 80: runs from sm_80 on; of two families that fit, the newer one wins
  int max_arch = std::numeric_limits<int>::max();  // 90: runs up to sm_90
  bool persistent = false;   // the grid has one thread block a multiprocessor at most
  int head_rows = 0;         // backward: a thread block takes whole heads, of so many query rows at
                             // most, see sm90/backward_head.cuh; 0: key blocks
  bool dq_ring = false;      // backward: dQ is converted on the way, see sm90/dq_accumulator.cuh
  bool delta_ahead = false;  // backward: see sm90/delta_ahead.cuh
  int cluster = 1;           // thread blocks that load for each other. Forward: needs no mask, and
                             // tiles of a head that divide by it; backward: the columns of dQ are
                             // shared out among them
  int teams = 1;             // tiles that a persistent thread block works on at a time
  // The longest seqlen_k it serves, and without a mask.
  int max_keys = std::numeric_limits<int>::max();
  int max_unmasked_keys = std::numeric_limits<int>::max();
  int preference;  // among rows of a family that fit, the lowest wins
  // The launches enqueue every kernel of the pass (backward: pre-process, main, dQ post-process)
  // on the stream and throw std::runtime_error with CUDA's message when a launch fails. An empty
  // grid launches nothing.
  ForwardLaunch forward = nullptr;
  BackwardLaunch backward = nullptr;
};

// Rows in the order of registration; stable for one binary.
const std::vector<KernelRow>& kernel_rows();

// Adds a row; a static object of this type in an instance file is how a kernel enters the list.
struct RegisterKernel {
  explicit RegisterKernel(KernelRow row);
};

}  // namespace flash_attn2
