// The fp32 dQ accumulator in global memory that key blocks share (steps B7 and B8).
//
// It is private to the backward, so a (kTileM, kHeadDim) tile lies in the order in which threads
// hold its accumulators: value group i of thread t in part p (BackwardTraits::kDqParts of each
// consumer) is at ((p * groups + i) * 128 + t) * 4. A warp adds to whole cache lines.
#pragma once

#include "../core/grid_dependency.cuh"
#include "backward_traits.cuh"

namespace flash_attn2::sm90 {

template <class Acc>
__device__ __forceinline__ void add_to_dq(float* tile, const Acc& acc, int part) {
  float* target =
      tile + (part * int(size(acc)) * kWarpGroupThreads + threadIdx.x % kWarpGroupThreads * 4);
  CUTE_UNROLL
  for (int i = 0; i < size(acc); i += 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     target + i * kWarpGroupThreads),
                 "f"(acc(i)), "f"(acc(i + 1)), "f"(acc(i + 2)), "f"(acc(i + 3))
                 : "memory");
  }
}

inline constexpr int kPostprocessThreads = 256;

// B8: dQ = softmax_scale * accumulator, in the caller's dtype and layout. One thread block per
// tile. A thread reads four value groups that are neighbours in the accumulator: 8 columns of two
// rows.
template <class Traits>
__global__ void __launch_bounds__(kPostprocessThreads)
    dq_postprocess_kernel(const __grid_constant__ BackwardParams params) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kDqColumns / 8;  // of one part
  const AttentionShape& shape = params.shape;
  const int row_blocks = ceil_div(shape.seqlen_q, Traits::kTileM);
  const int64_t tile = blockIdx.x;
  const int head_row = int(tile / row_blocks);
  const int row_begin = int(tile - int64_t(head_row) * row_blocks) * Traits::kTileM;
  const float4* source =
      reinterpret_cast<const float4*>(params.dq_accum + tile * Traits::kDqElements);
  Element* target = static_cast<Element*>(params.dq.ptr) +
                    head_row / shape.heads_q * params.dq.batch_stride +
                    head_row % shape.heads_q * params.dq.head_stride;
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < Traits::kDqElements / 16; i += kPostprocessThreads) {
    // (chunk of 8 columns, row r of 32: rows 16 * (r / 8) + r % 8 and 8 more, part)
    const int chunk = i % kChunks, r = i / kChunks % 32, part = i / (kChunks * 32);
    const float4* group = source + ((part * kChunks + chunk) * 32 + r) * 4;
    const int row = row_begin + r / 8 * 16 + r % 8 + (Traits::kSplitDqRows ? part * 64 : 0);
    const int column = chunk * 8 + (Traits::kSplitDqRows ? 0 : part * Traits::kDqColumns);
    alignas(16) Element rows[2][8];
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float4 x = group[j];
      rows[0][2 * j] = Element(x.x * params.softmax_scale);
      rows[0][2 * j + 1] = Element(x.y * params.softmax_scale);
      rows[1][2 * j] = Element(x.z * params.softmax_scale);
      rows[1][2 * j + 1] = Element(x.w * params.softmax_scale);
    }
    CUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (row + 8 * j < shape.seqlen_q && column < shape.head_dim) {
        *reinterpret_cast<uint4*>(target + (row + 8 * j) * params.dq.row_stride + column) =
            *reinterpret_cast<const uint4*>(rows[j]);
      }
    }
  }
}

}  // namespace flash_attn2::sm90
