// Every barrier of the sm90 backward: who arrives, who waits, how often. All are mbarriers but one;
// a consumer warp arrives with one lane.
//
//   barrier          arrivals a phase       completes when                       who waits
//   k_full, v_full   1 (producer) + bytes   K, V are there                       consumers
//   q_full[s]        1 (producer) + bytes   stage s holds Q and LSE              consumers
//   dout_full[s]     1 (producer) + bytes   stage s holds dO and delta           consumers
//   stage_empty[s]   8 (consumer warps)     dV and dK of the step are made       producer
//   scores_full[b]   8 (consumer warps)     buffer b holds a step's dS (and P)   consumers
//   turn_come        1 (turn keeper)        the step's dQ may be added           consumers
//   turn_used        8 (consumer warps)     the step's dQ is added               turn keeper
//
// The last two are for deterministic mode. A score buffer needs no barrier for its release, see
// kScoreBuffers. Named barriers: 1 and 2, of one consumer each; 3, of both.
#pragma once

#include "barriers.h"

namespace flash_attn2::sm90 {

inline constexpr int kConsumers = 2;

template <int kStages, int kScoreBuffers>
struct BackwardBarriers {
  LoadBarrier k_full, v_full, q_full[kStages], dout_full[kStages];
  Barrier stage_empty[kStages], scores_full[kScoreBuffers];
  Barrier turn_come, turn_used;

  // By one thread, before any use; __syncthreads afterwards.
  __device__ void init() {
    constexpr int kConsumerWarps = kConsumers * kWarpsPerGroup;
    k_full.init(1);
    v_full.init(1);
    for (int i = 0; i < kStages; ++i) {
      q_full[i].init(1);
      dout_full[i].init(1);
      stage_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < kScoreBuffers; ++i) scores_full[i].init(kConsumerWarps);
    turn_come.init(1);
    turn_used.init(kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
};

// The whole warp's reads and writes so far come before the arrival.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

__device__ __forceinline__ void sync_consumer(int consumer) {
  cutlass::arch::NamedBarrier::sync(kWarpGroupThreads, 1 + consumer);
}
__device__ __forceinline__ void sync_consumers() {
  cutlass::arch::NamedBarrier::sync(kConsumers * kWarpGroupThreads, 3);
}

}  // namespace flash_attn2::sm90
