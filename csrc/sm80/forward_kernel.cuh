// Forward pass on mma.sync (FlashAttention-2, section 3: algorithm 1 and the warp split of 3.3).
// One thread block owns kTileM query rows of one head and walks over the blocks of keys that the
// window leaves. Every warp owns its own slice of the rows: K and V tiles are shared, S, P and the
// output never leave a warp's registers.
#pragma once

#include "../core/schedule.h"
#include "../core/softmax.cuh"
#include "gemm.cuh"
#include "mask.cuh"

namespace flash_attn2::sm80 {

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kWarps_, bool kQInRegs_,
          int kStages_ = 2, int kMinBlocks_ = 1>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim;  // V has Q's bucket
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr bool kQInRegs = kQInRegs_;  // keep Q's fragments, or read them for each block
  // 2: K and V of the next block are loaded during this one. 1: V during S = Q K^T, the next K
  // during the rest; half the shared memory, for more thread blocks on a multiprocessor.
  static constexpr int kStages = kStages_;
  // Measured: a vote before the output is rescaled pays where the output is wide and a warp has
  // many rows; fragments are read two steps of K ahead where registers are to spare.
  static constexpr bool kVote = kHeadDim == 128 || kHeadDim == 192;
  static constexpr int kAhead = kHeadDim < 128 ? 2 : 1;
  static constexpr int kMinBlocks = kMinBlocks_;  // thread blocks a multiprocessor must hold

  using SmemQ = SmemTile<kTileM, kHeadDim>;
  using SmemKV = SmemTile<kTileN, kHeadDim>;
  using Mma = typename WarpMma<Element, kWarps, 1>::Type;

  // Shared memory: Q (the output's staging tile later), then stages of K and V side by side, so
  // that one address serves both.
  static constexpr int kQElements = kTileM * kHeadDim;
  static constexpr int kKVElements = kTileN * kHeadDim;
  static constexpr int kSmemBytes = (kQElements + 2 * kStages * kKVElements) * int(sizeof(Element));
};

// What one thread block works on.
struct ForwardTile {
  TileCoord coord;
  int head_k;
  int row_begin;
  BlockRange blocks;
};

template <class Traits>
__device__ __forceinline__ ForwardTile forward_tile_of_block(const ForwardParams& params,
                                                             const VisibleKeys& visible) {
  const AttentionShape& shape = params.shape;
  const TileCoord coord = forward_tile(blockIdx.x, ceil_div(shape.seqlen_q, Traits::kTileM),
                                       shape.heads_q, shape.batch, params.heads_per_group);
  const int row_begin = coord.block * Traits::kTileM;
  return {coord, coord.head / (shape.heads_q / shape.heads_k), row_begin,
          visible.key_blocks(row_begin, Traits::kTileM, Traits::kTileN)};
}

