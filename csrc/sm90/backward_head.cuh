// ConsumerSplit::kWholeHeads: a thread block takes all key blocks of a head, one after the other,
// and sums dQ of the whole head in shared memory. So nothing is added in L2, zeroed before or
// converted afterwards, and all sums have one order. For heads of up to 512 query rows.
//
// Each of two consumers has 64 keys (B2 to B6). A third warpgroup makes dQ from their dS (B7, see
// backward_head_dq.cuh), three threads load (backward_head_loads.cuh). Consumers take turns with
// the exponentials, so that those of one run under the products of the other, and start S and dP a
// step ahead.
#pragma once

#include "backward_registers.cuh"

namespace flash_attn2::sm90 {

// Where the next Q, and the next dO or half of V, come.
template <class Traits>
struct HeadStages {
  Stage<Traits::kStages> q;
  Stage<Traits::kDoutStages> dout;

  __device__ __forceinline__ HeadStages next() const { return {q.next(), dout.next()}; }
};

template <class Traits>
struct HeadConsumer : RegisterConsumer<Traits> {
  using Base = RegisterConsumer<Traits>;
  using Base::Base, Base::smem, Base::number, Base::consumer, Base::thread;
  using Base::kHeadDim, Base::kHeadDimV, Base::kKeys, Base::kTileM;
  using typename Base::AccS, typename Base::Element;
  using MmaHeldV = RegisterMma<Element, kKeys, kTileM, Major::K>;  // dP^T, V from registers
  using HeldV = decltype(make_tensor<Element>(
      partition_shape_A(MmaHeldV{}, cute::Shape<Int<kKeys>, Int<kHeadDimV>>{})));
  using Stages = HeadStages<Traits>;
  using Pairs = HeldPairs<kTileM>;
  // dK and dV leave by way of dS's place: this consumer's by way of its own keys'.
  static_assert(Traits::kScoreElements == Traits::kTileN * kHeadDimV);

  typename Base::AccDk acc_dk;
  typename Base::AccDv acc_dv;
  AccS acc_p, acc_ds;     // of the step at hand
  HeldV held_v;           // this consumer's rows of V
  BlockRange whole_rows;  // tiles that begin here need no mask

  __device__ __forceinline__ auto tile_q(const Stages& at) const {
    return smem_tile<kTileM, kHeadDim>(smem.q[at.q.index]);
  }
  __device__ __forceinline__ auto tile_dout(const Stages& at) const {
    return smem_tile<kTileM, kHeadDimV>(smem.dout[at.dout.index]);
  }

  // V comes by way of dO's stages, a part for each consumer. Both wait for both parts: who arrives
  // at dout_empty of one that is not there yet may do so for the part that was there before.
  __device__ __forceinline__ void hold_v(Stages& at) {
    CUTE_UNROLL
    for (int i = 0; i < kConsumers; ++i, at.dout = at.dout.next()) {
      smem.barriers.dout_full[at.dout.index].wait(at.dout.parity);
      if (i == consumer) {
        const auto v = tile_dout(at);
        const StoreLane lane = StoreLane::rows(thread);
        CUTE_UNROLL
        for (int block = 0; block < kHeadDimV / 16; ++block) {
          load_block(held_v, block, &v(thread / 32 * 16 + lane.row, 16 * block + lane.column));
        }
      }
      arrive_as_warp(smem.barriers.dout_empty[at.dout.index], thread);
    }
  }

  // Starts S^T (B2) and dP^T (B3) of a step.
  __device__ __forceinline__ void start_step(const Stages& at) {
    using MmaS = typename Base::MmaS;
    auto k = operand_a<MmaS>(part<kKeys, kHeadDim>(this->tile_k(), this->first_key() / kKeys, 0));
    const auto q = operand_b<MmaS>(tile_q(at));
    smem.barriers.q_full[at.q.index].wait(at.q.parity);
    start_gemm<MmaS, Accumulate::kNo>(k, q, acc_p);
    const auto dout = operand_b<MmaHeldV>(tile_dout(at));
    smem.barriers.dout_full[at.dout.index].wait(at.dout.parity);
    start_gemm<MmaHeldV, Accumulate::kNo>(held_v, dout, acc_ds);
  }
  // P^T and dS^T (B4) of the step, of query tile `block`; products of steps before are finished.
  // Exponentials are what takes longest, so that the rest runs between them.
  __device__ __forceinline__ void finish_step(const Stages& at, int block, const Pairs& lse) {
    const int row_begin = block * kTileM;
    ConsumerTurns::wait(consumer);
    finish_gemm<1>(acc_p);
    this->make_probabilities([&] { return lse; }, !whole_rows.contains(row_begin), row_begin,
                             acc_p);
    finish_gemm<0>(acc_ds);
    const LoadedPairs delta(smem.delta[at.dout.index], thread);
    const auto probabilities = [&](int i) {
      return make_float4(acc_p(i), acc_p(i + 1), acc_p(i + 2), acc_p(i + 3));
    };
    this->template make_score_gradients<0, decltype(size(acc_ds))::value>(delta, probabilities,
                                                                          acc_ds);
    ConsumerTurns::pass(consumer);
  }
  __device__ __forceinline__ Pairs lse(const Stages& at) const {
    return Pairs(smem.lse[at.dout.index], thread);
  }

