// What the consumer warpgroups of the sm90 backward have in common: the tiles in shared memory, dQ
// (step B7) and what they tell the producer and each other. The products before and after P and dS
// are in backward_registers.cuh and backward_columns.cuh.
#pragma once

#include "dq_accumulator.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct BackwardConsumer {
  using Element = typename Traits::Element;
  using MmaDq = typename Traits::MmaDq;
  static constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kKeys = Traits::kKeys;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  using AccDq = Accumulator<MmaDq, Traits::kDqRows, Traits::kDqColumns>;
  using Stages = Ring<Traits::kStages>;
  using DoutStages = Ring<Traits::kDoutStages>;
  using Scores = Ring<Traits::kScoreBuffers>;

  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const int number;  // of the work, counted by the thread block
  const int consumer;
  // Inside the warpgroup.
  const int thread;
  const int rank;  // of the thread block in its cluster

  __device__ __forceinline__ BackwardConsumer(const BackwardArguments& arguments,
                                              typename Traits::SharedStorage& smem, int number,
                                              int consumer)
      : arguments(arguments),
        smem(smem),
        number(number),
        consumer(consumer),
        thread(own_thread()),
        rank(own_rank()) {}

  __device__ __forceinline__ const BackwardWork<Traits>& work() const {
    return smem.work[number % Traits::kWorks];
  }

  // Through a shuffle of its own lane's, which ptxas does not repeat: it would read the special
  // register anew in every step, where that waits behind the additions to dQ.
  __device__ __forceinline__ static int own_thread() {
    return __shfl_sync(0xffffffffu, threadIdx.x % kWarpGroupThreads, threadIdx.x % 32);
  }

  // Not from its special register in every step, likewise.
  __device__ __forceinline__ static int own_rank() {
    if constexpr (Traits::kCluster == 1) return 0;
    return cluster_rank<Traits::kCluster>() ^ opaque_zero();
  }

  // Shared-memory tiles.
  __device__ __forceinline__ auto tile_k() const {
    return smem_tile<kTileN, kHeadDim, Traits::kBoxK>(smem.k);
  }
  __device__ __forceinline__ auto tile_v() const { return smem_tile<kTileN, kHeadDimV>(smem.v); }
  __device__ __forceinline__ auto tile_q(int step) const {
    return smem_tile<kTileM, kHeadDim>(smem.q[Stages{uint32_t(step)}.stage()]);
  }
  __device__ __forceinline__ auto tile_dout(int step) const {
    return smem_tile<kTileM, kHeadDimV>(smem.dout[DoutStages{uint32_t(step)}.stage()]);
  }
  // (queries, keys)
  __device__ __forceinline__ auto tile_ds(int step) const {
    Element* ds = smem.ds + Scores{uint32_t(step)}.stage() * Traits::kScoreElements;
    if constexpr (Traits::kSplitColumns) {
      return transposed(smem_tile<kTileN, kTileM>(ds));
    } else {
      return smem_tile<kTileM, kTileN>(ds);
    }
  }
  // L and D of a step's rows.
  __device__ __forceinline__ const float* lse(int step) const {
    return smem.lse[Stages{uint32_t(step)}.stage()];
  }
  __device__ __forceinline__ const float* delta(int step) const {
    return smem.delta[DoutStages{uint32_t(step)}.stage()];
  }

  __device__ __forceinline__ void wait_for_q(int step) const {
    const Stages ring{uint32_t(step)};
    smem.barriers.q_full[ring.stage()].wait(ring.parity());
  }
  __device__ __forceinline__ void wait_for_dout(int step) const {
    const DoutStages ring{uint32_t(step)};
    smem.barriers.dout_full[ring.stage()].wait(ring.parity());
  }
  // Then wgmma may read what all consumers have stored for the step. The fence is here and not
  // before their arrival, where each would wait for its stores to land.
  __device__ __forceinline__ void wait_for_ds(int step) const {
    const Scores ring{uint32_t(step)};
    smem.barriers.ds_full[ring.stage()].wait(ring.parity());
    cutlass::arch::fence_view_async_shared();
  }
  // The step's query tile, after wait_for_q and before release_q; for `share`.
  __device__ __forceinline__ QueryTile read_query_tile(int step) const {
    return read_as_first_lane(smem.tile[Stages{uint32_t(step)}.stage()], thread);
  }
  // Step B1 of a later head.
  __device__ __forceinline__ void make_delta() const {
    if constexpr (Traits::kDeltaAhead) {
      DeltaMaker<Traits>{arguments.params, thread}.run(work(), consumer);
      arrive_as_warp(smem.barriers.delta_made, thread);
    }
  }
  // The buffers of Q (and L) or of dO (and D) of a step are no longer needed.
  __device__ __forceinline__ void release_q(int step) const {
    arrive_at_all<Traits::kCluster>(smem.barriers.q_empty[Stages{uint32_t(step)}.stage()], thread,
                                    rank);
  }
  __device__ __forceinline__ void release_dout(int step) const {
    arrive_at_all<Traits::kCluster>(smem.barriers.dout_empty[DoutStages{uint32_t(step)}.stage()],
                                    thread, rank);
  }

  // This consumer's part of the cluster's dQ.
  __device__ __forceinline__ int dq_part() const { return rank * kConsumers + recompute(consumer); }
  // Starts that of dQ = dS K, over all keys of the tile (B7).
  __device__ __forceinline__ void start_dq(int step, AccDq& acc) const {
    const int index = dq_part();
    auto ds = operand_a<MmaDq>(
        part<Traits::kDqRows, kTileN>(tile_ds(step), Traits::kSplitDqRows ? index : 0, 0));
    const auto k = operand_b<MmaDq>(part<Traits::kDqColumns, kTileN>(
        transposed(tile_k()), Traits::kSplitDqRows ? 0 : index, 0));
    start_gemm<MmaDq, Accumulate::kNo>(ds, k, acc);
  }
  // Where this thread's share of it is summed. `tile`: the step's QueryTile::sums.
  __device__ __forceinline__ float* dq_target(int tile) const {
    return arguments.params.dq_accum + int64_t(tile) * Traits::kDqElements +
           (dq_part() * Traits::kDqPartElements + thread * 4);
  }
  // `target`: dq_target of the step.
  __device__ __forceinline__ void add_dq(int step, float* target, const AccDq& acc) const {
    const bool ordered = arguments.params.dq_turn != nullptr;
    if (ordered) smem.barriers.turn_come.wait(step & 1);
    add_to_dq(target, acc);
    if (ordered) arrive_as_warp(smem.barriers.turn_used, thread);
  }

  // Until both consumers are done with K, V and dS. After it only the first thread reads the work.
  __device__ __forceinline__ void wait_for_both() const {
    sync_consumers();
    if (consumer == 0 && thread == 0) smem.barriers.done[number % Traits::kWorks].arrive();
  }

  // B8: a part of dK or dV, which this consumer, or kWriters of them together, have written over K,
  // V or dS from (key, column) of the tile on, leaves.
  template <int kColumns, int kBox, int kWriters = 1, class Tile>
  __device__ __forceinline__ void store_key_gradient(const CUtensorMap& map, const Tile& tile,
                                                     int key, int column) const {
    cutlass::arch::fence_view_async_shared();
    if constexpr (kWriters == 1) {
      sync_consumer(consumer);
    } else {
      sync_consumers();
    }
    if (thread == 0 && (kWriters == 1 || consumer == 0)) {
      tma_store<kTileN, kColumns, kBox>(
          map, &tile(key, column),
          {work().key_begin + key, work().coord.head, work().coord.batch, column});
    }
  }
  // Shared memory has to outlive the stores.
  __device__ __forceinline__ void wait_for_stores() const {
    if (thread == 0) tma_store_wait<0>();
  }
};

}  // namespace flash_attn2::sm90
