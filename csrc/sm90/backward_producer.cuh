// The producer warpgroup of the sm90 backward: one thread that loads, and in deterministic mode two
// that keep the turns.
#pragma once

#include "dq_accumulator.cuh"

namespace flash_attn2::sm90 {

// TMA loads of K and V once, and of Q, dO, LSE and delta for every step.
template <class Traits>
struct BackwardProducer {
  using Element = typename Traits::Element;
  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const BackwardWork<Traits> work;

  // Announces the bytes that `full` is to count and returns it.
  __device__ __forceinline__ static uint64_t* open(LoadBarrier& full, int bytes) {
    full.arrive_and_expect_tx(bytes);
    return reinterpret_cast<uint64_t*>(&full);
  }

  __device__ __forceinline__ void load_k() const {
    tma_load<Traits::kTileN, Traits::kHeadDim, Traits::kBoxK>(
        arguments.k, open(smem.barriers.k_full, sizeof(smem.k)), smem.k,
        {work.key_begin, work.coord.head, work.coord.batch});
  }
  __device__ __forceinline__ void load_v() const {
    tma_load<Traits::kTileN, Traits::kHeadDimV>(
        arguments.v, open(smem.barriers.v_full, sizeof(smem.v)), smem.v,
        {work.key_begin, work.coord.head, work.coord.batch});
  }
  // Bit c: consumer c has to mask its part of S. smem.whole_rows are those of consumer 0, for whom
  // the last keys count as hidden when the other's are; consumer 1's lie as much further as its
  // keys.
  __device__ __forceinline__ int consumers_to_mask(int row_begin) const {
    const BlockRange whole = smem.whole_rows;
    int consumers = 0;
    CUTE_UNROLL
    for (int c = 0; c < kConsumers; ++c) {
      const int shift = c * Traits::kKeys % Traits::kTileN;
      consumers |= int(!whole.contains(row_begin - shift)) << c;
    }
    return consumers;
  }
  __device__ __forceinline__ BlockRange whole_rows() const {
    const VisibleKeys visible(arguments.params.shape, arguments.params.window);
    if (work.key_begin + Traits::kTileN > visible.seqlen_k) return {0, 0};
    return visible.whole_rows(Traits::kTileM, work.key_begin, Traits::kKeys);
  }
  // Also L of the rows, and where they and their dQ are. `tile`: tile_index of the step.
  __device__ __forceinline__ void load_q(int step, const QueryStep& at, int tile, int sums) const {
    const int stage = Ring<Traits::kStages>{uint32_t(step)}.stage();
    const int row_begin = at.block * Traits::kTileM;
    smem.tile[stage] = {row_begin | consumers_to_mask(row_begin), sums};
    uint64_t* full = open(smem.barriers.q_full[stage], sizeof(smem.q[0]) + sizeof(smem.lse[0]));
    tma_load<Traits::kTileM, Traits::kHeadDim>(arguments.q, full, smem.q[stage],
                                               {row_begin, at.head, work.coord.batch});
    tma_load_row(arguments.lse, full, smem.lse[stage], tile);
  }
  // Also D of the rows.
  __device__ __forceinline__ void load_dout(int step, const QueryStep& at, int tile) const {
    const int stage = Ring<Traits::kDoutStages>{uint32_t(step)}.stage();
    uint64_t* full =
        open(smem.barriers.dout_full[stage], sizeof(smem.dout[0]) + sizeof(smem.delta[0]));
    tma_load<Traits::kTileM, Traits::kHeadDimV>(
        arguments.dout, full, smem.dout[stage],
        {at.block * Traits::kTileM, at.head, work.coord.batch});
    tma_load_row(arguments.delta, full, smem.delta[stage], tile);
  }

  __device__ __forceinline__ void run() const {
    if (work.steps > 0) {
      load_k();  // in the order in which the consumers want them
      load_v();
    }
    wait_for_previous_kernel();  // which makes L and D, and zeroes dQ
    const int before_slots =
        tiles_before_slots<Traits>(arguments.params, work.kv_head(arguments.params));
    smem.whole_rows = whole_rows();
    QueryStep at = QueryStep::first(work);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps; ++step, at = at.next(work)) {
      const int tile = tile_index(arguments.params, work, at);
      const Ring<Traits::kStages> ring{uint32_t(step)};
      smem.barriers.q_empty[ring.stage()].wait(ring.parity() ^ 1);
      load_q(step, at, tile, tile - before_slots);
      // No dQ without dO.
      if (Traits::kDqRing && step == 0) wait_for_dq_slot(arguments.params, work);
      const Ring<Traits::kDoutStages> dout_ring{uint32_t(step)};
      smem.barriers.dout_empty[dout_ring.stage()].wait(dout_ring.parity() ^ 1);
      load_dout(step, at, tile);
    }
    if (Traits::kDqRing && has_converters(arguments.params, work)) {
      smem.barriers.done.wait(0);
      count_dq_added(arguments.params, work);
    }
  }

  // Deterministic mode: key blocks add to a part of a dQ tile one after the other
  // (core/turn_order.h); its counter is the number of those that have. Two threads keep the turns,
  // so that the consumers never stall for the polling, nor the next turn for the fence, which waits
  // for the adds to arrive.
  __device__ __forceinline__ int* counters(const QueryStep& at) const {
    return arguments.params.dq_turn +
           int64_t(tile_index(arguments.params, work, at)) * Traits::kDqParts;
  }

  // Tells the consumers when a part's turn has come. What follows are additions where those before
  // were made, and no reads.
  __device__ __forceinline__ void take_turns() const {
    const BackwardParams& params = arguments.params;
    const TurnOrder order(params, Traits::kTileM, Traits::kTileN, work.kv_head(params));
    wait_for_previous_kernel();  // which zeroes the counters
    QueryStep at = QueryStep::first(work);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps; ++step, at = at.next(work)) {
      const int turn = order.turn(work.coord.block, at.block);
      CUTE_UNROLL
      for (int part = 0; part < Traits::kDqParts; ++part) {
        const int n = step * Traits::kDqParts + part;
        poll_count(counters(at) + part, turn);
        if (n > 0) smem.barriers.turn_seen.wait((n - 1) & 1);
        smem.barriers.turn_come.arrive();
      }
    }
  }

  // Tells the next key block when a part's turn is over.
  __device__ __forceinline__ void pass_turns() const {
    wait_for_previous_kernel();
    QueryStep at = QueryStep::first(work);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps; ++step, at = at.next(work)) {
      CUTE_UNROLL
      for (int part = 0; part < Traits::kDqParts; ++part) {
        smem.barriers.turn_used.wait((step * Traits::kDqParts + part) & 1);
        smem.barriers.turn_seen.arrive();
        __threadfence();
        atomicAdd(counters(at) + part, 1);
      }
    }
  }
};

}  // namespace flash_attn2::sm90
