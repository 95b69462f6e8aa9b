// Step B1 of later heads, before the steps of those at hand.
//
// The pre-process makes D, L and the zeros of dQ's accumulator for the first `delta_lead` KV heads
// only. Thread blocks of KV head n make those of head n + delta_lead, in the time in which their
// first loads are on their way, and count themselves in delta_ready. Those of head n + delta_lead
// wait for the count before they load L and D. They are begun later, so nobody waits in a circle.
#pragma once

#include "../core/delta.cuh"
#include "backward_work.cuh"
#include "counters.cuh"

namespace flash_attn2::sm90 {

// The KV head of which the thread block makes a share.
template <class Traits>
__device__ __forceinline__ int head_ahead(const BackwardParams& params,
                                          const BackwardWork<Traits>& work) {
  return work.kv_head(params) + params.delta_lead;
}
template <class Traits>
__device__ __forceinline__ bool has_head_ahead(const BackwardParams& params,
                                               const BackwardWork<Traits>& work) {
  return head_ahead(params, work) < params.shape.batch * params.shape.heads_k;
}
// Thread blocks that share a head.
template <class Traits>
__device__ __forceinline__ int delta_shares(const BackwardParams& params) {
  return key_blocks<Traits>(params) * Traits::kCluster;
}

// A consumer's part of the share: whole query tiles, from the last key block of the head on, which
// has the fewest steps under a causal mask. What it costs is for the most part the time until the
// loads are there, so it is better that some thread blocks make much than that all make a little.
template <class Traits>
struct DeltaMaker {
  using Element = typename Traits::Element;
  static constexpr int kTileM = Traits::kTileM;
  // Threads that share a row, rows of a warpgroup at a time, and how many of these without a wait.
  static constexpr int kLanes = Traits::kHeadDimV > 128 ? 32 : Traits::kHeadDimV > 64 ? 16 : 8;
  static constexpr int kRows = kWarpGroupThreads / kLanes, kLoads = 8;
  static_assert(kTileM % (kLoads * kRows) == 0);

  const BackwardParams& params;
  const int thread;  // of the warpgroup

  __device__ __forceinline__ void run(const BackwardWork<Traits>& work, int consumer) const {
    if (!has_head_ahead(params, work)) return;
    const int kv_head = head_ahead(params, work);
    const int members = delta_shares<Traits>(params) * kConsumers;
    const int block = work.coord.block * Traits::kCluster + cluster_rank<Traits::kCluster>();
    CUTE_NO_UNROLL
    for (int tile = members - 1 - (block * kConsumers + consumer);
         tile < query_tiles<Traits>(params); tile += members) {
      const int place = kv_head * query_tiles<Traits>(params) + tile;
      make_rows(place);
      if (kv_head < params.dq_slots) zero_sums(place);
    }
  }
  // `tile`: its place in the workspace's arrays, see tile_index.
  __device__ __forceinline__ void make_rows(int tile) const {
    const int row_blocks = ceil_div(params.shape.seqlen_q, kTileM), head = tile / row_blocks;
    const int lane = thread % kLanes, first = thread / kLanes;
    const int row_begin = (tile - head * row_blocks) * kTileM + first;
    const DeltaSource<Element> source(params, head, row_begin, lane * kDeltaChunk);
    CUTE_NO_UNROLL
    for (int begin = 0; begin < kTileM; begin += kLoads * kRows) {
      DeltaRow rows[kLoads];
      CUTE_UNROLL
      for (int i = 0; i < kLoads; ++i) rows[i] = source.load(params, begin + i * kRows);
      float dots[kLoads];
      CUTE_UNROLL
      for (int i = 0; i < kLoads; ++i) dots[i] = sum_lanes(rows[i].template dot<Element>(), kLanes);
      CUTE_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int64_t place = int64_t(tile) * kTileM + begin + i * kRows + first;
        if (lane == 0) rows[i].store(params, place, dots[i]);
      }
    }
  }
  // dQ's: all tiles of such a head have a place of their own.
  __device__ __forceinline__ void zero_sums(int tile) const {
    float4* const sums =
        reinterpret_cast<float4*>(params.dq_accum + int64_t(tile) * Traits::kDqElements) + thread;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kDqElements / 4; i += kWarpGroupThreads) {
      sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
};

// By one thread, when all consumers have made their parts.
template <class Traits>
__device__ __forceinline__ void count_delta_ahead(const BackwardParams& params,
                                                  typename Traits::SharedStorage& smem,
                                                  const BackwardWork<Traits>& work) {
  static_assert(!Traits::kPersistent);  // else consumers may be two phases ahead of who counts
  smem.barriers.delta_made.wait(0);
  if (!has_head_ahead(params, work)) return;
  fence_bulk_copies();  // which load L and D
  __threadfence();
  atomicAdd(params.delta_ready + head_ahead(params, work), 1);
}

// By one thread, before L and D are loaded and anything is added to dQ.
template <class Traits>
__device__ __forceinline__ void wait_for_delta(const BackwardParams& params,
                                               const BackwardWork<Traits>& work) {
  const int kv_head = work.kv_head(params);
  if (kv_head < params.delta_lead) return;
  wait_for_count(params.delta_ready + kv_head, delta_shares<Traits>(params));
}

}  // namespace flash_attn2::sm90
