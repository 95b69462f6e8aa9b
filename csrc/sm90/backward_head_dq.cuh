// dQ of a head in shared memory (steps B7 and B8), by a warpgroup of its own.
//
// A thread sums what its wgmmas give it, so the sums of a query tile lie as the accumulators do:
// value group i of thread t at (i * 128 + t) * 4. The first key block that adds to a tile sets it,
// the last one rounds it, in the same place, for a bulk store.
#pragma once

#include "backward_consumer.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct HeadDq {
  using Element = typename Traits::Element;
  using MmaDq = typename Traits::MmaDq;
  using Acc = Accumulator<MmaDq, Traits::kTileM, Traits::kHeadDim>;
  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const int thread;       // of the warpgroup
  int latest_store = -1;  // its tile

  // The thread's first value group.
  __device__ __forceinline__ float4* sums(int tile) const {
    return reinterpret_cast<float4*>(smem.dq_sums[tile]) + thread;
  }
  // That add to the tile.
  __device__ __forceinline__ BlockRange key_blocks_of(int tile) const {
    return VisibleKeys(arguments.params.shape, arguments.params.window)
        .key_blocks(tile * Traits::kTileM, Traits::kTileM, Traits::kTileN);
  }

  __device__ __forceinline__ void load_sums(int tile, Acc& acc) const {
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      const float4 x = sums(tile)[i / 4 * kWarpGroupThreads];
      acc(i) = x.x, acc(i + 1) = x.y, acc(i + 2) = x.z, acc(i + 3) = x.w;
    }
  }
  __device__ __forceinline__ void store_sums(int tile, const Acc& acc) const {
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      sums(tile)[i / 4 * kWarpGroupThreads] =
          make_float4(acc(i), acc(i + 1), acc(i + 2), acc(i + 3));
    }
  }

  // B7: dQ += dS K of a step, of query tile `tile`.
  __device__ __forceinline__ void add(int step, const TileCoord& coord, int tile) {
    const BlockRange blocks = key_blocks_of(tile);
    const bool is_first = coord.block == blocks.begin;
    Acc acc;
    if (is_first) {
      clear(acc);
    } else {
      load_sums(tile, acc);
    }
    const Ring<Traits::kScoreBuffers> ring{uint32_t(step)};
    auto ds = operand_a<MmaDq>(
        smem_tile<Traits::kTileM, Traits::kTileN>(smem.ds + ring.stage() * Traits::kScoreElements));
    const auto k = operand_b<MmaDq>(
        transposed(smem_tile<Traits::kTileN, Traits::kHeadDim, Traits::kBoxK>(smem.k)));
    smem.barriers.ds_full[ring.stage()].wait(ring.parity());
    cutlass::arch::fence_view_async_shared();
    start_gemm<MmaDq, Accumulate::kYes>(ds, k, acc);
    finish_gemm<0>(acc);
    arrive_as_warp(smem.barriers.ds_empty[ring.stage()], thread);
    if (is_first) wait_for_place(tile);
    if (coord.block == blocks.end - 1) {
      write(coord, tile, acc);
    } else {
      store_sums(tile, acc);
    }
  }

  // Until the tile of the head before has left its place.
  __device__ __forceinline__ void wait_for_place(int tile) const {
    if (thread == 0) {
      if (tile == latest_store) {
        tma_store_wait<0>();
      } else {
        tma_store_wait<1>();
      }
    }
    sync_dq();
  }

  // B8: dQ = softmax_scale * sums of a tile, rounded.
  __device__ __forceinline__ void write(const TileCoord& coord, int tile, Acc& acc) {
    latest_store = tile;
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) acc(i) *= arguments.params.softmax_scale;
    const auto values = rounded<Element>(acc);
    const auto target =
        smem_tile<Traits::kTileM, Traits::kHeadDim>(reinterpret_cast<Element*>(smem.dq_sums[tile]));
    const StoreLane lane = StoreLane::rows(thread);
    sync_dq();  // all have read their sums
    CUTE_UNROLL
    for (int block = 0; block < Traits::kHeadDim / 16; ++block) {
      store_block<SM90_U32x4_STSM_N>(
          values, block, &target(thread / 32 * 16 + lane.row, 16 * block + lane.column));
    }
    cutlass::arch::fence_view_async_shared();
    sync_dq();
    if (thread == 0) {
      tma_store<Traits::kTileM, Traits::kHeadDim>(arguments.dq, &target(0, 0),
                                                  {tile * Traits::kTileM, coord.head, coord.batch});
    }
  }

  // Zeros for the tiles of a head that see no key.
  __device__ __forceinline__ void write_unseen(const TileCoord& coord) {
    const int tiles = ceil_div(arguments.params.shape.seqlen_q, Traits::kTileM);
    CUTE_NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
      const BlockRange blocks = key_blocks_of(tile);
      if (blocks.begin < blocks.end) continue;
      Acc acc;
      clear(acc);
      wait_for_place(tile);
      write(coord, tile, acc);
    }
  }
};

// All that the thread block has to do.
template <class Traits>
__device__ __forceinline__ void sum_dq_of_heads(const BackwardArguments& arguments,
                                                typename Traits::SharedStorage& smem) {
  HeadDq<Traits> dq{arguments, smem, int(threadIdx.x % kWarpGroupThreads)};
  const int last_block = key_blocks<Traits>(arguments.params) - 1;
  int step = 0;
  for_each_work<Traits>(smem, [&](const BackwardWork<Traits>& work, int number) {
    smem.barriers.k_full.wait(number & 1);
    CUTE_NO_UNROLL
    for (int tile = work.blocks.end - 1; tile >= work.blocks.begin; --tile) {
      dq.add(step++, work.coord, tile);
    }
    arrive_as_warp(smem.barriers.done[number % Traits::kWorks], dq.thread);
    if (work.coord.block == last_block) dq.write_unseen(work.coord);
    release_work<Traits>(smem, number);
  });
  if (dq.thread == 0) tma_store_wait<0>();
}

}  // namespace flash_attn2::sm90
