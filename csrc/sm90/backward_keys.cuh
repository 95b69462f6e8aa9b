// ConsumerSplit::kKeys: each consumer owns 64 of the tile's keys.
#pragma once

#include "backward_registers.cuh"

namespace flash_attn2::sm90 {

// The consumers take turns with a part of each step. Left alone they fall into step: both wait for
// products, then both for exponentials.
template <class Traits>
struct KeysConsumer : RegisterConsumer<Traits> {
  using Base = RegisterConsumer<Traits>;
  using Base::Base, Base::smem, Base::number, Base::consumer;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  // A thread's values of dS, and how many of them are made before dQ and dV are started; the rest
  // is made under these two. Only d64, with 128 queries a step, has registers to spare for it.
  static constexpr int kValues = size(AccS{});
  static constexpr int kEarlyGradients = Traits::kTileM == 128 ? kValues * 5 / 8 : kValues;

  // The part: S and P, or P, dS and the start of dQ and dV. Found by trying.
  static constexpr bool kScoresInTurn = Traits::kHeadDim < 128;

  typename Base::AccDk acc_dk;
  typename Base::AccDv acc_dv;

  // B2 to B7 for one query tile; returns its QueryTile::sums. Steps are counted over all work. dQ
  // is that of the step before, of the tile `last_tile` (none before the first step of the work):
  // by now the other consumer has stored its dS.
  template <bool kFirst>
  __device__ __forceinline__ int take(int step, int last_tile) {
    AccS acc_p, acc_ds;
    if constexpr (kScoresInTurn) ConsumerTurns::wait(consumer);
    QueryTile tile = this->start_scores(step, acc_p);
    this->start_dp(step, acc_ds);
    finish_gemm<1>(acc_p);
    if constexpr (!kScoresInTurn) ConsumerTurns::wait(consumer);
    tile = share(tile);
    this->make_probabilities([&] { return typename Base::LsePairs(this->lse(step), this->thread); },
                             tile.masked(recompute(consumer)), tile.row_begin(), acc_p);
    if constexpr (kScoresInTurn) ConsumerTurns::pass(consumer);
    finish_gemm<0>(acc_ds);
    const LoadedPairs delta(this->delta(step), this->thread);
    const auto probabilities = [&](int i) {
      return make_float4(acc_p(i), acc_p(i + 1), acc_p(i + 2), acc_p(i + 3));
    };
    this->template make_score_gradients<0, kEarlyGradients>(delta, probabilities, acc_ds);
    auto p = to_operand_a<Element, typename Base::MmaDv>(acc_p);
    AccDq acc_dq;
    if constexpr (!kFirst) {
      this->wait_for_ds(step - 1);
      this->start_dq(step - 1, acc_dq);
    }
    this->start_dv(p, this->tile_dout(step), acc_dv);
    if constexpr (!kScoresInTurn) ConsumerTurns::pass(consumer);
    CUTE_UNROLL
    for (int i = kEarlyGradients; i < size(acc_ds); ++i) {
      asm volatile("" : "+f"(acc_ds(i)));  // else the compiler moves the rest to the first part
    }
    this->template make_score_gradients<kEarlyGradients, kValues>(delta, probabilities, acc_ds);
    auto ds = to_operand_a<Element, typename Base::MmaDk>(acc_ds);
    if constexpr (kFirst) this->wait_for_gradients();
    this->store_score_gradients(ds, step);
    this->start_dk(ds, this->tile_q(step), acc_dk);
    if constexpr (!kFirst) {
      finish_gemm<2>(acc_dq);
      this->add_dq(step - 1, this->dq_target(last_tile), acc_dq);
    }
    finish_gemm<0>(acc_dv, acc_dk);
    this->release_q(step);
    this->release_dout(step);
    return tile.sums;
  }

  // All steps, from number `step` on; counts them.
  __device__ __forceinline__ void walk(int& step) {
    int tile = take<true>(step, 0);
    CUTE_NO_UNROLL
    while (!QueryTile::is_last(tile)) tile = take<false>(++step, tile);
    AccDq acc_dq;
    this->wait_for_ds(step);
    this->start_dq(step, acc_dq);
    finish_gemm<0>(acc_dq);
    this->add_dq(step, this->dq_target(QueryTile::place(tile)), acc_dq);
    ++step;
  }

  __device__ __forceinline__ void run(int& step) {
    this->make_delta();
    clear(acc_dk);
    clear(acc_dv);
    smem.barriers.k_full.wait(number & 1);
    smem.barriers.v_full.wait(number & 1);
    if (this->work().steps > 0) {
      walk(step);
    } else {
      this->wait_for_gradients();
    }
    this->wait_for_both();
    this->write_dv(acc_dv);
    this->write_dk(acc_dk);
  }
};

// All that the thread block has to do.
template <class Traits>
__device__ __forceinline__ void run_keys_consumer(const BackwardArguments& arguments,
                                                  typename Traits::SharedStorage& smem,
                                                  int consumer) {
  ConsumerTurns::start(consumer);
  int step = 0;
  const bool is_first = threadIdx.x % kWarpGroupThreads == 0;
  for_each_work<Traits>(smem, [&](const BackwardWork<Traits>&, int number) {
    KeysConsumer<Traits>(arguments, smem, number, consumer).run(step);
    release_work<Traits>(smem, number);
  });
  if (is_first) tma_store_wait<0>();
}

}  // namespace flash_attn2::sm90