// F7: out = O / l and L = m + log l. The tile goes through Q's shared memory so that global memory
// sees whole 16-byte rows.
template <class Traits, class Acc, int kRows>
__device__ __forceinline__ void write_output(const ForwardParams& params, const ForwardTile& tile,
                                             typename Traits::Element* smem_q, Acc& acc_out,
                                             OnlineSoftmax<kRows>& softmax, int thread) {
  using Element = typename Traits::Element;
  typename Traits::Mma mma;
  float inverse_sum[kRows], lse[kRows];
  softmax.finish(inverse_sum, lse, params.softmax_scale * kLog2e);
  auto out = rows_columns(acc_out);
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(out); ++j) out(i, j) *= inverse_sum[i];
  }

  const AttentionShape& shape = params.shape;
  const int rows = shape.seqlen_q - tile.row_begin;
  auto coords = rows_columns(mma.get_thread_slice(thread).partition_C(
      make_identity_tensor(cute::Shape<Int<Traits::kTileM>, Int<Traits::kHeadDim>>{})));
  float* lse_tile = params.lse +
                    (int64_t(tile.coord.batch) * shape.heads_q + tile.coord.head) * shape.seqlen_q +
                    tile.row_begin;
  if (thread % 4 == 0) {  // one thread of each quad
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = get<0>(coords(i, 0));
      if (row < rows) lse_tile[row] = lse[i];
    }
  }

  auto smem_out = make_tensor(make_smem_ptr(smem_q), typename Traits::SmemQ{});
  __syncthreads();  // another warp may still read Q or the last K/V stage
  store_accumulators<Element>(mma, acc_out, smem_out, thread);
  __syncthreads();
  store_tile<Element, Traits::kHeadDim, Traits::kThreads>(
      smem_out,
      global_tile<Element, Traits::kTileM, Traits::kHeadDim>(params.out, tile.coord.batch,
                                                             tile.coord.head, tile.row_begin),
      thread, rows, shape.head_dim_v);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kHeadDim = Traits::kHeadDim;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x;
  const AttentionShape& shape = params.shape;
  const VisibleKeys visible(shape, params.window);
  const ForwardTile tile = forward_tile_of_block<Traits>(params, visible);

  Element* smem_q = reinterpret_cast<Element*>(smem);
  Element* smem_kv = smem_q + Traits::kQElements;
  auto tile_q = make_tensor(make_smem_ptr(smem_q), typename Traits::SmemQ{});
  auto tile_k = [&](int stage, auto layout) {
    return make_tensor(make_smem_ptr(smem_kv + stage * 2 * Traits::kKVElements), layout);
  };
  auto tile_v = [&](int stage, auto layout) {
    return make_tensor(
        make_smem_ptr(smem_kv + stage * 2 * Traits::kKVElements + Traits::kKVElements), layout);
  };

  // Starts the load of key block `block`, (kTileN, kHeadDim), of K or V.
  auto load_keys = [&](const TensorView& view, int head_dim, int block, auto target) {
    const int key_begin = block * kTileN;
    load_tile<Element, kHeadDim, Traits::kThreads>(
        global_tile<Element, kTileN, kHeadDim>(view, tile.coord.batch, tile.head_k, key_begin),
        target, thread, shape.seqlen_k - key_begin, head_dim);
  };
  auto load_k = [&](int block, int stage) {
    load_keys(params.k, shape.head_dim, block, tile_k(stage, typename Traits::SmemKV{}));
  };
  auto load_v = [&](int block, int stage) {
    load_keys(params.v, shape.head_dim_v, block, tile_v(stage, typename Traits::SmemKV{}));
  };

  typename Traits::Mma mma;
  auto acc_out = partition_fragment_C(mma, cute::Shape<Int<kTileM>, Int<kHeadDim>>{});
  clear(acc_out);
  auto out_rows = rows_columns(acc_out);
  constexpr int kRows = decltype(size<0>(out_rows))::value;
  OnlineSoftmax<kRows> softmax;
  auto coords = rows_columns(mma.get_thread_slice(thread).partition_C(
      make_identity_tensor(cute::Shape<Int<kTileM>, Int<kTileN>>{})));
  const float scale_log2 = params.softmax_scale * kLog2e;

  if (tile.blocks.begin < tile.blocks.end) {
    // F1. Q travels with the last key block.
    load_tile<Element, kHeadDim, Traits::kThreads>(
        global_tile<Element, kTileM, kHeadDim>(params.q, tile.coord.batch, tile.coord.head,
                                               tile.row_begin),
        tile_q, thread, shape.seqlen_q - tile.row_begin, shape.head_dim);
    load_k(tile.blocks.end - 1, 0);
    if (Traits::kStages == 1) cp_async_fence();  // V may come later
    load_v(tile.blocks.end - 1, 0);
    cp_async_fence();
  }

  const auto operand_q = operand<LoadMatrix>(tile_q);
  auto fragment_q = make_tensor<Element>(partition_shape_A(mma, operand_q.extents()));
  int stage = 0;
  for (int block = tile.blocks.end - 1; block >= tile.blocks.begin; --block) {
    const bool first = block == tile.blocks.end - 1, last = block == tile.blocks.begin;
    if (Traits::kStages == 1 && first) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // what was loaded is there; every warp is done with the previous block
    if constexpr (Traits::kStages == 2) {
      if (!last) load_k(block - 1, stage ^ 1);
      if (!last) load_v(block - 1, stage ^ 1);
    } else if (!first) {
      load_v(block, stage);
    }
    cp_async_fence();
    if constexpr (Traits::kQInRegs) {
      if (first) fragment_q = load_fragment_a(mma, operand_q, thread);
    }

    // F2: S = Q K^T, (kTileM, kTileN) in registers.
    auto acc_s = partition_fragment_C(mma, cute::Shape<Int<kTileM>, Int<kTileN>>{});
    clear(acc_s);
    const auto operand_k = operand<LoadMatrix>(tile_k(stage, typename Traits::SmemKV{}));
    if constexpr (Traits::kQInRegs) {
      gemm_rs<Traits::kAhead>(acc_s, mma, fragment_q, operand_k, thread);
    } else {
      gemm_ss<Traits::kAhead>(acc_s, mma, operand_q, operand_k, thread);
    }

    if constexpr (Traits::kStages == 1) {
      cp_async_wait<0>();
      __syncthreads();  // V is there; every warp is done with K
      if (!last) load_k(block - 1, stage);
      cp_async_fence();
    }

    // F3, F4, F5.
    auto scores = rows_columns(acc_s);
    if (visible.tile_needs_mask(tile.row_begin, kTileM, block * kTileN, kTileN)) {
      apply_mask(scores, coords, visible, tile.row_begin, block * kTileN);
    }
    softmax.update<Traits::kVote>(scores, out_rows, scale_log2);

    // F6: O += P V; P's accumulators are the A operand as they lie.
    const auto probabilities = convert<Element>(acc_s);
    gemm_rs<Traits::kAhead>(
        acc_out, mma, as_operand_a(probabilities),
        operand<LoadMatrixTransposed>(tile_v(stage, Transposed<typename Traits::SmemKV>{})),
        thread);
    if (Traits::kStages == 2) stage ^= 1;
  }
  write_output<Traits>(params, tile, smem_q, acc_out, softmax, thread);
}

}  // namespace flash_attn2::sm80
