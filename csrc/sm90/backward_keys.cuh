// ConsumerSplit::kKeys: each consumer owns 64 of the tile's keys.
#pragma once

#include "backward_registers.cuh"

namespace flash_attn2::sm90 {

// The consumers take turns with a part of each step. Left alone they fall into step: both wait for
// products, then both for exponentials.
template <class Traits>
struct KeysConsumer : RegisterConsumer<Traits> {
  using Base = RegisterConsumer<Traits>;
  using Base::Base, Base::smem, Base::work, Base::consumer;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  // A thread's values of dS, and how many of them are made before dQ and dV are started; the rest
  // is made under these two. Only d64, with 128 queries a step, has registers to spare for it.
  static constexpr int kValues = size(AccS{});
  static constexpr int kEarlyGradients = Traits::kTileM == 128 ? kValues * 5 / 8 : kValues;

  // The part: S and P, or P, dS and the start of dQ and dV. Found by trying.
  static constexpr bool kScoresInTurn = Traits::kHeadDim < 128;

  typename Base::AccDk acc_dk;
  typename Base::AccDv acc_dv;

  // B2 to B7 for one query tile; returns its index. dQ is that of the step before, of the tile
  // `last_tile` (none before the first step): by now the other consumer has stored its dS.
  template <bool kFirst>
  __device__ __forceinline__ int take(int step, int last_tile) {
    AccS acc_p, acc_ds;
    if constexpr (kScoresInTurn) ConsumerTurns::wait(consumer);
    QueryTile tile = this->start_scores(step, acc_p);
    this->start_dp(step, acc_ds);
    finish_gemm<1>(acc_p);
    if constexpr (!kScoresInTurn) ConsumerTurns::wait(consumer);
    tile = share(tile);
    this->make_probabilities(step, tile, acc_p);
    if constexpr (kScoresInTurn) ConsumerTurns::pass(consumer);
    finish_gemm<0>(acc_ds);
    const auto probabilities = [&](int i) {
      return make_float4(acc_p(i), acc_p(i + 1), acc_p(i + 2), acc_p(i + 3));
    };
    this->template make_score_gradients<0, kEarlyGradients>(step, probabilities, acc_ds);
    auto p = to_operand_a<Element, typename Base::MmaDv>(acc_p);
    AccDq acc_dq;
    if constexpr (!kFirst) {
      this->wait_for_ds(step - 1);
      this->start_dq(step - 1, acc_dq);
    }
    this->start_dv(p, step, acc_dv);
    if constexpr (!kScoresInTurn) ConsumerTurns::pass(consumer);
    CUTE_UNROLL
    for (int i = kEarlyGradients; i < size(acc_ds); ++i) {
      asm volatile("" : "+f"(acc_ds(i)));  // else the compiler moves the rest to the first part
    }
    this->template make_score_gradients<kEarlyGradients, kValues>(step, probabilities, acc_ds);
    auto ds = to_operand_a<Element, typename Base::MmaDk>(acc_ds);
    this->store_score_gradients(ds, step);
    this->start_dk(ds, step, acc_dk);
    if constexpr (!kFirst) {
      finish_gemm<2>(acc_dq);
      this->add_dq(step - 1, this->dq_target(last_tile), acc_dq);
    }
    finish_gemm<0>(acc_dv, acc_dk);
    this->release_q(step);
    this->release_dout(step);
    return tile.sums;
  }

  __device__ __forceinline__ void walk() {
    smem.barriers.k_full.wait(0);
    smem.barriers.v_full.wait(0);
    ConsumerTurns::start(consumer);
    int tile = take<true>(0, 0);
    CUTE_NO_UNROLL
    for (int step = 1; step < work.steps; ++step) tile = take<false>(step, tile);
    AccDq acc_dq;
    this->wait_for_ds(work.steps - 1);
    this->start_dq(work.steps - 1, acc_dq);
    finish_gemm<0>(acc_dq);
    this->add_dq(work.steps - 1, this->dq_target(tile), acc_dq);
  }

  __device__ __forceinline__ void run() {
    clear(acc_dk);
    clear(acc_dv);
    if (work.steps > 0) walk();
    this->wait_for_both();
    this->write_dv(acc_dv);
    this->write_dk(acc_dk);
    this->wait_for_stores();
  }
};

}  // namespace flash_attn2::sm90
