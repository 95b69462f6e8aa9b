// A consumer warpgroup of the sm90 backward: steps B2 to B7, and the store of dK and dV.
#pragma once

#include "dq_accumulator.cuh"

namespace flash_attn2::sm90 {

// A thread's accumulators of a (64 keys, queries) product lie in groups of four: queries (q, q + 1)
// of key r, then of key r + 8. This thread's pairs of LSE or delta: number i for the group of
// accumulator i.
__device__ __forceinline__ const float2* query_pairs(const float* row) {
  return reinterpret_cast<const float2*>(row) + threadIdx.x % 4;
}

// Keeps the compiler from computing what follows from x once, before the loop, to hold it in
// registers that the loop has not got.
__device__ __forceinline__ int recompute(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class Traits>
struct BackwardConsumer {
  using Element = typename Traits::Element;
  using MmaS = typename Traits::MmaS;
  using MmaDk = typename Traits::MmaDk;
  using MmaDv = typename Traits::MmaDv;
  using MmaDq = typename Traits::MmaDq;
  static constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN;
  static constexpr int kKeys = Traits::kKeys, kQueries = Traits::kQueries;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kDkColumns = Traits::kDkColumns, kDvColumns = Traits::kDvColumns;
  using AccS = Accumulator<MmaS, kKeys, kQueries>;
  using AccDq = Accumulator<MmaDq, Traits::kDqRows, Traits::kDqColumns>;
  using Stages = Ring<Traits::kStages>;
  using Scores = Ring<Traits::kScoreBuffers>;

  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const BackwardWork<Traits> work;
  const int consumer, thread;        // thread: inside the warpgroup
  const int first_key, first_query;  // of S^T, inside the tile
  const int dk_part, dv_part;        // columns of dK and dV, in shares
  Accumulator<MmaDk, kKeys, kDkColumns> acc_dk;
  Accumulator<MmaDv, kKeys, kDvColumns> acc_dv;

  __device__ __forceinline__ BackwardConsumer(const BackwardArguments& arguments,
                                              typename Traits::SharedStorage& smem,
                                              const BackwardWork<Traits>& work, int consumer)
      : arguments(arguments),
        smem(smem),
        work(work),
        consumer(consumer),
        thread(threadIdx.x % kWarpGroupThreads),
        first_key(Traits::kSplitKeys ? consumer * kKeys : 0),
        first_query(Traits::kSplitKeys ? 0 : consumer * kQueries),
        dk_part(Traits::kSplitKeys ? 0 : consumer),
        dv_part(dk_part) {}

  // Shared-memory tiles.
  __device__ __forceinline__ auto tile_k() const {
    return smem_tile<kTileN, kHeadDim, Traits::kBoxK>(smem.k);
  }
  __device__ __forceinline__ auto tile_v() const {
    return smem_tile<kTileN, kHeadDimV, Traits::kBoxV>(smem.v);
  }
  __device__ __forceinline__ auto tile_q(int stage) const {
    return smem_tile<kTileM, kHeadDim, Traits::kBoxQ>(smem.q[stage]);
  }
  __device__ __forceinline__ auto tile_dout(int stage) const {
    return smem_tile<kTileM, kHeadDimV, Traits::kBoxV>(smem.dout[stage]);
  }
  __device__ __forceinline__ auto tile_p(int buffer) const {
    return smem_tile<kTileM, kTileN>(smem.p[buffer]);
  }
  __device__ __forceinline__ auto tile_ds(int buffer) const {
    return smem_tile<kTileM, kTileN>(smem.ds[buffer]);
  }

  // B2 to B4: P^T = exp2(S^T * scale - L) with S^T = K Q^T, and dS^T = P^T (dP^T - D) with
  // dP^T = V dO^T.
  __device__ __forceinline__ void make_scores(int step, const QueryStep& at, AccS& acc_p,
                                              AccS& acc_ds) const {
    const Stages ring{uint32_t(step)};
    const int stage = ring.stage();
    const int key_part = recompute(first_key) / kKeys;
    const int query_part = recompute(first_query) / kQueries;
    auto k = operand_a<MmaS>(part<kKeys, kHeadDim>(tile_k(), key_part, 0));
    auto v = operand_a<MmaS>(part<kKeys, kHeadDimV>(tile_v(), key_part, 0));
    const auto q = operand_b<MmaS>(part<kQueries, kHeadDim>(tile_q(stage), query_part, 0));
    const auto dout = operand_b<MmaS>(part<kQueries, kHeadDimV>(tile_dout(stage), query_part, 0));
    smem.barriers.q_full[stage].wait(ring.parity());
    start_gemm<MmaS, Accumulate::kNo>(k, q, acc_p);
    smem.barriers.dout_full[stage].wait(ring.parity());
    start_gemm<MmaS, Accumulate::kNo>(v, dout, acc_ds);

    finish_gemm<1>(acc_p);
    const int row_begin = at.block * kTileM + first_query;
    const int key_begin = recompute(work.key_begin) + first_key;
    const VisibleKeys visible(arguments.params.shape, arguments.params.window);
    if (visible.tile_needs_mask(row_begin, kQueries, key_begin, kKeys)) {
      mask(acc_p, visible, row_begin + thread % 4 * 2,
           key_begin + thread / 32 * 16 + thread % 32 / 4);
    }
    const float scale_log2 = arguments.params.softmax_scale * kLog2e;
    const float2* lse = query_pairs(smem.lse[stage] + first_query);
    CUTE_UNROLL
    for (int i = 0; i < size(acc_p); i += 4) {
      const float2 pair = lse[i];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc_p(i + j) = exp2f(acc_p(i + j) * scale_log2 - (j % 2 == 0 ? pair.x : pair.y));
      }
    }

    finish_gemm<0>(acc_ds);
    const float2* delta = query_pairs(smem.delta[stage] + first_query);
    CUTE_UNROLL
    for (int i = 0; i < size(acc_ds); i += 4) {
      const float2 pair = delta[i];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc_ds(i + j) = acc_p(i + j) * (acc_ds(i + j) - (j % 2 == 0 ? pair.x : pair.y));
      }
    }
  }

