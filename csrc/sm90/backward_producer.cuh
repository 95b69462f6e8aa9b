// The producer warpgroup of the sm90 backward: one thread that loads, in a cluster one that sends
// dS, and in deterministic mode two that keep the turns.
#pragma once

#include "dq_accumulator.cuh"

namespace flash_attn2::sm90 {

// TMA loads of K and V once, and of Q, dO, LSE and delta for every step.
template <class Traits>
struct BackwardProducer {
  using Element = typename Traits::Element;
  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const BackwardWork<Traits>& work;
  const int first;  // of the work's steps; they are counted over all work of the thread block

  // Announces the bytes that `full` is to count and returns it.
  __device__ __forceinline__ static uint64_t* open(LoadBarrier& full, int bytes) {
    full.arrive_and_expect_tx(bytes);
    return reinterpret_cast<uint64_t*>(&full);
  }

  __device__ __forceinline__ int head_of_k() const {
    return work.coord.head / arguments.params.head_parts;
  }
  __device__ __forceinline__ void load_k() const {
    tma_load<Traits::kTileN, Traits::kHeadDim, Traits::kBoxK>(
        arguments.k, open(smem.barriers.k_full, sizeof(smem.k)), smem.k,
        {work.key_begin, head_of_k(), work.coord.batch});
  }
  // The columns of the other thread block's K whose dQ this one sums.
  __device__ __forceinline__ void load_peer_k() const {
    constexpr int kColumns = Traits::kHeadDim / Traits::kCluster;
    const int rank = cluster_rank<Traits::kCluster>();
    tma_load<Traits::kTileN, kColumns, Traits::kBoxK>(
        arguments.k, open(smem.barriers.peer_k_full, sizeof(smem.columns.peer_k)),
        smem.columns.peer_k,
        {work.key_begin + (rank == 0 ? Traits::kTileN : -Traits::kTileN), head_of_k(),
         work.coord.batch, rank * kColumns});
  }
  __device__ __forceinline__ void load_v() const {
    tma_load<Traits::kTileN, Traits::kHeadDimV>(arguments.v,
                                                open(smem.barriers.v_full, sizeof(smem.v)), smem.v,
                                                {work.key_begin, head_of_k(), work.coord.batch});
  }
  // Bit c: consumer c has to mask its part of S. smem.whole_rows are those of consumer 0, for whom
  // the last keys count as hidden when the other's are; consumer 1's lie as much further as its
  // keys.
  __device__ __forceinline__ int consumers_to_mask(int row_begin) const {
    const BlockRange whole = smem.whole_rows;
    int consumers = 0;
    CUTE_UNROLL
    for (int c = 0; c < kConsumers; ++c) {
      const int shift = c * Traits::kKeys;
      consumers |= int(!whole.contains(row_begin - shift)) << c;
    }
    return consumers;
  }
  __device__ __forceinline__ BlockRange whole_rows() const {
    const VisibleKeys visible(arguments.params.shape, arguments.params.window);
    if (work.key_begin + Traits::kTileN > visible.seqlen_k) return {0, 0};
    return visible.whole_rows(Traits::kTileM, work.key_begin, Traits::kKeys);
  }
  // Rows of Q or dO, for all thread blocks of the cluster.
  template <int kColumns>
  __device__ __forceinline__ void load_rows(const CUtensorMap& map, uint64_t* full, Element* target,
                                            const QueryStep& at) const {
    const TmaCoord coord{at.block * Traits::kTileM, at.head, work.coord.batch};
    if constexpr (Traits::kCluster == 1) {
      tma_load<Traits::kTileM, kColumns>(map, full, target, coord);
    } else {
      tma_load_for_all<Traits::kCluster, Traits::kTileM, kColumns>(map, full, target, coord);
    }
  }
  // Also where the rows and their dQ are.
  __device__ __forceinline__ void load_q(int step, const QueryStep& at, int sums) const {
    const int stage = Ring<Traits::kStages>{uint32_t(step)}.stage();
    const int row_begin = at.block * Traits::kTileM;
    smem.tile[stage] = {row_begin | consumers_to_mask(row_begin), sums};
    load_rows<Traits::kHeadDim>(arguments.q, open(smem.barriers.q_full[stage], sizeof(smem.q[0])),
                                smem.q[stage], at);
  }
  // Also D and L of the rows, which come last. `tile`: tile_index of the step.
  __device__ __forceinline__ void load_dout(int step, const QueryStep& at, int tile) const {
    const int stage = Ring<Traits::kDoutStages>{uint32_t(step)}.stage();
    const int lse_stage = Ring<Traits::kStages>{uint32_t(step)}.stage();
    uint64_t* full = open(smem.barriers.dout_full[stage],
                          sizeof(smem.dout[0]) + sizeof(smem.delta[0]) + sizeof(smem.lse[0]));
    load_rows<Traits::kHeadDimV>(arguments.dout, full, smem.dout[stage], at);
    if (Traits::kDeltaAhead && step == first) wait_for_delta(arguments.params, work);
    tma_load_row(arguments.lse, full, smem.lse[lse_stage], tile);
    tma_load_row(arguments.delta, full, smem.delta[stage], tile);
  }

