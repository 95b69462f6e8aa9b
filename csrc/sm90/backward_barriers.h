// Every barrier of the sm90 backward: who arrives, who waits, how often. A consumer warp arrives at
// a mbarrier with one lane.
//
// mbarriers:
//
//   barrier          arrivals a phase       completes when                       who waits
//   k_full, v_full   1 (producer) + bytes   K, V are there                       consumers
//   q_full[s]        1 (producer) + bytes   stage s holds Q and its tile         consumers
//   dout_full[s]     1 (producer) + bytes   stage s holds dO, delta and LSE      consumers
//   q_empty[s]       8 (consumer warps)     Q and LSE of the step are used       producer
//   dout_empty[s]    8 (consumer warps)     dO and delta of the step are used    producer
//   ds_full[b]       8 (consumer warps)     buffer b holds dS (kColumns: and P)  consumers, sender
//   peer_k_full      1 (producer) + bytes   the other's half of K is there       consumers
//   peer_ds_full     1 (sender) + bytes     the other's dS is there              consumers
//   ds_empty[b]      8 (consumer warps)     both dS of the step are used         consumers
//   dq_full          1 (converter) + bytes  a part of an earlier head's dQ came  converters
//   delta_made       8 (consumer warps)     D of a later head is made            who counts it
//   done[i]          1 (consumer 0)         nobody reads K, V and dS of work i    all but consumers
//   work_full[i]     1 (producer)           work i is there                      all
//   work_empty[i]    see below              work i is done                       producer
//   gradients_left   2 (consumers)          dK and dV have left dS's place       consumers
//   turn_come        1 (turn taker)         the next dQ may be added             consumers
//   turn_used        8 (consumer warps)     it is added                          turn passer
//   turn_seen        1 (turn passer)        ... and the passer has seen it       turn taker
//
// kWholeHeads: dQ has a warpgroup of its own, whose 4 warps wait for ds_full[b] and alone arrive at
// ds_empty[b]. At done[i] arrive these and those of the consumers when they do not read K any more.
// LSE has dO's stages; these bring V, too.
//
// Thread blocks of a cluster (kColumns) load Q and dO for each other and exchange dS: there the
// consumer warps of both arrive at q_empty, dout_empty and ds_empty.
//
// delta_made: where thread blocks make D of later heads (BackwardTraits::kDeltaAhead).
//
// work_* and gradients_left: where thread blocks stay (BackwardTraits::kPersistent). At work_empty
// arrive all that wait for work_full.
//
// turn_* are for deterministic mode. Without ds_empty buffers of P and dS need no barrier for their
// release, see kScoreBuffers.
//
// Named barriers:
//
//   consumer(w)      128: consumer w alone
//   converters       96; deterministic mode: 32. Those warps of the producer's warpgroup alone
//   dq               128: kWholeHeads, for converters: the warpgroup that makes dQ alone
//   consumers        256: both, when they are done with a work's K, V and dS
//   turn(w)          256: without kColumns; consumer w waits, the other one arrives
#pragma once

#include "barriers.h"

namespace flash_attn2::sm90 {

inline constexpr int kConsumers = 2;

template <int kStages, int kDoutStages, int kScoreBuffers, int kWorks, int kCluster,
          bool kWholeHeads>
struct BackwardBarriers {
  LoadBarrier k_full, v_full, q_full[kStages], dout_full[kDoutStages], dq_full;
  LoadBarrier peer_k_full, peer_ds_full;
  Barrier delta_made;
  Barrier q_empty[kStages], dout_empty[kDoutStages];
  Barrier ds_full[kScoreBuffers], ds_empty[kScoreBuffers];
  Barrier turn_come, turn_used, turn_seen;
  Barrier work_full[kWorks], work_empty[kWorks], done[kWorks], gradients_left;