  // Until dQ of two steps before is made, whose dS lies where this step's goes.
  __device__ __forceinline__ void wait_for_ds_place(int step) const {
    const typename Base::Scores ring{uint32_t(step)};
    smem.barriers.ds_empty[ring.stage()].wait(ring.parity() ^ 1);
  }
  // Until dK and dV of the work before have left.
  __device__ __forceinline__ void wait_for_gradients() const {
    if (thread == 0) tma_store_wait<0>();
    sync_consumer(consumer);
  }

  // B5 and B6 of a step, and all that comes before them of the next one, of query tile `next`,
  // unless this is the last.
  template <bool kFirst, bool kLast>
  __device__ __forceinline__ void take(int step, int next, Stages& at) {
    auto p = to_operand_a<Element, typename Base::MmaDv>(acc_p);
    this->start_dv(p, tile_dout(at), acc_dv);
    auto ds = to_operand_a<Element, typename Base::MmaDk>(acc_ds);
    if constexpr (kFirst) wait_for_gradients();
    wait_for_ds_place(step);
    this->store_score_gradients(ds, step);
    this->start_dk(ds, tile_q(at), acc_dk);
    const Stages used = at;
    at = at.next();
    const auto release = [&] {
      arrive_as_warp(smem.barriers.q_empty[used.q.index], thread);
      arrive_as_warp(smem.barriers.dout_empty[used.dout.index], thread);
    };
    if constexpr (kLast) {
      finish_gemm<0>(acc_dv, acc_dk);
      release();
    } else {
      start_step(at);
      const Pairs next_lse = lse(at);
      finish_gemm<2>(acc_dv, acc_dk);
      release();
      finish_step(at, next, next_lse);
    }
  }

  // The query tiles of `blocks`, the last one first.
  __device__ __forceinline__ void walk(const BlockRange& blocks, int& step, Stages& at) {
    int block = blocks.end - 1;
    start_step(at);
    finish_step(at, block, lse(at));
    if (block == blocks.begin) {
      take<true, true>(step++, 0, at);
    } else {
      take<true, false>(step++, --block, at);
      CUTE_NO_UNROLL
      while (block > blocks.begin) take<false, false>(step++, --block, at);
      take<false, true>(step++, 0, at);
    }
  }

  // A key block. Steps are counted over all work.
  __device__ __forceinline__ void run(int& step, Stages& at) {
    clear(acc_dk);
    clear(acc_dv);
    hold_v(at);
    smem.barriers.k_full.wait(number & 1);
    const VisibleKeys visible(this->arguments.params.shape, this->arguments.params.window);
    whole_rows = visible.whole_rows(kTileM, this->work().key_begin + this->first_key(), kKeys);
    if (this->work().steps > 0) {
      walk(this->work().blocks, step, at);
    } else {
      wait_for_gradients();
    }
    arrive_as_warp(smem.barriers.done[number % Traits::kWorks], thread);
    wait_for_ds_place(step);
    wait_for_ds_place(step + 1);
    this->write_dv(acc_dv);
    this->write_dk(acc_dk);
  }
};

// All that the thread block has to do.
template <class Traits>
__device__ __forceinline__ void run_head_consumer(const BackwardArguments& arguments,
                                                  typename Traits::SharedStorage& smem,
                                                  int consumer) {
  ConsumerTurns::start(consumer);
  int step = 0;
  HeadStages<Traits> at;
  for_each_work<Traits>(smem, [&](const BackwardWork<Traits>&, int number) {
    HeadConsumer<Traits>(arguments, smem, number, consumer).run(step, at);
    release_work<Traits>(smem, number);
  });
  if (threadIdx.x % kWarpGroupThreads == 0) tma_store_wait<0>();
}

}  // namespace flash_attn2::sm90
