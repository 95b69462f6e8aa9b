// Types and shared memory of one sm90 forward kernel.
#pragma once

#include <limits>

#include "../core/params.h"
#include "barriers.h"
#include "gemm.cuh"
#include "schedule.cuh"

namespace flash_attn2::sm90 {

inline constexpr int kMaxSmemBytes = 227 * 1024;
inline constexpr int kAnyKeys = std::numeric_limits<int>::max();

// Swizzled shared-memory atoms of 16-bit tiles whose rows hold kColumns contiguous elements:
// RowMajor for an operand whose contiguous dimension is the product's K, ColumnMajor (the same
// bytes, seen transposed) for V, whose contiguous dimension is the product's N.
template <class Element, int kColumns>
struct SmemAtom {
  static constexpr bool kWide = kBoxColumns<kColumns> == 64;
  using RowMajor = std::conditional_t<kWide, GMMA::Layout_K_SW128_Atom<Element>,
                                      GMMA::Layout_K_SW64_Atom<Element>>;
  using ColumnMajor = std::conditional_t<kWide, GMMA::Layout_MN_SW128_Atom<Element>,
                                         GMMA::Layout_MN_SW64_Atom<Element>>;
};

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kHeadDimV_ = kHeadDim_,
          int kCluster_ = 1, int kMaxKeys_ = kAnyKeys, int kTeams_ = 1,
          int kMaxUnmaskedKeys_ = kMaxKeys_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and the output
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kMaxKeys = kMaxKeys_;  // the plan takes other tiles for more
  static constexpr int kMaxUnmaskedKeys = kMaxUnmaskedKeys_;
  // Thread blocks that share a tile of kClusterRows and load a part of each block of K and V for
  // all of them.
  static constexpr int kCluster = kCluster_;
  static constexpr int kClusterRows = kTileM * kCluster;
  static constexpr int kPartRows = kTileN / kCluster;
  static_assert(kPartRows % 8 == 0);  // whole swizzle atoms

  static constexpr int kGroupRows = 64;  // of S and the output, one wgmma's M
  static constexpr int kWarpRows = kGroupRows / kWarpsPerGroup;
  static constexpr int kGroups = kTileM / kGroupRows;
  // Teams of kGroups, each with tiles, shared memory and a loading warp of its own: while the tile
  // of one begins or ends, the other computes.
  static constexpr int kTeams = kTeams_;
  static constexpr int kConsumers = kTeams * kGroups;
  static constexpr int kThreads = kWarpGroupThreads * (kConsumers + 1);
  // setmaxnreg: 64K registers shared out between the producer and the consumers.
  static constexpr int kProducerRegs = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegs = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;
  static_assert(2 <= kConsumers && kConsumers <= 4 && kTeams <= kWarpsPerGroup);
  static_assert(kTileN % 16 == 0);
  // The order inside a step, found by trying. Where the output has many columns, two warpgroups
  // rescale it only after a vote, and compute the exponentials of a thread's first row before,
  // under the maximum of the second. Elsewhere the branches of the vote cost more than the
  // products, and all exponentials come after it.
  static constexpr bool kTwoConsumers = kConsumers == 2;
  static constexpr bool kVote = kTwoConsumers && kHeadDimV > 192;
  // Whether maxima are taken as integers where that will do, see RowSoftmax: not where exponentials
  // come before the last of them.
  static constexpr bool kMaxOfBits = !kVote;
  // Whether the next blocks are asked for before the last exponentials of a step, or already before
  // the output is rescaled.
  static constexpr bool kAskLate = kTwoConsumers && !kVote;

  // S (64, kTileN) = Q K^T, both from shared memory; O (64, kHeadDimV) += P V, P from registers.
  using MmaS = SmemMma<Element, kGroupRows, kTileN, Major::K, Major::K>;
  using MmaO = RegisterMma<Element, kGroupRows, kHeadDimV, Major::MN>;

  static constexpr int kQElements = kGroupRows * kHeadDim;  // of one group
  static constexpr int kKElements = kTileN * kHeadDim;      // of one stage
  static constexpr int kVElements = kTileN * kHeadDimV;

