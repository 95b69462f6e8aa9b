// What a thread block of the sm90 backward works on: which keys of which head, the walk over their
// query tiles, and how its warps go from one to the next.
#pragma once

#include "../core/schedule.h"
#include "../core/turn_order.h"
#include "backward_traits.cuh"

namespace flash_attn2::sm90 {

// Blocks of keys of a head, one for each cluster.
template <class Traits>
__device__ __forceinline__ int key_blocks(const BackwardParams& params) {
  return ceil_div(params.shape.seqlen_k, Traits::kClusterKeys);
}
// Query tiles of a KV head: of all heads of the group.
template <class Traits>
__device__ __forceinline__ int query_tiles(const BackwardParams& params) {
  return params.shape.heads_q / params.shape.heads_k *
         ceil_div(params.shape.seqlen_q, Traits::kTileM);
}
// Query tiles of the KV heads that had the slots of dQ's accumulator before `head` and its
// neighbours; none where every head has one.
template <class Traits>
__device__ __forceinline__ int tiles_before_slots(const BackwardParams& params, int head) {
  if constexpr (!Traits::kDqRing) return 0;
  return head / params.dq_slots * params.dq_slots * query_tiles<Traits>(params);
}

// Key blocks of all KV heads of the batch.
template <class Traits>
__device__ __forceinline__ unsigned key_tiles(const BackwardParams& params) {
  return unsigned(key_blocks<Traits>(params)) * params.shape.heads_k * params.shape.batch;
}

// The key block and KV head of a cluster.
template <class Traits>
__device__ __forceinline__ TileCoord tile_of(const BackwardParams& params, unsigned index) {
  return backward_tile(index, key_blocks<Traits>(params), params.shape.heads_k, params.shape.batch,
                       params.tail_heads, params.heads_together, params.heads_in_reverse);
}

// What a thread block works on: its keys of key block `coord.block` of KV head `coord.head`, for
// `steps` pairs of (query head of the group, query block), those of its cluster.
template <class Traits>
struct BackwardWork {
  TileCoord coord;
  int group;  // query heads of the KV head
  BlockRange blocks;
  int steps, key_begin;
  int start, direction;  // of the walk over the query blocks of a head, see QueryStep

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, unsigned index)
      : coord(tile_of<Traits>(params, index)),
        group(params.shape.heads_q / params.shape.heads_k),
        key_begin(coord.block * Traits::kClusterKeys +
                  cluster_rank<Traits::kCluster>() * Traits::kTileN) {
    blocks =
        VisibleKeys(params.shape, params.window)
            .query_blocks(coord.block * Traits::kClusterKeys, Traits::kTileM, Traits::kClusterKeys);
    steps = group * max(blocks.end - blocks.begin, 0);
    start = blocks.end - 1;
    direction = -1;
    if (params.dq_turn != nullptr) {
      const TurnOrder order(params, Traits::kTileM, Traits::kClusterKeys, kv_head(params));
      start = order.start(coord.block, blocks);
      direction = order.downwards ? -1 : 1;
    }
  }
  // After the last one of a thread block that takes one after the other.
  __device__ __forceinline__ bool is_end() const { return steps < 0; }
  // Of all KV heads of the batch.
  __device__ __forceinline__ int kv_head(const BackwardParams& params) const {
    return coord.batch * params.shape.heads_k + coord.head;
  }
};

// A step of the walk: all query blocks of the group's first head, then those of the next head.
// Usually last block first, so that the key blocks of a head read the same Q and dO at a time; in
// deterministic mode as core/turn_order.h says.
struct QueryStep {
  int head, block;

  template <class Traits>
  __device__ __forceinline__ static QueryStep first(const BackwardWork<Traits>& work) {
    return {work.coord.head * work.group, work.start};
  }
  template <class Traits>
  __device__ __forceinline__ QueryStep next(const BackwardWork<Traits>& work) const {
    int after = block + work.direction;
    if (after == work.blocks.end) after = work.blocks.begin;
    if (after < work.blocks.begin) after = work.blocks.end - 1;
    return {head + (after == work.start ? 1 : 0), after};
  }
};

// The place of a step's query tile in the workspace's (batch, heads_q, seqlen_q_rounded / kTileM)
// arrays. The plan lets no more than 2^31 - 1 tiles through.
template <class Traits>
__device__ __forceinline__ int tile_index(const BackwardParams& params,
                                          const BackwardWork<Traits>& work, const QueryStep& at) {
  const int row_blocks = ceil_div(params.shape.seqlen_q, Traits::kTileM);
  return (work.coord.batch * params.shape.heads_q + at.head) * row_blocks + at.block;
}

// Calls take(work, number) for all work of the thread block; take calls release_work.
template <class Traits, class Take>
__device__ __forceinline__ void for_each_work(typename Traits::SharedStorage& smem,
                                              const Take& take) {
  if constexpr (!Traits::kPersistent) {
    take(smem.work[0], 0);
  } else {
    CUTE_NO_UNROLL
    for (int number = 0;; ++number) {
      const Ring<Traits::kWorks> ring{uint32_t(number)};
      smem.barriers.work_full[ring.stage()].wait(ring.parity());
      const BackwardWork<Traits>& work = smem.work[ring.stage()];
      if (work.is_end()) return;
      take(work, number);
    }
  }
}
// Hands out tile `index` as work `number`, or, where there is no such tile, the end, and returns
// whether it was that. By one thread.
template <class Traits>
__device__ __forceinline__ bool hand_out_work(const BackwardParams& params,
                                              typename Traits::SharedStorage& smem, int number,
                                              unsigned index) {
  const Ring<Traits::kWorks> ring{uint32_t(number)};
  BackwardWork<Traits>& work = smem.work[ring.stage()];
  smem.barriers.work_empty[ring.stage()].wait(ring.parity() ^ 1);
  const bool end = index >= key_tiles<Traits>(params);
  if (end) {
    work.steps = -1;
  } else {
    work = BackwardWork<Traits>(params, index);
  }
  smem.barriers.work_full[ring.stage()].arrive();
  return end;
}
template <class Traits>
__device__ __forceinline__ void release_work(typename Traits::SharedStorage& smem, int number) {
  if constexpr (Traits::kPersistent) smem.barriers.work_empty[number % Traits::kWorks].arrive();
}

// Until the consumers have added all of work `number` and read its K, V and dS.
template <class Traits>
__device__ __forceinline__ void wait_for_end(typename Traits::SharedStorage& smem, int number) {
  const Ring<Traits::kWorks> ring{uint32_t(number)};
  smem.barriers.done[ring.stage()].wait(ring.parity());
}

}  // namespace flash_attn2::sm90
