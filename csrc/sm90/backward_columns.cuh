// ConsumerSplit::kColumns: for head dims whose dK and dV fill the registers of both warpgroups. A
// consumer makes P and dS of half of the keys, and sums half of the columns of dK and dV over all
// keys of the tile; P and dS go through shared memory. One wgmma takes 64 of these columns: of an
// odd number of such groups, each consumer has half of the keys of the one in the middle.
//
// What is added to dQ is what limits these kernels, and then the loads of Q and dO. So two thread
// blocks with neighbouring keys form a cluster: Q and dO are loaded once for both, and they
// exchange dS, with which each sums half of the columns of dQ over the keys of both.
//
// dK and dV are summed transposed, (columns, keys): so a tile may have any multiple of 16 keys, and
// the more it has the fewer bytes are added to dQ.
#pragma once

#include "backward_consumer.cuh"
#include "mask.cuh"

namespace flash_attn2::sm90 {

// A consumer's share of a (columns, keys) gradient: of kOuter columns all keys, and of the 64 in
// the middle, if there are any, its half of the keys.
template <class Traits, int kColumns_>
struct GradientShare {
  static constexpr int kColumns = kColumns_, kOuter = kColumns / 128 * 64;
  static constexpr bool kMiddle = kColumns % 128 != 0;
  static_assert(kColumns % 64 == 0);
  template <int kKeys>
  using Mma = SmemMma<typename Traits::Element, 64, kKeys, Major::MN, Major::K>;
  using MmaOuter = Mma<Traits::kTileN>;
  using MmaMiddle = Mma<Traits::kKeys>;

  Accumulator<MmaOuter, kOuter, Traits::kTileN> outer;
  Accumulator<MmaMiddle, 64, Traits::kKeys> middle;  // not used if there are none

  // Where the outer columns lie, in units of kOuter.
  __device__ __forceinline__ static int outer_index(int consumer) {
    return consumer * (kColumns / kOuter - 1);
  }
  __device__ __forceinline__ void clear() {
    cute::clear(outer);
    if constexpr (kMiddle) cute::clear(middle);
  }
  __device__ __forceinline__ void scale(float factor) {
    CUTE_UNROLL
    for (int i = 0; i < size(outer); ++i) outer(i) *= factor;
    CUTE_UNROLL
    for (int i = 0; kMiddle && i < size(middle); ++i) middle(i) *= factor;
  }
};

template <class Traits>
struct ColumnsConsumer : BackwardConsumer<Traits> {
  using Base = BackwardConsumer<Traits>;
  using Base::arguments, Base::smem, Base::consumer, Base::thread;
  using Base::Base, Base::kTileM, Base::kTileN, Base::kHeadDim, Base::kHeadDimV, Base::kKeys;
  using typename Base::AccDq, typename Base::Element;
  static_assert(kTileM == 64 && Traits::kCluster == 2);
  using MmaS = SmemMma<Element, kTileM, kKeys, Major::K, Major::K>;  // S, dP
  using AccS = Accumulator<MmaS, kTileM, kKeys>;

  GradientShare<Traits, kHeadDim> dk;
  GradientShare<Traits, kHeadDimV> dv;

  // (keys, queries) tiles: P and dS as the B operands of dV^T and dK^T.
  __device__ __forceinline__ auto tile_p() const {
    return smem_tile<kTileN, kTileM>(smem.columns.p);
  }
  __device__ __forceinline__ auto tile_ds_by_keys() const {
    return smem_tile<kTileN, kTileM>(smem.ds);
  }
  // The first of the thread's two rows of a (64 queries, keys) product; the other is 8 further.
  __device__ __forceinline__ int thread_row() const { return thread / 32 * 16 + thread % 32 / 4; }
  __device__ __forceinline__ int first_key() const { return recompute(consumer) * kKeys; }

  // Starts S = Q K^T (B2). Returns the step's query tile, for `share`.
  __device__ __forceinline__ QueryTile start_scores(int step, AccS& acc) const {
    auto q = operand_a<MmaS>(this->tile_q(step));
    const auto k = operand_b<MmaS>(part<kKeys, kHeadDim>(this->tile_k(), recompute(consumer), 0));
    this->wait_for_q(step);
    const QueryTile tile = this->read_query_tile(step);
    start_gemm<MmaS, Accumulate::kNo>(q, k, acc);
    return tile;
  }
  // Starts dP = dO V^T (B3).
  __device__ __forceinline__ void start_dp(int step, AccS& acc) const {
    // Descriptors from before the loop would not fit the uniform registers.
    const int zero = opaque_zero();
    auto dout = operand_a<MmaS>(smem_tile<kTileM, kHeadDimV>(smem.dout[zero]));
    const auto v = operand_b<MmaS>(part<kKeys, kHeadDimV>(this->tile_v(), consumer + zero, 0));
    this->wait_for_dout(step);
    start_gemm<MmaS, Accumulate::kNo>(dout, v, acc);
  }

