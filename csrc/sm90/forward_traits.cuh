// Types and shared memory of one sm90 forward kernel.
#pragma once

#include "../core/params.h"
#include "barriers.h"
#include "gemm.cuh"
#include "schedule.cuh"

namespace flash_attn2::sm90 {

inline constexpr int kMaxSmemBytes = 227 * 1024;

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kHeadDimV_ = kHeadDim_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of Q and K
  static constexpr int kHeadDimV = kHeadDimV_;  // of V and the output
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kStages = 2;  // blocks of K, and of V, in flight

  static constexpr int kGroupRows = 64;  // of S and the output, one wgmma's M
  static constexpr int kWarpRows = kGroupRows / kWarpsPerGroup;
  static constexpr int kGroups = kTileM / kGroupRows;
  static constexpr int kThreads = kWarpGroupThreads * (kGroups + 1);
  // setmaxnreg: 64K registers shared out between the producer and the consumers.
  static constexpr int kProducerRegs = kGroups == 2 ? 24 : 32;
  static constexpr int kConsumerRegs = kGroups == 2 ? 240 : 160;
  static_assert(kGroups == 2 || kGroups == 3);
  static_assert(kTileN % 16 == 0);

  // S (64, kTileN) = Q K^T, both from shared memory; O (64, kHeadDimV) += P V, P from registers.
  using MmaS = SmemMma<Element, kGroupRows, kTileN, Major::K, Major::K>;
  using MmaO = RegisterMma<Element, kGroupRows, kHeadDimV, Major::MN>;

  static constexpr int kQElements = kGroupRows * kHeadDim;  // of one group
  static constexpr int kKElements = kTileN * kHeadDim;      // of one stage
  static constexpr int kVElements = kTileN * kHeadDimV;

  // What the shared memory that K and V leave goes to, in this order: an output buffer, of all
  // columns or of half of them, so that a tile can end while the next one begins; a second Q.
  // Where not even the first fits, the output takes Q's place.
  static constexpr bool fits(int q_stages, int out_columns) {
    const int elements = kGroups * (q_stages * kQElements + kGroupRows * out_columns) +
                         kStages * (kKElements + kVElements);
    return elements * int(sizeof(Element)) + int(sizeof(ForwardBarriers<kGroups, 2, kStages>)) <=
           kMaxSmemBytes;
  }
  static constexpr bool kOwnOutBuffer = fits(1, kHeadDimV / 2);
  static constexpr int kOutParts = !kOwnOutBuffer || fits(1, kHeadDimV) ? 1 : 2;
  static constexpr int kOutColumns = kHeadDimV / kOutParts;  // of a part
  static constexpr int kQStages = kOwnOutBuffer && fits(2, kOutColumns) ? 2 : 1;
  static constexpr int kOutElements = kGroupRows * kOutColumns;
  static_assert(kOwnOutBuffer || kOutElements <= kQElements);

  using Barriers = ForwardBarriers<kGroups, kQStages, kStages>;
  using Schedule = ForwardSchedule<kTileM, kTileN>;

  struct SharedStorage {
    alignas(1024) Element q[kQStages][kGroups][kQElements];
    alignas(1024) Element k[kStages][kKElements];
    alignas(1024) Element v[kStages][kVElements];
    alignas(1024) Element out[kOwnOutBuffer ? kGroups : 1][kOwnOutBuffer ? kOutElements : 1];
    Barriers barriers;

    __device__ __forceinline__ Element* out_tile(int group) {
      if constexpr (kOwnOutBuffer) {
        return out[group];
      } else {
        return q[0][group];
      }
    }
  };
  static constexpr int kSmemBytes = int(sizeof(SharedStorage));
  static_assert(kSmemBytes <= kMaxSmemBytes);
};

// The kernel's argument.
struct ForwardArguments {
  ForwardParams params;
  CUtensorMap q, k, v, out;  // boxes of 64 rows, kTileN rows, kTileN rows, 16 rows
};

}  // namespace flash_attn2::sm90
