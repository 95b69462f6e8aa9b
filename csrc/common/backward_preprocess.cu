#include "backward_preprocess.h"

#include <cutlass/numeric_types.h>

#include "../core/delta.cuh"
#include "../core/grid_dependency.cuh"
#include "../core/launch.h"
#include "../core/window.h"

namespace flash_attn2 {
namespace {

constexpr int kThreads = 256;

struct PreprocessParams {
  BackwardParams backward;
  int64_t rows;          // of the first delta_lead KV heads
  int rows_rounded;      // seqlen_q rounded up to the tile
  int head_dim_rounded;  // floats of a row of the dQ accumulator
  int lanes;             // threads that share a row: a power of two, one 16-byte chunk of dO each
};

template <class Element>
__global__ void __launch_bounds__(kThreads)
    backward_preprocess_kernel(const __grid_constant__ PreprocessParams params) {
  let_next_kernel_start();
  const BackwardParams& bwd = params.backward;
  const AttentionShape& shape = bwd.shape;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bwd.counter_ints;
       i += int64_t(gridDim.x) * kThreads) {
    bwd.counters[i] = 0;
  }
  const int lane = threadIdx.x % params.lanes;
  const int64_t place =
      int64_t(blockIdx.x) * (kThreads / params.lanes) + threadIdx.x / params.lanes;
  const bool in_grid = place < params.rows;
  const int head_row = int(place / params.rows_rounded);
  const int row = int(place - int64_t(head_row) * params.rows_rounded);

  DeltaRow delta;
  if (in_grid) {
    delta = DeltaSource<Element>(bwd, head_row, row, lane * kDeltaChunk).load(bwd, 0);
  }
  const float dot = sum_lanes(delta.dot<Element>(), params.lanes);
  if (!in_grid) return;

  if (head_row / (shape.heads_q / shape.heads_k) < bwd.dq_slots) {
    float4* dq = reinterpret_cast<float4*>(bwd.dq_accum + place * params.head_dim_rounded);
    for (int i = lane; i < params.head_dim_rounded / 4; i += params.lanes) {
      dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  if (lane == 0) delta.store(bwd, place, dot);
}

}  // namespace

void launch_backward_preprocess(const BackwardParams& params, DType dtype, int tile_m,
                                int head_dim_rounded, CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  const int rows_rounded = ceil_div(shape.seqlen_q, tile_m) * tile_m;
  const int64_t rows = int64_t(params.delta_lead) * (shape.heads_q / shape.heads_k) * rows_rounded;
  PreprocessParams all{params, rows, rows_rounded, head_dim_rounded, 1};
  while (all.lanes * kDeltaChunk < shape.head_dim_v) all.lanes *= 2;
  const int rows_per_block = kThreads / all.lanes;
  auto kernel = dtype == DType::kFloat16 ? backward_preprocess_kernel<cutlass::half_t>
                                         : backward_preprocess_kernel<cutlass::bfloat16_t>;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const int64_t least = params.counter_ints > 0 ? 1 : 0;
  launch(kernel, blocks > least ? blocks : least, kThreads, 0, stream, all, "backward pre-process");
}

}  // namespace flash_attn2
