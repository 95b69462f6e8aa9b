#include "backward_preprocess.h"

#include <cutlass/numeric_types.h>

#include <cmath>

#include "../core/grid_dependency.cuh"
#include "../core/launch.h"
#include "../core/softmax.cuh"
#include "../core/window.h"

namespace flash_attn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements in 16 bytes

struct PreprocessParams {
  BackwardParams backward;
  int tile_m;
  int rows_rounded;      // seqlen_q rounded up to the tile
  int head_dim_rounded;  // floats of a row of the dQ accumulator
  int lanes;             // threads that share a row: a power of two, one 16-byte chunk of dO each
};

template <class Element>
__device__ __forceinline__ float dot_chunk(const TensorView& a, const TensorView& b, int batch,
                                           int head, int row, int column) {
  const auto chunk = [&](const TensorView& view) {
    return *reinterpret_cast<const uint4*>(static_cast<const Element*>(view.ptr) +
                                           batch * view.batch_stride + head * view.head_stride +
                                           row * view.row_stride + column);
  };
  const uint4 x = chunk(a), y = chunk(b);
  const Element* xs = reinterpret_cast<const Element*>(&x);
  const Element* ys = reinterpret_cast<const Element*>(&y);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum += float(xs[i]) * float(ys[i]);
  return sum;
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    backward_preprocess_kernel(const __grid_constant__ PreprocessParams params) {
  let_next_kernel_start();
  const BackwardParams& bwd = params.backward;
  const AttentionShape& shape = bwd.shape;
  if (bwd.ticket != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *bwd.ticket = 0;
  const int lane = threadIdx.x % params.lanes;
  const int64_t row_index =
      int64_t(blockIdx.x) * (kThreads / params.lanes) + threadIdx.x / params.lanes;
  const int64_t rows = int64_t(shape.batch) * shape.heads_q * params.rows_rounded;
  const bool in_grid = row_index < rows;
  const int head_row = int(row_index / params.rows_rounded);
  const int row = int(row_index - int64_t(head_row) * params.rows_rounded);
  const bool valid = in_grid && row < shape.seqlen_q;

  float dot = 0.f;
  if (valid && lane * kChunk < shape.head_dim_v) {
    dot = dot_chunk<Element>(bwd.dout, bwd.out, head_row / shape.heads_q, head_row % shape.heads_q,
                             row, lane * kChunk);
  }
  for (int offset = params.lanes / 2; offset > 0; offset /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, offset);
  }
  if (!in_grid) return;

  const int group = shape.heads_q / shape.heads_k;
  if (head_row / group < bwd.dq_slots) {
    float4* dq = reinterpret_cast<float4*>(bwd.dq_accum + row_index * params.head_dim_rounded);
    for (int i = lane; i < params.head_dim_rounded / 4; i += params.lanes) {
      dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  if (lane != 0) return;
  if (bwd.dq_added != nullptr && row == 0 && head_row % group == 0) {
    bwd.dq_added[head_row / group] = 0;
    bwd.dq_converted[head_row / group] = 0;
  }
  if (bwd.dq_turn != nullptr && row % params.tile_m == 0) {
    int* const turns = bwd.dq_turn + row_index / params.tile_m * bwd.dq_parts;
    for (int part = 0; part < bwd.dq_parts; ++part) turns[part] = 0;
  }
  // +inf makes P = exp2(S - L) vanish: for padding rows and for rows that see no key.
  float lse_log2 = INFINITY, delta = 0.f;
  if (valid) {
    const int64_t source = int64_t(head_row) * shape.seqlen_q + row;
    const float lse = bwd.lse[source];
    if (lse != -INFINITY) {
      lse_log2 = lse * kLog2e;
      delta = dot - (bwd.dlse == nullptr ? 0.f : bwd.dlse[source]);
    }
  }
  bwd.lse_log2[row_index] = lse_log2;
  bwd.delta[row_index] = delta;
}

}  // namespace

void launch_backward_preprocess(const BackwardParams& params, DType dtype, int tile_m,
                                int head_dim_rounded, CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  PreprocessParams all{params, tile_m, ceil_div(shape.seqlen_q, tile_m) * tile_m, head_dim_rounded,
                       1};
  while (all.lanes * kChunk < shape.head_dim_v) all.lanes *= 2;
  const int64_t rows = int64_t(shape.batch) * shape.heads_q * all.rows_rounded;
  const int rows_per_block = kThreads / all.lanes;
  auto kernel = dtype == DType::kFloat16 ? backward_preprocess_kernel<cutlass::half_t>
                                         : backward_preprocess_kernel<cutlass::bfloat16_t>;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const int64_t least = params.ticket != nullptr ? 1 : 0;  // the ticket is there without rows, too
  launch(kernel, blocks > least ? blocks : least, kThreads, 0, stream, all, "backward pre-process");
}

}  // namespace flash_attn2