  // For the thread block's only work.
  __device__ __forceinline__ void run_once() const {
    if (work.steps > 0 || !Traits::kSplitColumns) {
      load_k();  // in the order in which the consumers want them
      load_v();
    }
    wait_for_cluster<Traits::kCluster>();  // whose barriers are there then
    wait_for_previous_kernel();            // which makes L and D, and zeroes dQ
    load_steps([&] {
      if constexpr (Traits::kCluster > 1) load_peer_k();
    });
  }
  // For its work `number`. K and V come when nobody reads those before any more, while dK and dV
  // leave.
  __device__ __forceinline__ void run(int number) const {
    const auto load_keys = [&] {
      if (number > 0) wait_for_end<Traits>(smem, number - 1);
      load_k();
      load_v();
    };
    // Their place is not free yet.
    if (number > 0) {
      tma_prefetch<Traits::kHeadDim, Traits::kBoxK>(
          arguments.k, {work.key_begin, head_of_k(), work.coord.batch});
      tma_prefetch<Traits::kHeadDimV>(arguments.v, {work.key_begin, head_of_k(), work.coord.batch});
    }
    load_steps(load_keys);
    if (work.steps == 0) load_keys();
  }

  // after_first(): loads what the steps want beside theirs, after the first one's.
  template <class AfterFirst>
  __device__ __forceinline__ void load_steps(const AfterFirst& after_first) const {
    const int before_slots =
        tiles_before_slots<Traits>(arguments.params, work.kv_head(arguments.params));
    smem.whole_rows = whole_rows();
    QueryStep at = QueryStep::first(work);
    const int end = first + work.steps;
    CUTE_NO_UNROLL
    for (int step = first; step < end; ++step, at = at.next(work)) {
      const int tile = tile_index(arguments.params, work, at);
      const Ring<Traits::kStages> ring{uint32_t(step)};
      smem.barriers.q_empty[ring.stage()].wait(ring.parity() ^ 1);
      const int place = tile - before_slots;
      load_q(step, at, Traits::kSplitColumns ? place : QueryTile::pack(place, step == end - 1));
      // No dQ without dO.
      if (Traits::kDqRing && step == first) wait_for_dq_slot(arguments.params, work);
      const Ring<Traits::kDoutStages> dout_ring{uint32_t(step)};
      smem.barriers.dout_empty[dout_ring.stage()].wait(dout_ring.parity() ^ 1);
      load_dout(step, at, tile);
      if (step == first) after_first();
    }
  }

  // Deterministic mode: key blocks add to the columns of a dQ tile that a thread block sums one
  // after the other (core/turn_order.h); their counter is the number of those that have. Two
  // threads keep the turns, so that the consumers never stall for the polling, nor the next turn
  // for the fence, which waits for the adds to arrive.
  __device__ __forceinline__ int* counter(const QueryStep& at) const {
    return arguments.params.dq_turn +
           int64_t(tile_index(arguments.params, work, at)) * Traits::kCluster +
           cluster_rank<Traits::kCluster>();
  }

