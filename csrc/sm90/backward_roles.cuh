// ConsumerSplit::kRoles: for head dims whose dK or dV of 64 keys alone fills the registers of a
// warpgroup. One consumer makes P and sums dV, the other makes dS and sums dK; each makes half of
// the columns of dQ.
//
// P goes from the one to the other in fp32, thread to thread: S^T and dP^T lie in the same
// registers of the same thread of a warpgroup. The first consumer runs ahead: its exponentials of a
// step fall under the other's products of the step before.
#pragma once

#include "backward_registers.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct RoleConsumer : RegisterConsumer<Traits> {
  using Base = RegisterConsumer<Traits>;
  using Base::Base, Base::smem, Base::work, Base::thread;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  // This thread's values i to i + 3 of the step's P^T.
  __device__ __forceinline__ float4& shared_p(int i) const {
    return *reinterpret_cast<float4*>(smem.p + (i * kWarpGroupThreads + thread * 4));
  }

  // B7, which is under way.
  __device__ __forceinline__ void finish_dq(int step, int tile, AccDq& acc_dq) const {
    finish_gemm<0>(acc_dq);
    this->add_dq(step, this->dq_target(tile), acc_dq);
  }
};

// P and dV.
template <class Traits>
struct ProbabilityConsumer : RoleConsumer<Traits> {
  using Base = RoleConsumer<Traits>;
  using Base::Base, Base::smem, Base::work;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  typename Base::AccDv acc_dv;

  // Turns S^T into P^T, and shows it to the other consumer, which is known to have read the last
  // one by its dS (wait_for_ds). Returns the index of the query tile.
  __device__ __forceinline__ int finish_scores(int step, QueryTile tile, AccS& acc) const {
    tile = share(tile);
    this->make_probabilities(step, tile, acc);
    this->release_q(step);
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      this->shared_p(i) = make_float4(acc(i), acc(i + 1), acc(i + 2), acc(i + 3));
    }
    announce_p();
    return tile.sums;
  }

  // B5 and B7 of a step whose P^T is in `acc`, and, except in the last, B2 of the next one, whose
  // query tile it returns.
  template <bool kLast>
  __device__ __forceinline__ int take(int step, int tile, AccS& acc) {
    auto p = to_operand_a<Element, typename Base::MmaDv>(acc);
    this->wait_for_dout(step);
    this->start_dv(p, step, acc_dv);
    QueryTile next{0, 0};
    if constexpr (!kLast) next = this->start_scores(step + 1, acc);
    AccDq acc_dq;
    this->wait_for_ds(step);
    this->start_dq(step, acc_dq);
    int next_tile = 0;
    if constexpr (kLast) {
      finish_gemm<1>(acc_dv);
    } else {
      finish_gemm<1>(acc_dv, acc);
      this->release_dout(step);
      next_tile = finish_scores(step + 1, next, acc);
    }
    this->finish_dq(step, tile, acc_dq);
    return next_tile;
  }

  __device__ __forceinline__ void walk() {
    AccS acc;
    smem.barriers.k_full.wait(0);
    const QueryTile first = this->start_scores(0, acc);
    finish_gemm<0>(acc);
    int tile = finish_scores(0, first, acc);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps - 1; ++step) tile = take<false>(step, tile, acc);
    take<true>(work.steps - 1, tile, acc);
  }

  __device__ __forceinline__ void run() {
    clear(acc_dv);
    if (work.steps > 0) walk();
    this->wait_for_both();
    this->write_dv(acc_dv);
    this->wait_for_stores();
  }
};

// dS and dK.
template <class Traits>
struct GradientConsumer : RoleConsumer<Traits> {
  using Base = RoleConsumer<Traits>;
  using Base::Base, Base::smem, Base::work;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  typename Base::AccDk acc_dk;

  // B4, B6 and B7 of a step whose dP^T is in `acc`, and, except in the last, B3 of the next one.
  template <bool kLast>
  __device__ __forceinline__ void take(int step, AccS& acc) {
    wait_for_p();
    this->template make_score_gradients<0, size(AccS{})>(
        step, [&](int i) { return this->shared_p(i); }, acc);
    this->release_dout(step);
    auto ds = to_operand_a<Element, typename Base::MmaDk>(acc);
    this->store_score_gradients(ds, step);
    this->wait_for_q(step);
    this->start_dk(ds, step, acc_dk);
    if constexpr (!kLast) this->start_dp(step + 1, acc);
    AccDq acc_dq;
    this->wait_for_ds(step);
    this->start_dq(step, acc_dq);
    if constexpr (kLast) {
      finish_gemm<1>(acc_dk);
    } else {
      finish_gemm<1>(acc_dk, acc);
    }
    const int tile = share(this->read_query_tile(step)).sums;
    this->release_q(step);
    this->finish_dq(step, tile, acc_dq);
  }

  __device__ __forceinline__ void walk() {
    AccS acc;
    smem.barriers.k_full.wait(0);
    smem.barriers.v_full.wait(0);
    this->start_dp(0, acc);
    finish_gemm<0>(acc);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps - 1; ++step) take<false>(step, acc);
    take<true>(work.steps - 1, acc);
  }

  __device__ __forceinline__ void run() {
    clear(acc_dk);
    if (work.steps > 0) walk();
    this->wait_for_both();
    this->write_dk(acc_dk);
    this->wait_for_stores();
  }
};

}  // namespace flash_attn2::sm90
