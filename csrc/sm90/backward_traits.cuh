// Types and shared memory of one sm90 backward kernel.
#pragma once

#include <limits>

#include "../core/softmax.cuh"
#include "../core/window.h"
#include "backward_barriers.h"
#include "gemm.cuh"

namespace flash_attn2::sm90 {

// How the two consumers share the work of a thread block.
enum class ConsumerSplit {
  kKeys,        // 64 keys each, see backward_keys.cuh
  kColumns,     // half of the keys of P and dS, half of the columns of dK and dV, see
                // backward_columns.cuh
  kWholeHeads,  // 64 keys each, of a thread block that takes a whole head, see backward_head.cuh
};

template <class Traits>
struct BackwardWork;

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, ConsumerSplit kSplit_,
          int kHeadDimV_ = kHeadDim_, int kCluster_ = 1,
          int kMaxKeys_ = std::numeric_limits<int>::max()>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of Q, K and their gradients
  static constexpr int kHeadDimV = kHeadDimV_;  // of V, O and their gradients
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kMaxKeys = kMaxKeys_;  // the plan takes other tiles for more
  static constexpr ConsumerSplit kSplit = kSplit_;
  static constexpr bool kSplitColumns = kSplit == ConsumerSplit::kColumns;
  static constexpr bool kWholeHeads = kSplit == ConsumerSplit::kWholeHeads;
  static constexpr int kHeadTiles = kWholeHeads ? 8 : 0;  // query tiles of a head at most
  // Thread blocks whose keys are neighbours. They load Q and dO for each other, and add to dQ as
  // one: each sums a part of its columns over the keys of all. See backward_columns.cuh.
  static constexpr int kCluster = kCluster_;
  static_assert(kCluster == (kSplitColumns ? 2 : 1));
  static constexpr int kClusterKeys = kCluster * kTileN;
  static constexpr int kStages = kWholeHeads ? 3 : 2;  // of Q
  // Thread blocks stay, and take one tile after the other: while they end one, Q and dO of the next
  // one come in. Else a cluster for each tile. 128 queries a step leave no register for a second
  // loop.
  static constexpr bool kPersistent = !kSplitColumns && kTileM == 64;
  // Thread blocks make D of later heads, see delta_ahead.cuh. One that stays has no time for it:
  // its first loads are there when it begins a tile.
  static constexpr bool kDeltaAhead = !kPersistent;
  static constexpr int kWorks = kPersistent ? 2 : 1;  // the one at hand, and the next one
  // dO of a step is read in the first half of the step, Q by the step before and to the end.
  static constexpr int kDoutStages = kSplitColumns ? 1 : kStages;
  static constexpr int kThreads = (kConsumers + 1 + kWholeHeads) * kWarpGroupThreads;
  // setmaxnreg: 128 * (24 + 2 * 240) of 64K registers, or 128 * (24 + 72 + 2 * 208).
  static constexpr int kProducerRegisters = 24;
  static constexpr int kDqRegisters = 72;
  static constexpr int kConsumerRegisters = kWholeHeads ? 208 : 240;

  // Keys of one consumer's S and dP, and of a store of dK and dV.
  static constexpr int kKeys = kTileN / kConsumers;
  static constexpr int kGradientKeys = kSplitColumns ? kTileN : kKeys;

  // dQ: a part of the rows or of the columns for each consumer of the cluster. (kWholeHeads: one
  // warpgroup makes it all.)
  static constexpr bool kSplitDqRows = kTileM == 128;
  static constexpr int kDqParts = kWholeHeads ? 1 : kCluster * kConsumers;
  static constexpr int kDqRows = kSplitDqRows ? kTileM / kDqParts : kTileM;
  static constexpr int kDqColumns = kSplitDqRows ? kHeadDim : kHeadDim / kDqParts;
  static constexpr int kDqElements = kTileM * kHeadDim;
  static constexpr int kDqPartElements = kDqRows * kDqColumns;
  // dQ is converted by the way, through shared memory, where that has room. See dq_accumulator.cuh.
  static constexpr bool kDqRing = kSplit == ConsumerSplit::kKeys;
  static_assert(kDqRows == 64);

