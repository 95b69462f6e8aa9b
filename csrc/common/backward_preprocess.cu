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
  int rows_rounded;      // seqlen_q rounded up to the tile
  int head_dim_rounded;  // floats of a row of the dQ accumulator
  int lanes;             // threads that share a row: a power of two, one 16-byte chunk of dO each
  int blocks;            // thread blocks that share a query head
};

// kRows: rows of a thread, all of whose loads it issues first.
template <class Element, int kRows>
__global__ void __launch_bounds__(kThreads)
    backward_preprocess_kernel(const __grid_constant__ PreprocessParams params) {
  let_next_kernel_start();
  const BackwardParams& bwd = params.backward;
  const AttentionShape& shape = bwd.shape;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bwd.counter_ints;
       i += int64_t(gridDim.x) * kThreads) {
    bwd.counters[i] = 0;
  }
  if (params.blocks == 0) return;
  const int lane = threadIdx.x % params.lanes, stride = kThreads / params.lanes;
  const int head_row = blockIdx.x / params.blocks;
  const int first = int(blockIdx.x - unsigned(head_row) * params.blocks) * stride * kRows +
                    threadIdx.x / params.lanes;

  const DeltaSource<Element> source(bwd, head_row, first, lane * kDeltaChunk);
  DeltaRow rows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[i] = source.load(bwd, i * stride);
  float dots[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    dots[i] = sum_lanes(rows[i].template dot<Element>(), params.lanes);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * stride;
    if (row >= params.rows_rounded) continue;
    const int64_t place = int64_t(head_row) * params.rows_rounded + row;
    if (head_row / (shape.heads_q / shape.heads_k) < bwd.dq_slots) {
      float4* dq = reinterpret_cast<float4*>(bwd.dq_accum + place * params.head_dim_rounded);
      for (int j = lane; j < params.head_dim_rounded / 4; j += params.lanes) {
        dq[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
    if (lane == 0) rows[i].store(bwd, place, dots[i]);
  }
}

template <class Element>
void launch_for(const BackwardParams& params, int tile_m, int head_dim_rounded,
                CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  const int rows_rounded = ceil_div(shape.seqlen_q, tile_m) * tile_m;
  PreprocessParams all{params, rows_rounded, head_dim_rounded, 1, 0};
  while (all.lanes * kDeltaChunk < shape.head_dim_v) all.lanes *= 2;
  const auto launch_rows = [&](auto kernel, int rows) {
    all.blocks = ceil_div(rows_rounded, kThreads / all.lanes * rows);
    const int64_t blocks =
        int64_t(params.delta_lead) * (shape.heads_q / shape.heads_k) * all.blocks;
    const int64_t least = params.counter_ints > 0 ? 1 : 0;
    launch(kernel, blocks > least ? blocks : least, kThreads, 0, stream, all,
           "backward pre-process");
  };
  // Without zeros to write the loads are all that it takes time for.
  if (params.dq_slots == 0) {
    launch_rows(backward_preprocess_kernel<Element, 4>, 4);
  } else {
    launch_rows(backward_preprocess_kernel<Element, 1>, 1);
  }
}

}  // namespace

void launch_backward_preprocess(const BackwardParams& params, DType dtype, int tile_m,
                                int head_dim_rounded, CUstream_st* stream) {
  if (dtype == DType::kFloat16) {
    launch_for<cutlass::half_t>(params, tile_m, head_dim_rounded, stream);
  } else {
    launch_for<cutlass::bfloat16_t>(params, tile_m, head_dim_rounded, stream);
  }
}

}  // namespace flash_attn2