  // The rest of B2: P = exp2(S * scale - L), in place and to shared memory.
  __device__ __forceinline__ void finish_scores(int step, const QueryTile& tile, AccS& acc) const {
    if (tile.masked(recompute(consumer))) {
      const VisibleKeys visible(arguments.params.shape, arguments.params.window);
      const int row = tile.row_begin() + thread_row(),
                key = this->work().key_begin + first_key() + thread % 4 * 2;
      hide_columns(acc, [&](int j) {
        return BlockRange{visible.first(row + 8 * j) - key, visible.end(row + 8 * j) - key};
      });
    }
    const float scale_log2 = arguments.params.softmax_scale * kLog2e;
    const float* lse = this->lse(step) + thread_row();
    const float lse_of_row[2] = {lse[0], lse[8]};
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) {
      acc(i) = exp2f(acc(i) * scale_log2 - lse_of_row[i / 2 % 2]);
    }
    store_scores(acc, tile_p());
  }

  // B4: dS = P (dP - D), in place of dP and to shared memory.
  __device__ __forceinline__ void make_score_gradients(int step, const AccS& p, AccS& acc) const {
    const float* delta = this->delta(step) + thread_row();
    const float delta_of_row[2] = {delta[0], delta[8]};
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) acc(i) = p(i) * (acc(i) - delta_of_row[i / 2 % 2]);
    smem.barriers.ds_empty[0].wait(step & 1 ^ 1);
    store_scores(acc, tile_ds_by_keys());
    arrive_as_warp(smem.barriers.ds_full[0], thread);
  }

  // This consumer's (queries, keys) part of P or dS, rounded, to the (keys, queries) tile.
  template <class Tile>
  __device__ __forceinline__ void store_scores(const AccS& acc, const Tile& tile) const {
    const auto values = rounded<Element>(acc);
    const StoreLane lane = StoreLane::columns(thread);
    Element* target = &tile(first_key() + int(lane.column), thread / 32 * 16 + int(lane.row));
    CUTE_UNROLL
    for (int block = 0; block < kKeys / 16; ++block) {  // the swizzle repeats every 8 rows
      store_block<SM90_U16x8_STSM_T>(values, block, target + 16 * block * kTileM);
    }
    if constexpr (kKeys % 16 != 0) {
      store_half_block<SM90_U16x4_STSM_T>(values, kKeys / 16, target + kKeys / 16 * 16 * kTileM);
    }
  }

  // Starts gradient += rows^T scores. `rows`: the (queries, columns) tile of Q or dO. `scores`: the
  // (keys, queries) tile of P or dS.
  template <class Share, class Rows, class Scores>
  __device__ __forceinline__ void start_gradient(Share& share, const Rows& rows,
                                                 const Scores& scores) {
    using Outer = typename Share::MmaOuter;
    using Middle = typename Share::MmaMiddle;
    const auto columns = transposed(rows);
    auto outer = operand_a<Outer>(
        part<Share::kOuter, kTileM>(columns, Share::outer_index(recompute(consumer)), 0));
    const auto keys = operand_b<Outer>(scores);
    issue_gemm<Outer, Accumulate::kYes>(outer, keys, share.outer);
    if constexpr (Share::kMiddle) {
      auto middle = operand_a<Middle>(part<64, kTileM>(columns, Share::kOuter / 64, 0));
      const auto own_keys = operand_b<Middle>(part<kKeys, kTileM>(scores, recompute(consumer), 0));
      issue_gemm<Middle, Accumulate::kYes>(middle, own_keys, share.middle);
    }
    warpgroup_commit_batch();
  }
  template <int kGroups, class Share>
  __device__ __forceinline__ static void finish_gradient(Share& share) {
    if constexpr (Share::kMiddle) {
      finish_gemm<kGroups>(share.outer, share.middle);
    } else {
      finish_gemm<kGroups>(share.outer);
    }
  }
  // Starts dV^T += dO^T P (B5), after wait_for_ds: a consumer stores P before dS.
  __device__ __forceinline__ void start_dv(int step) {
    start_gradient(dv, this->tile_dout(step), tile_p());
  }
  // Starts dK^T += Q^T dS (B6).
  __device__ __forceinline__ void start_dk(int step) {
    start_gradient(dk, this->tile_q(step), tile_ds_by_keys());
  }

  // Goes on with dQ: the other thread block's keys.
  __device__ __forceinline__ void start_peer_dq(int step, AccDq& acc) const {
    smem.barriers.peer_ds_full.wait(step & 1);
    auto ds = operand_a<typename Base::MmaDq>(
        transposed(smem_tile<kTileN, kTileM>(smem.columns.peer_ds)));
    const auto tile =
        smem_tile<kTileN, kHeadDim / Traits::kCluster, Traits::kBoxK>(smem.columns.peer_k);
    const auto k = operand_b<typename Base::MmaDq>(
        part<Traits::kDqColumns, kTileN>(transposed(tile), recompute(consumer), 0));
    start_gemm<typename Base::MmaDq, Accumulate::kYes>(ds, k, acc);
  }

  // B5 to B7 of a step whose P and dS are stored and, except in the last, B2 to B4 of the next one.
  // dS is on its way to the other thread block under three products. What is added to dQ leaves the
  // SM slowly. Until then it holds up the warp's accesses to shared memory and whoever writes a
  // register that it comes from, so it is added where products wait in line. `target`, for dQ of
  // query tile `tile`, is carried from step to step, as registers of its own are never in the way.
  // acc_p: P of the next step then.
  template <bool kLast>
  __device__ __forceinline__ void take(int step, AccS& acc_p, int& tile, float*& target) {
    AccDq acc_dq;
    this->wait_for_ds(step);
    start_dv(step);
    this->start_dq(step, acc_dq);
    start_dk(step);
    finish_gradient<2>(dv);
    this->release_dout(step);
    start_peer_dq(step, acc_dq);
    if constexpr (kLast) {
      finish_gradient<1>(dk);
      finish_gemm<0>(acc_dq);
      this->add_dq(step, target, acc_dq);
    } else {
      QueryTile next = start_scores(step + 1, acc_p);
      finish_gradient<2>(dk);
      this->release_q(step);
      finish_gemm<1>(acc_dq);
      this->add_dq(step, target, acc_dq);
      arrive_at_all<Traits::kCluster>(smem.barriers.ds_empty[0], thread, this->rank);
      AccS acc_ds;
      start_dp(step + 1, acc_ds);
      finish_gemm<1>(acc_p);
      next = share(next);
      target += int64_t(next.sums - tile) * Traits::kDqElements;
      tile = next.sums;
      finish_scores(step + 1, next, acc_p);
      finish_gemm<0>(acc_ds);
      make_score_gradients(step + 1, acc_p, acc_ds);
    }
  }

  __device__ __forceinline__ void walk() {
    // Through a shuffle, by which ptxas knows that all threads have the same number.
    const int last = __shfl_sync(0xffffffffu, this->work().steps - 1, 0);
    AccS acc_p, acc_ds;
    smem.barriers.k_full.wait(0);
    const QueryTile first = start_scores(0, acc_p);
    smem.barriers.v_full.wait(0);
    start_dp(0, acc_ds);
    finish_gemm<1>(acc_p);
    const QueryTile at = share(first);
    int tile = at.sums;
    float* target = this->dq_target(tile);
    finish_scores(0, at, acc_p);
    finish_gemm<0>(acc_ds);
    make_score_gradients(0, acc_p, acc_ds);
    smem.barriers.peer_k_full.wait(0);
    CUTE_NO_UNROLL
    for (int step = 0; step < last; ++step) take<false>(step, acc_p, tile, target);
    take<true>(last, acc_p, tile, target);
  }

  // B8: (columns, keys) results, rounded, to the tile from (key, column) on.
  template <int kKeysOfPart, class Acc, class Tile>
  __device__ __forceinline__ void write_columns(const Acc& acc, const Tile& tile, int key,
                                                int column) const {
    constexpr int kBlocks = kKeysOfPart / 16;
    static_assert(kKeysOfPart % 16 == 0);
    const auto values = rounded<Element>(acc);
    const StoreLane lane = StoreLane::columns(thread);
    CUTE_UNROLL
    for (int i = 0; i < size(values) / 8; ++i) {
      store_block<SM90_U16x8_STSM_T>(
          values, i,
          &tile(key + i % kBlocks * 16 + lane.column,
                column + i / kBlocks * 64 + thread / 32 * 16 + lane.row));
    }
  }
  // The tile is that of K or V, which nobody reads any more.
  template <int kBox, class Share, class Tile>
  __device__ __forceinline__ void write_gradient(const CUtensorMap& map, const Share& share,
                                                 const Tile& tile) const {
    const int first = Share::outer_index(consumer) * Share::kOuter;
    write_columns<kTileN>(share.outer, tile, 0, first);
    if constexpr (Share::kMiddle) {
      write_columns<kKeys>(share.middle, tile, first_key(), Share::kOuter);
      this->template store_key_gradient<Share::kColumns, kBox, kConsumers>(map, tile, 0, 0);
    } else {
      this->template store_key_gradient<Share::kOuter, kBox>(map, tile, 0, first);
    }
  }

  __device__ __forceinline__ void run() {
    this->make_delta();
    dk.clear();
    dv.clear();
    if (this->work().steps > 0) walk();
    this->wait_for_both();
    write_gradient<kBoxColumns<kHeadDimV>>(arguments.dv, dv, this->tile_v());
    dk.scale(arguments.params.softmax_scale);
    write_gradient<Traits::kBoxK>(arguments.dk, dk, this->tile_k());
    this->wait_for_stores();
  }
};

}  // namespace flash_attn2::sm90