  // Blocks of K, and of V, in flight: three where there is room.
  static constexpr bool fits(int stages, int out_columns) {
    return (kGroups * (kQElements + kGroupRows * out_columns) +
            stages * (kKElements + kVElements)) *
                   int(sizeof(Element)) +
               int(sizeof(ForwardBarriers<kGroups, 3, kCluster>)) <=
           kMaxSmemBytes / kTeams;
  }
  static constexpr int kStages = fits(3, kHeadDimV) ? 3 : 2;
  // Where there is room, the output leaves from a buffer of its own, if need be in two halves of
  // the columns; elsewhere from a stage of V. So the next tile's Q arrives during the last products
  // and the epilogue.
  static constexpr int kOutParts =
      fits(kStages, kHeadDimV) || !fits(kStages, kHeadDimV / 2) ? 1 : 2;
  static constexpr int kOutColumns = kHeadDimV / kOutParts;  // of a part
  static constexpr bool kOwnOutBuffer = fits(kStages, kOutColumns);
  static constexpr int kOutElements = kGroupRows * kOutColumns;
  // Each of two groups then has one of two stages, see ForwardConsumer::out_use and leave_out.
  static_assert(kOwnOutBuffer || (kOutElements <= kVElements && kStages == 2 && kGroups == 2));
  static_assert(kBoxColumns<kOutColumns> == kBoxColumns<kHeadDimV>);  // one tensor map
  // Whether a group leaves Q with its last scores, so that the next Q is there before the epilogue
  // ends, or only after their softmax. Found by trying: beside two other groups it does not pay.
  static constexpr bool kLeaveQEarly = kGroups == 2;
  // Whether a tile begins under the output of the one before. Found by trying: not beside two other
  // groups, nor where the output leaves registers for few columns of S.
  static constexpr bool kChain = kTwoConsumers && kOwnOutBuffer && !kVote;

  using MmaOutPart =  // a product with the accumulators of a part
      RegisterMma<Element, kGroupRows, kOutColumns, Major::MN>;

  // Shared-memory tiles: slabs of one swizzle span of columns, see tma.cuh.
  using LayoutQ = decltype(tile_to_shape(typename SmemAtom<Element, kHeadDim>::RowMajor{},
                                         cute::Shape<Int<kGroupRows>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(typename SmemAtom<Element, kHeadDim>::RowMajor{},
                                         cute::Shape<Int<kTileN>, Int<kHeadDim>, Int<kStages>>{}));
  using LayoutV =  // (kHeadDimV, kTileN, stages)
      decltype(tile_to_shape(typename SmemAtom<Element, kHeadDimV>::ColumnMajor{},
                             cute::Shape<Int<kHeadDimV>, Int<kTileN>, Int<kStages>>{},
                             Step<_2, _1, _3>{}));
  using LayoutOut = decltype(tile_to_shape(typename SmemAtom<Element, kHeadDimV>::RowMajor{},
                                           cute::Shape<Int<kGroupRows>, Int<kOutColumns>>{}));

  using Barriers = ForwardBarriers<kGroups, kStages, kCluster>;
  // Two blocks a tile: so each stage of V holds a block between two outputs, and whoever has read
  // it knows that the first output has left.
  using Schedule =
      ForwardSchedule<kClusterRows, kTileN, kWarpRows, kTeams, kOwnOutBuffer ? 1 : 2, kCluster>;
  // Groups take turns with their products; the other team fills the gaps as well.
  using GroupTurns = Turns<kTeams == 1 ? kGroups : 1>;

  // Where the rows of a group begin in the tile. In a cluster they are dealt out there and back,
  // so that each thread block sees as many keys under a causal mask.
  __device__ __forceinline__ static int group_row(int group) {
    if constexpr (kCluster == 1) {
      return group * kGroupRows;
    } else {
      const int rank = blockIdx.x % kCluster;
      return (group * kCluster + (group % 2 == 0 ? rank : kCluster - 1 - rank)) * kGroupRows;
    }
  }

  struct TeamStorage {
    alignas(1024) Element q[kGroups][kQElements];
    alignas(1024) Element k[kStages][kKElements];
    alignas(1024) Element v[kStages][kVElements];
    alignas(1024) Element out[kOwnOutBuffer ? kGroups : 1][kOwnOutBuffer ? kOutElements : 1];
    Barriers barriers;

    __device__ __forceinline__ Element* out_tile(int group, int stage) {
      if constexpr (kOwnOutBuffer) {
        return out[group];
      } else {
        return v[stage];
      }
    }
  };
  static constexpr int kSmemBytes = kTeams * int(sizeof(TeamStorage));
  static_assert(kSmemBytes <= kMaxSmemBytes);
};

// The kernel's argument.
struct ForwardArguments {
  ForwardParams params;
  ScheduleDivisors divisors;
  CUtensorMap q, k, v, out;  // boxes of 64 rows, kPartRows rows, kPartRows rows, 16 rows
};

}  // namespace flash_attn2::sm90
