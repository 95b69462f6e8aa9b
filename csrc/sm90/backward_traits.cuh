// Types, shared memory and work of one sm90 backward kernel.
#pragma once

#include "../core/mask.cuh"
#include "../core/schedule.cuh"
#include "../core/softmax.cuh"
#include "../core/turn_order.h"
#include "backward_barriers.h"
#include "gemm.cuh"

namespace flash_attn2::sm90 {

// How the two consumers share the work of a thread block.
enum class ConsumerSplit {
  kKeys,   // 64 keys each, see backward_keys.cuh
  kRoles,  // the same 64 keys, one makes P and dV, the other dS and dK, see backward_roles.cuh
};

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, ConsumerSplit kSplit_,
          int kHeadDimV_ = kHeadDim_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of Q, K and their gradients
  static constexpr int kHeadDimV = kHeadDimV_;  // of V, O and their gradients
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr bool kSplitKeys = kSplit_ == ConsumerSplit::kKeys;
  static constexpr int kStages = 2;  // of Q and dO
  static constexpr int kThreads = (kConsumers + 1) * kWarpGroupThreads;
  // setmaxnreg: 128 * (24 + 2 * 240) of 64K registers.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static constexpr int kKeys = 64;  // of one consumer's S^T and dP^T
  static_assert(kTileN == (kSplitKeys ? kConsumers * kKeys : kKeys));

  // dQ: half of the rows or of the columns for each consumer; in parts where the accumulators of
  // the half would not fit beside those of dK or dV.
  static constexpr bool kSplitDqRows = kTileM == 128;
  static constexpr int kDqParts = kHeadDim > 192 ? 2 : 1;
  static constexpr int kDqRows = kSplitDqRows ? kTileM / kConsumers : kTileM;
  static constexpr int kDqColumns = kSplitDqRows ? kHeadDim : kHeadDim / kConsumers / kDqParts;
  static constexpr int kDqElements = kTileM * kHeadDim;
  static_assert(kDqRows == 64);

  // Buffers of dS. A consumer writes that of step n when it knows that the other one has stored
  // dS of step n - 1 (kKeys) or P of step n (kRoles). The other one has then finished dQ of step
  // n - 3, which ran one step late, or of step n - 2.
  static constexpr int kScoreBuffers = kSplitKeys ? 3 : 2;
  static constexpr int kDsArrivals = kSplitKeys ? kConsumers * kWarpsPerGroup : kWarpGroupThreads;

  static constexpr int kBoxK = kBoxColumns<kDqColumns>;  // of K and dK: dQ takes whole slabs

  using MmaS = SmemMma<Element, kKeys, kTileM, Major::K, Major::K>;  // S^T, dP^T
  using MmaDk = RegisterMma<Element, kKeys, kHeadDim, Major::MN>;
  using MmaDv = RegisterMma<Element, kKeys, kHeadDimV, Major::MN>;
  using MmaDq = SmemMma<Element, kDqRows, kDqColumns, Major::K, Major::MN>;

  struct SharedStorage {
    alignas(1024) Element k[kTileN * kHeadDim];   // dK on its way out
    alignas(1024) Element v[kTileN * kHeadDimV];  // dV on its way out
    alignas(1024) Element q[kStages][kTileM * kHeadDim];
    alignas(1024) Element dout[kStages][kTileM * kHeadDimV];
    alignas(1024) Element ds[kScoreBuffers][kTileM * kTileN];
    alignas(128) float p[kSplitKeys ? 1 : kTileM * kTileN];
    alignas(128) float lse[kStages][kTileM];
    alignas(128) float delta[kStages][kTileM];
    BackwardBarriers<kStages, kScoreBuffers, kDsArrivals> barriers;
    int index;  // the thread block's place in the grid
  };
  static constexpr int kSmemBytes = int(sizeof(SharedStorage));
  static_assert(kSmemBytes <= 227 * 1024);
};

struct BackwardArguments {
  CUtensorMap q, k, v, dout, dk, dv;  // boxes of kTileM, kTileN, kTileN, kTileM, kKeys, kKeys rows
  CUtensorMap lse, delta;             // rows of kTileM numbers
  BackwardParams params;
};

// What a thread block works on: key block `coord.block` of KV head `coord.head`, for `steps` pairs
// of (query head of the group, query block).
template <class Traits>
struct BackwardWork {
  TileCoord coord;
  int group;  // query heads of the KV head
  BlockRange blocks;
  int steps, key_begin;
  int start, direction;  // of the walk over the query blocks of a head, see QueryStep

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, unsigned index)
      : coord(backward_tile(index, ceil_div(params.shape.seqlen_k, Traits::kTileN),
                            params.shape.heads_k)),
        group(params.shape.heads_q / params.shape.heads_k),
        key_begin(coord.block * Traits::kTileN) {
    blocks = VisibleKeys(params.shape, params.window)
                 .query_blocks(key_begin, Traits::kTileM, Traits::kTileN);
    steps = group * max(blocks.end - blocks.begin, 0);
    start = blocks.end - 1;
    direction = -1;
    if (params.dq_turn != nullptr) {
      const TurnOrder order(params, Traits::kTileM, Traits::kTileN, kv_head(params));
      start = order.start(coord.block, blocks);
      direction = order.downwards ? -1 : 1;
    }
  }
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

// The step's tile in the workspace's (batch, heads_q, seqlen_q_rounded / kTileM) arrays.
template <class Traits>
__device__ __forceinline__ int64_t query_tile(const BackwardParams& params, int batch,
                                              const QueryStep& at) {
  return (int64_t(batch) * params.shape.heads_q + at.head) *
             ceil_div(params.shape.seqlen_q, Traits::kTileM) +
         at.block;
}

}  // namespace flash_attn2::sm90