  // Tells the consumers when a tile's turn has come. What follows are additions where those before
  // were made, and no reads.
  __device__ __forceinline__ void take_turns() const {
    const BackwardParams& params = arguments.params;
    const TurnOrder order(params, Traits::kTileM, Traits::kClusterKeys, work.kv_head(params));
    QueryStep at = QueryStep::first(work);
    const int end = first + work.steps;
    CUTE_NO_UNROLL
    for (int step = first; step < end; ++step, at = at.next(work)) {
      poll_count(counter(at), order.turn(work.coord.block, at.block));
      if (step > 0) smem.barriers.turn_seen.wait((step - 1) & 1);
      smem.barriers.turn_come.arrive();
    }
  }

  // Tells the next key block when a tile's turn is over.
  __device__ __forceinline__ void pass_turns() const {
    QueryStep at = QueryStep::first(work);
    const int end = first + work.steps;
    CUTE_NO_UNROLL
    for (int step = first; step < end; ++step, at = at.next(work)) {
      smem.barriers.turn_used.wait(step & 1);
      smem.barriers.turn_seen.arrive();
      __threadfence();
      atomicAdd(counter(at), 1);
    }
  }
};

// All that the thread block loads. One that stays draws tiles, in the order in which they would be
// thread blocks, and loads Q and dO of one while the one before ends.
template <class Traits>
__device__ __forceinline__ void run_producer(const BackwardArguments& arguments,
                                             typename Traits::SharedStorage& smem) {
  if constexpr (!Traits::kPersistent) {
    BackwardProducer<Traits>{arguments, smem, smem.work[0], 0}.run_once();
  } else {
    const BackwardParams& params = arguments.params;
    wait_for_previous_kernel();  // which makes L and D, and zeroes dQ and the ticket
    int first = 0;
    CUTE_NO_UNROLL
    for (int number = 0;; ++number) {
      // No sooner: others may wait for this tile.
      const unsigned index = atomicAdd(params.ticket, 1);
      if (hand_out_work<Traits>(params, smem, number, index)) return;
      const BackwardWork<Traits>& work = smem.work[number % Traits::kWorks];
      BackwardProducer<Traits>{arguments, smem, work, first}.run(number);
      first += work.steps;
    }
  }
}

// Deterministic mode: the thread that takes turns, or the one that passes them on.
template <class Traits, bool kTake>
__device__ __forceinline__ void keep_turns(const BackwardArguments& arguments,
                                           typename Traits::SharedStorage& smem) {
  wait_for_previous_kernel();  // which zeroes the counters
  int first = 0;
  for_each_work<Traits>(smem, [&](const BackwardWork<Traits>& work, int number) {
    const BackwardProducer<Traits> producer{arguments, smem, work, first};
    if constexpr (kTake) {
      producer.take_turns();
    } else {
      producer.pass_turns();
    }
    first += work.steps;
    release_work<Traits>(smem, number);
  });
}

// kColumns: sends dS of every step to the other thread block. Its consumers are done with the one
// before: else those of this one had not stored dS.
template <class Traits>
__device__ __forceinline__ void send_ds(typename Traits::SharedStorage& smem) {
  const int peer = cluster_rank<Traits::kCluster>() ^ 1;
  CUTE_NO_UNROLL
  for (int step = 0; step < smem.work[0].steps; ++step) {
    smem.barriers.ds_full[0].wait(step & 1);
    cutlass::arch::fence_view_async_shared();
    smem.barriers.peer_ds_full.arrive_and_expect_tx(sizeof(smem.columns.peer_ds));
    copy_to_peer(smem.ds, smem.columns.peer_ds,
                 reinterpret_cast<uint64_t*>(&smem.barriers.peer_ds_full),
                 sizeof(smem.columns.peer_ds), peer);
  }
}

}  // namespace flash_attn2::sm90
