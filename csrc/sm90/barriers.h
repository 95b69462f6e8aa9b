// Every barrier of the sm90 forward: who arrives, who waits, how often.
//
// mbarriers (shared memory, of each team; the producer is one thread, a consumer warp arrives with
// one lane):
//
//   barrier      arrivals a phase            completes when                    who waits
//   q_full[w]    1 (producer) + bytes        Q's 64 rows of group w are there  group w
//   q_empty[w]   4 (warps of group w)        group w no longer needs them      producer
//   k_full[s]    1 (producer) + bytes        stage s holds a block of K        every group
//   k_empty[s]   4 * kGroups * kCluster      every group has read stage s      producer
//   v_full[s], v_empty[s]                    the same for V
//   out_empty[s] 4 * kCluster                stage s of V no longer holds output    producer
//
// In a cluster a block of K or V is loaded by all producers, a part each, into every thread block.
// So each part counts at every k_full[s], and every group arrives at every k_empty[s].
//
// A waiter of "full" starts with parity 0, a waiter of "empty" with parity 1 (the phase before the
// first: buffers start empty). Output is in each stage of V once a tile, after its last block,
// where it has no buffer of its own; both v_empty[s] and out_empty[s] are then to be waited for, as
// a parity can't tell a phase from the one two before. Each side counts the uses itself, see Ring.
//
// Named barriers (hardware; 0 is __syncthreads):
//
//   turn(w)      256: group w waits (128), the group before it arrives (128). Ping-pong: the group
//                whose turn it is issues its products, then passes the turn on, so that the softmax
//                of one group runs under the products of another. Every group takes one turn per
//                key block of the tile, whether or not its rows see the block. Two teams take none.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace flash_attn2::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using LoadBarrier = cutlass::arch::ClusterTransactionBarrier;

inline constexpr int kWarpGroupThreads = 128;
inline constexpr int kWarpsPerGroup = 4;

// Waits for all threads of the cluster that have not ended.
template <int kCluster>
__device__ __forceinline__ void arrive_at_cluster() {
  if constexpr (kCluster > 1) asm volatile("barrier.cluster.arrive;" ::: "memory");
}
template <int kCluster>
__device__ __forceinline__ void wait_for_cluster() {
  if constexpr (kCluster > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
}
template <int kCluster>
__device__ __forceinline__ void sync_cluster() {
  arrive_at_cluster<kCluster>();
  wait_for_cluster<kCluster>();
}

// kCluster: thread blocks whose consumers read what a thread block loads.
template <int kGroups, int kStages, int kCluster>
struct ForwardBarriers {
  LoadBarrier q_full[kGroups];
  Barrier q_empty[kGroups];
  LoadBarrier k_full[kStages], v_full[kStages];
  Barrier k_empty[kStages], v_empty[kStages], out_empty[kStages];

  // By one thread, before any use; __syncthreads afterwards.
  __device__ void init() {
    for (int group = 0; group < kGroups; ++group) {
      q_full[group].init(1);
      q_empty[group].init(kWarpsPerGroup);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      k_full[stage].init(1);
      v_full[stage].init(1);
      k_empty[stage].init(kWarpsPerGroup * kGroups * kCluster);
      v_empty[stage].init(kWarpsPerGroup * kGroups * kCluster);
      out_empty[stage].init(kWarpsPerGroup * kCluster);
    }
    cutlass::arch::fence_barrier_init();
  }
};

// The n-th use of a ring of kStages buffers.
template <int kStages>
struct Ring {
  uint32_t use = 0;

  __device__ __forceinline__ int stage() const { return int(use % kStages); }
  __device__ __forceinline__ uint32_t parity() const { return use / kStages & 1; }
};

// A use of a ring, that counts on: where a division by the number of stages would cost more.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ Stage next() const {
    return index == kStages - 1 ? Stage{0, parity ^ 1} : Stage{index + 1, parity};
  }
};

// The ping-pong between groups; a single one takes none. kFirst: the first of their named barriers.
template <int kGroups, int kFirst = 0>
struct Turns {
  // The last group hands the first turn to group 0. Once per thread block.
  __device__ __forceinline__ static void start(int group) {
    if (group == kGroups - 1) pass(group);
  }
  __device__ __forceinline__ static void wait(int group) {
    if constexpr (kGroups > 1) {
      cutlass::arch::NamedBarrier::sync(2 * kWarpGroupThreads, kFirst + group);
    }
  }
  __device__ __forceinline__ static void pass(int group) {
    if constexpr (kGroups > 1) {
      cutlass::arch::NamedBarrier::arrive(2 * kWarpGroupThreads,
                                          kFirst + (group + 1 == kGroups ? 0 : group + 1));
    }
  }
};

}  // namespace flash_attn2::sm90