  // By one thread, before any use; __syncthreads afterwards. `others`: threads that wait for
  // work_full, beside the consumers'.
  __device__ void init(int others) {
    constexpr int kConsumerWarps = kConsumers * kWarpsPerGroup;
    k_full.init(1);
    v_full.init(1);
    dq_full.init(1);
    delta_made.init(kConsumerWarps);
    peer_k_full.init(1);
    peer_ds_full.init(1);
    for (int i = 0; i < kStages; ++i) {
      q_full[i].init(1);
      q_empty[i].init(kConsumerWarps * kCluster);
    }
    for (int i = 0; i < kDoutStages; ++i) {
      dout_full[i].init(1);
      dout_empty[i].init(kConsumerWarps * kCluster);
    }
    for (int i = 0; i < kScoreBuffers; ++i) {
      ds_full[i].init(kConsumerWarps);
      ds_empty[i].init(kWholeHeads ? kWarpsPerGroup : kConsumerWarps * kCluster);
    }
    turn_come.init(1);
    turn_used.init(kConsumerWarps);
    turn_seen.init(1);
    for (int i = 0; i < kWorks; ++i) {
      work_full[i].init(1);
      done[i].init(kWholeHeads ? kConsumerWarps + kWarpsPerGroup : 1);
      work_empty[i].init(kConsumers * kWarpGroupThreads + others);
    }
    gradients_left.init(kConsumers);
    cutlass::arch::fence_barrier_init();
  }
};

// The whole warp's reads and writes so far come before the arrival.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier, int thread) {
  __syncwarp();
  if (thread % 32 == 0) barrier.arrive();
}

// The rank of this thread block in its cluster.
template <int kCluster>
__device__ __forceinline__ int cluster_rank() {
  return kCluster == 1 ? 0 : int(blockIdx.x % kCluster);
}

// The same at the barriers of all thread blocks of the cluster. `rank`: of this one, for lane 0, to
// whose arrival racecheck follows the lane's reads.
template <int kCluster>
__device__ __forceinline__ void arrive_at_all(Barrier& barrier, int thread, int rank) {
  if constexpr (kCluster == 1) {
    arrive_as_warp(barrier, thread);
  } else {
    __syncwarp();
    const int lane = thread % 32;
    if (lane < kCluster) barrier.arrive(rank ^ lane);
  }
}

// The query tile of a step, for the consumers.
struct alignas(8) QueryTile {
  int rows;  // its first row, a multiple of 64, and in bit c whether consumer c has to mask it
  int sums;  // its place in dQ's accumulator; kKeys: and whether it is the work's last

  __device__ __forceinline__ int row_begin() const { return rows & ~63; }
  __device__ __forceinline__ bool masked(int consumer) const { return rows >> consumer & 1; }
  // Of `sums`.
  __device__ __forceinline__ static int pack(int place, bool last) {
    return place | int(unsigned(last) << 31);
  }
  __device__ __forceinline__ static bool is_last(int sums) { return sums < 0; }
  __device__ __forceinline__ static int place(int sums) { return sums & 0x7fffffff; }
};

// These words are overwritten by who waits for the barrier: so the lane that arrives reads them, as
// racecheck does not follow other lanes' reads to it. That is done before the products of S are
// issued, behind whose operands the load would wait; `share` tells the other lanes after them.
__device__ __forceinline__ QueryTile read_as_first_lane(const QueryTile& tile, int thread) {
  QueryTile read{0, 0};
  if (thread % 32 == 0) read = tile;
  return read;
}
__device__ __forceinline__ QueryTile share(const QueryTile& read) {
  return {__shfl_sync(0xffffffffu, read.rows, 0), __shfl_sync(0xffffffffu, read.sums, 0)};
}

// Named barriers; 0 is __syncthreads.
__device__ __forceinline__ void sync_consumer(int consumer) {
  cutlass::arch::NamedBarrier::sync(kWarpGroupThreads, 1 + consumer);
}
__device__ __forceinline__ void sync_converters(int threads) {
  cutlass::arch::NamedBarrier::sync(threads, 1 + kConsumers);
}
__device__ __forceinline__ void sync_dq() { sync_converters(kWarpGroupThreads); }
__device__ __forceinline__ void sync_consumers() {
  cutlass::arch::NamedBarrier::sync(kConsumers * kWarpGroupThreads, 2 + kConsumers);
}
using ConsumerTurns = Turns<kConsumers, 3 + kConsumers>;

}  // namespace flash_attn2::sm90
