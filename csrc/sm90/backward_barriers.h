// Every barrier of the sm90 backward: who arrives, who waits, how often. All are mbarriers but one;
// a consumer warp arrives with one lane.
//
//   barrier          arrivals a phase       completes when                       who waits
//   k_full, v_full   1 (producer) + bytes   K, V are there                       consumers
//   q_full[s]        1 (producer) + bytes   stage s holds Q and LSE              consumers
//   dout_full[s]     1 (producer) + bytes   stage s holds dO and delta           consumers
//   q_empty[s]       8 (consumer warps)     Q and LSE of the step are used       producer
//   dout_empty[s]    8 (consumer warps)     dO and delta of the step are used    producer
//   ds_full[b]       4 * kDsWriters         buffer b holds a step's dS           consumers
//   p_full           4 (P's consumer)       the buffer holds a step's P          dS's consumer
//   p_empty          4 (dS's consumer)      P has been read                      P's consumer
//   turn_come        1 (turn keeper)        the step's dQ may be added           consumers
//   turn_used        8 (consumer warps)     the step's dQ is added               turn keeper
//
// p_full and p_empty are for ConsumerSplit::kRoles, the last two for deterministic mode. A buffer
// of dS needs no barrier for its release, see kScoreBuffers. Named barriers: 1 and 2, of one
// consumer each; 3, of both.
#pragma once

#include "barriers.h"

namespace flash_attn2::sm90 {

inline constexpr int kConsumers = 2;

// kDsWriters: consumers that write to a step's dS.
template <int kStages, int kScoreBuffers, int kDsWriters>
struct BackwardBarriers {
  LoadBarrier k_full, v_full, q_full[kStages], dout_full[kStages];
  Barrier q_empty[kStages], dout_empty[kStages], ds_full[kScoreBuffers];
  Barrier p_full, p_empty;
  Barrier turn_come, turn_used;

  // By one thread, before any use; __syncthreads afterwards.
  __device__ void init() {
    constexpr int kConsumerWarps = kConsumers * kWarpsPerGroup;
    k_full.init(1);
    v_full.init(1);
    for (int i = 0; i < kStages; ++i) {
      q_full[i].init(1);
      dout_full[i].init(1);
      q_empty[i].init(kConsumerWarps);
      dout_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < kScoreBuffers; ++i) ds_full[i].init(kDsWriters * kWarpsPerGroup);
    p_full.init(kWarpsPerGroup);
    p_empty.init(kWarpsPerGroup);
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
