// ConsumerSplit::kKeys: each consumer owns 64 of the tile's keys.
#pragma once

#include "backward_consumer.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct KeysConsumer : BackwardConsumer<Traits> {
  using Base = BackwardConsumer<Traits>;
  using Base::Base, Base::smem, Base::work;
  using typename Base::AccDq, typename Base::AccS, typename Base::Element;

  typename Base::AccDk acc_dk;
  typename Base::AccDv acc_dv;

  // B2 to B7 for one query block. dQ is that of the step before, `last` (none before the first
  // step): by now the other consumer has stored its dS.
  template <bool kFirst>
  __device__ __forceinline__ void take(int step, const QueryStep& last, const QueryStep& at) {
    AccS acc_p, acc_ds;
    this->start_scores(step, acc_p);
    this->start_dp(step, acc_ds);
    finish_gemm<1>(acc_p);
    this->make_probabilities(step, at, acc_p);
    finish_gemm<0>(acc_ds);
    this->make_score_gradients(
        step,
        [&](int i) { return make_float4(acc_p(i), acc_p(i + 1), acc_p(i + 2), acc_p(i + 3)); },
        acc_ds);
    auto p = to_operand_a<Element, typename Base::MmaDv>(acc_p);
    auto ds = to_operand_a<Element, typename Base::MmaDk>(acc_ds);
    AccDq acc_dq;
    if constexpr (!kFirst) {
      this->wait_for_ds(step - 1);
      this->start_dq(step - 1, 0, acc_dq);
    }
    this->start_dv(p, step, acc_dv);
    this->store_score_gradients(ds, step);
    this->start_dk(ds, step, acc_dk);
    if constexpr (!kFirst) {
      finish_gemm<2>(acc_dq);
      this->add_dq(step - 1, last, 0, acc_dq);
    }
    finish_gemm<0>(acc_dv, acc_dk);
    this->release_q(step);
    this->release_dout(step);
  }

  __device__ __forceinline__ void walk() {
    smem.barriers.k_full.wait(0);
    smem.barriers.v_full.wait(0);
    QueryStep at = QueryStep::first(work);
    take<true>(0, at, at);
    CUTE_NO_UNROLL
    for (int step = 1; step < work.steps; ++step) {
      const QueryStep last = at;
      at = at.next(work);
      take<false>(step, last, at);
    }
    AccDq acc_dq;
    this->wait_for_ds(work.steps - 1);
    this->start_dq(work.steps - 1, 0, acc_dq);
    finish_gemm<0>(acc_dq);
    this->add_dq(work.steps - 1, at, 0, acc_dq);
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