  // Buffers of dS (kColumns: and of P). kKeys: a consumer writes that of step n when it knows that
  // the other one has stored dS of step n - 1, and has then finished dQ of step n - 3, which ran
  // one step late. kColumns: when dO of step n is there, all have finished dV of step n - 1; for dS
  // there is a barrier, as in kWholeHeads.
  static constexpr int kScoreBuffers = kSplitColumns ? 1 : kWholeHeads ? 2 : 3;

  static constexpr int kScoreElements = kTileM * kTileN;
  // Without kColumns dK and dV on their way out take the place of dS.
  static constexpr int kScoreSpace =
      !kSplitColumns ? cute::max(kScoreBuffers * kScoreElements, kTileN*(kHeadDim + kHeadDimV))
                     : kScoreBuffers * kScoreElements;

  static constexpr int kBoxK = kBoxColumns<kDqColumns>;  // of K and dK: dQ takes whole slabs

  // dS lies as (queries, keys) rows, of kColumns as (keys, queries).
  using MmaDq =
      SmemMma<Element, kDqRows, kDqColumns, kSplitColumns ? Major::MN : Major::K, Major::MN>;

  // A part of dQ that is being converted.
  struct Converted {
    alignas(1024) Element dq[kDqPartElements];
    alignas(128) float sums[kDqPartElements];
  };
  // kColumns: P, and from the other thread block of the cluster the columns of K whose dQ this one
  // sums, and dS.
  struct Columns {
    alignas(1024) Element p[kTileM * kTileN];
    alignas(1024) Element peer_k[kTileN * kHeadDim / 2];
    alignas(1024) Element peer_ds[kTileM * kTileN];
  };
  struct Nothing {};
  // kWholeHeads: dQ of a head, see backward_head_dq.cuh. V comes by way of dO's stages.
  struct HeadDq {
    alignas(1024) float dq_sums[kHeadTiles][kDqElements];
  };
  struct TileV {
    alignas(1024) Element v[kTileN * kHeadDimV];  // kColumns: dV on its way out
  };

  struct SharedStorage : std::conditional_t<kWholeHeads, HeadDq, TileV> {
    alignas(1024) Element k[kTileN * kHeadDim];  // kColumns: dK on its way out
    alignas(1024) Element q[kStages][kTileM * kHeadDim];
    alignas(1024) Element dout[kDoutStages][kTileM * kHeadDimV];
    alignas(1024) Element ds[kScoreSpace];
    std::conditional_t<kSplitColumns, Columns, Nothing> columns;
    alignas(128) float lse[kStages][kTileM];
    alignas(128) float delta[kDoutStages][kTileM];
    BackwardBarriers<kStages, kDoutStages, kScoreBuffers, kWorks, kCluster, kWholeHeads> barriers;
    QueryTile tile[kStages];  // that Q's stage holds
    BlockRange whole_rows;    // of the loading thread, which has no registers for them
    BackwardWork<BackwardTraits> work[kWorks];
    std::conditional_t<kDqRing, Converted, Nothing> converted;
  };
  static constexpr int kSmemBytes = int(sizeof(SharedStorage));
  static_assert(kSmemBytes <= 227 * 1024);
};

struct BackwardArguments {
  // Boxes of kTileM / kCluster, kTileN, kTileN (kWholeHeads: kKeys), kTileM / kCluster rows.
  CUtensorMap q, k, v, dout;
  CUtensorMap dk, dv, dq;  // of kGradientKeys, kGradientKeys, kDqRows rows
  CUtensorMap lse, delta;  // rows of kTileM numbers
  BackwardParams params;
};

}  // namespace flash_attn2::sm90
