// The fp32 dQ accumulator that key blocks share (steps B7 and B8).
//
// It is private to the backward, so a (kTileM, kHeadDim) tile lies in the order in which threads
// hold its accumulators: value group i of thread t is at (i * kThreads + t) * kVector. Every warp
// then adds to whole cache lines; the post-process reads the same fragments back.
#pragma once

#include "../core/params.h"
#include "../core/window.h"
#include "gemm.cuh"

namespace flash_attn2::sm80 {

// Floats that one reduction instruction adds: four from sm_90 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int kDqVector = 4;
#else
inline constexpr int kDqVector = 1;
#endif

// `red` by name: atomicAdd here compiles to the form that returns the old value, which costs
// about 5% of the pass.
template <class Traits, class Acc>
__device__ __forceinline__ void add_to_dq(float* tile, const Acc& acc, int thread) {
  CUTE_UNROLL
  for (int i = 0; i < size(acc); i += kDqVector) {
    float* target = tile + (i / kDqVector * Traits::kThreads + thread) * kDqVector;
    if constexpr (kDqVector == 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target),
                   "f"(acc(i)), "f"(acc(i + 1)), "f"(acc(i + 2)), "f"(acc(i + 3))
                   : "memory");
    } else {
      asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target), "f"(acc(i))
                   : "memory");
    }
  }
}

template <class Traits, class Acc>
__device__ __forceinline__ void read_dq(const float* tile, Acc& acc, int thread) {
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) {
    acc(i) = tile[(i / kDqVector * Traits::kThreads + thread) * kDqVector + i % kDqVector];
  }
}

// Deterministic mode: key blocks add to a dQ tile one after the other, in the order of the keys.
__device__ __forceinline__ void wait_for_turn(const int* turns, int64_t tile, int turn) {
  if (turns == nullptr) return;
  if (threadIdx.x == 0) {
    int current;
    do {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(current) : "l"(turns + tile));
    } while (current != turn);
  }
  __syncthreads();
}

__device__ __forceinline__ void pass_turn(int* turns, int64_t tile, int turn) {
  if (turns == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(turns + tile), "r"(turn + 1));
  }
}

// B8: dQ = softmax_scale * accumulator, in the caller's dtype and layout. One thread block per
// tile.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    dq_postprocess_kernel(const __grid_constant__ BackwardParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x;
  const AttentionShape& shape = params.shape;
  const int row_blocks = ceil_div(shape.seqlen_q, Traits::kTileM);
  const int head_row = blockIdx.x / row_blocks;
  const int row_begin = (blockIdx.x - head_row * row_blocks) * Traits::kTileM;

  typename Traits::MmaQ mma;
  auto acc = partition_fragment_C(mma, cute::Shape<Int<Traits::kTileM>, Int<Traits::kHeadDim>>{});
  read_dq<Traits>(params.dq_accum + int64_t(blockIdx.x) * Traits::kQElements, acc, thread);
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) acc(i) *= params.softmax_scale;

  auto tile =
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(smem)), typename Traits::SmemQ{});
  store_accumulators<Element>(mma, acc, tile, thread);
  __syncthreads();
  store_tile<Element, Traits::kHeadDim, Traits::kThreads>(
      tile,
      global_tile<Element, Traits::kTileM, Traits::kHeadDim>(params.dq, head_row / shape.heads_q,
                                                             head_row % shape.heads_q, row_begin),
      thread, shape.seqlen_q - row_begin, shape.head_dim);
}

}  // namespace flash_attn2::sm80