  // Boundary tiles: hidden entries of S^T become -inf. (query, key) is this thread's first entry.
  __device__ __forceinline__ static void mask(AccS& acc, const VisibleKeys& visible, int query,
                                              int key) {
    CUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const BlockRange rows = visible.rows_of_key(key + 8 * j);
      const int begin = rows.begin - query, end = rows.end - query;
      CUTE_UNROLL
      for (int i = 0; i < kQueries / 8; ++i) {
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          if (8 * i + c < begin || 8 * i + c >= end) acc(4 * i + 2 * j + c) = -INFINITY;
        }
      }
    }
  }

  // This consumer's (keys, queries) part of P^T or dS^T to a (queries, keys) tile.
  template <class Fragment, class Tile>
  __device__ __forceinline__ void store_scores(const Fragment& scores, const Tile& tile) const {
    const StoreLane lane = StoreLane::columns();
    Element* target =
        &tile(first_query + lane.column, recompute(first_key) + thread / 32 * 16 + lane.row);
    CUTE_UNROLL
    for (int block = 0; block < kQueries / 16; ++block) {  // the swizzle repeats every 8 rows
      store_block<SM90_U16x8_STSM_T>(scores, block, target + 16 * block * kBoxColumns<kTileN>);
    }
  }

  // The step's scores are stored.
  __device__ __forceinline__ void publish_scores(int step) const {
    cutlass::arch::fence_view_async_shared();
    arrive_as_warp(smem.barriers.scores_full[Scores{uint32_t(step)}.stage()]);
  }
  __device__ __forceinline__ void wait_for_scores(int step) const {
    const Scores ring{uint32_t(step)};
    smem.barriers.scores_full[ring.stage()].wait(ring.parity());
  }

  // B5: dV += P^T dO. `p`: P^T as the A operand.
  template <class P>
  __device__ __forceinline__ void start_dv(P& p, int step) {
    const auto dout = operand_b<MmaDv>(part<kDvColumns, kTileM>(
        transposed(tile_dout(Stages{uint32_t(step)}.stage())), dv_part, 0));
    start_gemm<MmaDv, Accumulate::kYes>(p, dout, acc_dv);
  }
  // B6: dK += dS^T Q. `ds`: dS^T as the A operand.
  template <class Ds>
  __device__ __forceinline__ void start_dk(Ds& ds, int step) {
    const auto q = operand_b<MmaDk>(
        part<kDkColumns, kTileM>(transposed(tile_q(Stages{uint32_t(step)}.stage())), dk_part, 0));
    start_gemm<MmaDk, Accumulate::kYes>(ds, q, acc_dk);
  }
  // B7: this consumer's half of dQ = dS K, over all keys of the tile.
  __device__ __forceinline__ void start_dq(int step, AccDq& acc_dq) const {
    const int buffer = Scores{uint32_t(step)}.stage();
    const int half = recompute(consumer);
    auto ds = operand_a<MmaDq>(
        part<Traits::kDqRows, kTileN>(tile_ds(buffer), Traits::kSplitDqRows ? half : 0, 0));
    const auto k = operand_b<MmaDq>(
        part<Traits::kDqColumns, kTileN>(transposed(tile_k()), Traits::kSplitDqRows ? 0 : half, 0));
    start_gemm<MmaDq, Accumulate::kNo>(ds, k, acc_dq);
  }

  __device__ __forceinline__ void add_dq(int step, const QueryStep& at, const AccDq& acc_dq) const {
    const BackwardParams& params = arguments.params;
    const bool ordered = params.dq_turn != nullptr;
    if (ordered) smem.barriers.turn_come.wait(step & 1);
    add_to_dq(
        params.dq_accum + query_tile<Traits>(params, work.coord.batch, at) * Traits::kDqElements,
        acc_dq, consumer);
    if (ordered) arrive_as_warp(smem.barriers.turn_used);
  }

  // ConsumerSplit::kKeys. dQ is that of the step before, `last` (none before the first step): by
  // now the other consumer has stored its dS.
  template <bool kFirst>
  __device__ __forceinline__ void step_of_keys(int step, const QueryStep& last,
                                               const QueryStep& at) {
    AccS acc_p, acc_ds;
    make_scores(step, at, acc_p, acc_ds);
    auto p = to_operand_a<Element, MmaDv>(acc_p);
    auto ds = to_operand_a<Element, MmaDk>(acc_ds);
    AccDq acc_dq;
    if constexpr (!kFirst) {
      wait_for_scores(step - 1);
      start_dq(step - 1, acc_dq);
    }
    start_dv(p, step);
    store_scores(ds, tile_ds(Scores{uint32_t(step)}.stage()));
    publish_scores(step);
    start_dk(ds, step);
    if constexpr (!kFirst) {
      finish_gemm<2>(acc_dq);
      add_dq(step - 1, last, acc_dq);
    }
    finish_gemm<0>(acc_dv, acc_dk);
    arrive_as_warp(smem.barriers.stage_empty[Stages{uint32_t(step)}.stage()]);
  }

  __device__ __forceinline__ void walk_of_keys() {
    QueryStep at = QueryStep::first(work);
    step_of_keys<true>(0, at, at);
    CUTE_NO_UNROLL
    for (int step = 1; step < work.steps; ++step) {
      const QueryStep last = at;
      at = at.next(work.blocks);
      step_of_keys<false>(step, last, at);
    }
    AccDq acc_dq;
    wait_for_scores(work.steps - 1);
    start_dq(work.steps - 1, acc_dq);
    finish_gemm<0>(acc_dq);
    add_dq(work.steps - 1, at, acc_dq);
  }

  // ConsumerSplit::kColumns.
  __device__ __forceinline__ void walk_of_columns() {
    QueryStep at = QueryStep::first(work);
    CUTE_NO_UNROLL
    for (int step = 0; step < work.steps; ++step, at = at.next(work.blocks)) {
      const int buffer = Scores{uint32_t(step)}.stage();
      {
        AccS acc_p, acc_ds;
        make_scores(step, at, acc_p, acc_ds);
        store_scores(to_operand_a<Element, ScoreOperand>(acc_p), tile_p(buffer));
        store_scores(to_operand_a<Element, ScoreOperand>(acc_ds), tile_ds(buffer));
      }
      publish_scores(step);
      wait_for_scores(step);
      AccDq acc_dq;
      auto p = operand_a<MmaDv>(transposed(tile_p(buffer)));
      auto ds = operand_a<MmaDk>(transposed(tile_ds(buffer)));
      start_dv(p, step);
      start_dq(step, acc_dq);
      start_dk(ds, step);
      finish_gemm<1>(acc_dv, acc_dq);
      add_dq(step, at, acc_dq);
      finish_gemm<0>(acc_dk);
      arrive_as_warp(smem.barriers.stage_empty[Stages{uint32_t(step)}.stage()]);
    }
  }

  // B8: this consumer's part of dK or dV, over that of K or V.
  template <int kBox, class Acc, class Tile>
  __device__ __forceinline__ void write_key_gradient(const CUtensorMap& map, const Acc& acc,
                                                     const Tile& tile, int first_column) const {
    constexpr int kColumns = decltype(size<0, 2>(acc))::value * 8;
    const StoreLane lane = StoreLane::rows();
    const auto values = to_operand_a<Element, ScoreOperand>(acc);
    const int row = first_key + thread / 32 * 16 + lane.row;
    CUTE_UNROLL
    for (int block = 0; block < kColumns / 16; ++block) {
      store_block<SM90_U32x4_STSM_N>(values, block,
                                     &tile(row, first_column + 16 * block + lane.column));
    }
    cutlass::arch::fence_view_async_shared();
    sync_consumer(consumer);
    if (thread == 0) {
      tma_store<kTileN, kColumns, kBox>(
          map, &tile(first_key, first_column),
          {work.key_begin + first_key, work.coord.head, work.coord.batch, first_column});
    }
  }

  __device__ __forceinline__ void run() {
    clear(acc_dk);
    clear(acc_dv);
    if (work.steps > 0) {
      smem.barriers.k_full.wait(0);
      smem.barriers.v_full.wait(0);
      if constexpr (Traits::kSplitKeys) {
        walk_of_keys();
      } else {
        walk_of_columns();
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < size(acc_dk); ++i) acc_dk(i) *= arguments.params.softmax_scale;
    sync_consumers();  // both are done with K and V
    write_key_gradient<Traits::kBoxV>(arguments.dv, acc_dv, tile_v(), dv_part * kDvColumns);
    write_key_gradient<Traits::kBoxK>(arguments.dk, acc_dk, tile_k(), dk_part * kDkColumns);
    if (thread == 0) tma_store_wait<0>();  // shared memory has to outlive them
  }

 private:
  // Any product with A in registers: where a conversion's result is stored, not multiplied.
  using ScoreOperand = RegisterMma<Element, kKeys, 64, Major::MN>;
};

}  // namespace flash_attn2::sm90
