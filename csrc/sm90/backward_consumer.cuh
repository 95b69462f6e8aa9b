// What the consumer warpgroups of the sm90 backward have in common: steps B2, B4 and B7 of a tile,
// and the store of dK and dV. The walks over the query blocks are in backward_keys.cuh and
// backward_roles.cuh.
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
  static constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kKeys = Traits::kKeys;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  using AccS = Accumulator<MmaS, kKeys, kTileM>;
  using AccDk = Accumulator<MmaDk, kKeys, kHeadDim>;
  using AccDv = Accumulator<MmaDv, kKeys, kHeadDimV>;
  using AccDq = Accumulator<MmaDq, Traits::kDqRows, Traits::kDqColumns>;
  using Stages = Ring<Traits::kStages>;
  using Scores = Ring<Traits::kScoreBuffers>;

  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const BackwardWork<Traits> work;
  const int consumer, thread;  // thread: inside the warpgroup
  const int first_key;         // of this consumer's S^T, inside the tile

  __device__ __forceinline__ BackwardConsumer(const BackwardArguments& arguments,
                                              typename Traits::SharedStorage& smem,
                                              const BackwardWork<Traits>& work, int consumer)
      : arguments(arguments),
        smem(smem),
        work(work),
        consumer(consumer),
        thread(threadIdx.x % kWarpGroupThreads),
        first_key(Traits::kSplitKeys ? consumer * kKeys : 0) {}

  // Shared-memory tiles.
  __device__ __forceinline__ auto tile_k() const {
    return smem_tile<kTileN, kHeadDim, Traits::kBoxK>(smem.k);
  }
  __device__ __forceinline__ auto tile_v() const { return smem_tile<kTileN, kHeadDimV>(smem.v); }
  __device__ __forceinline__ auto tile_q(int stage) const {
    return smem_tile<kTileM, kHeadDim>(smem.q[stage]);
  }
  __device__ __forceinline__ auto tile_dout(int stage) const {
    return smem_tile<kTileM, kHeadDimV>(smem.dout[stage]);
  }
  __device__ __forceinline__ auto tile_ds(int step) const {
    return smem_tile<kTileM, kTileN>(smem.ds[Scores{uint32_t(step)}.stage()]);
  }

  // Starts S^T = K Q^T (B2).
  __device__ __forceinline__ void start_scores(int step, AccS& acc) const {
    const Stages ring{uint32_t(step)};
    auto k = operand_a<MmaS>(part<kKeys, kHeadDim>(tile_k(), recompute(first_key) / kKeys, 0));
    const auto q = operand_b<MmaS>(tile_q(ring.stage()));
    smem.barriers.q_full[ring.stage()].wait(ring.parity());
    start_gemm<MmaS, Accumulate::kNo>(k, q, acc);
  }
  // Starts dP^T = V dO^T (B3).
  __device__ __forceinline__ void start_dp(int step, AccS& acc) const {
    const Stages ring{uint32_t(step)};
    auto v = operand_a<MmaS>(part<kKeys, kHeadDimV>(tile_v(), recompute(first_key) / kKeys, 0));
    const auto dout = operand_b<MmaS>(tile_dout(ring.stage()));
    smem.barriers.dout_full[ring.stage()].wait(ring.parity());
    start_gemm<MmaS, Accumulate::kNo>(v, dout, acc);
  }

  // The rest of B2: P^T = exp2(S^T * scale - L), in place.
  __device__ __forceinline__ void make_probabilities(int step, const QueryStep& at,
                                                     AccS& acc) const {
    const int row_begin = at.block * kTileM;
    const int key_begin = recompute(work.key_begin) + first_key;
    const VisibleKeys visible(arguments.params.shape, arguments.params.window);
    if (visible.tile_needs_mask(row_begin, kTileM, key_begin, kKeys)) {
      mask(acc, visible, row_begin + thread % 4 * 2,
           key_begin + thread / 32 * 16 + thread % 32 / 4);
    }
    const float scale_log2 = arguments.params.softmax_scale * kLog2e;
    const float2* lse = query_pairs(smem.lse[Stages{uint32_t(step)}.stage()]);
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      const float2 pair = lse[i];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc(i + j) = exp2f(acc(i + j) * scale_log2 - (j % 2 == 0 ? pair.x : pair.y));
      }
    }
  }

  // B4: dS^T = P^T (dP^T - D), in place of dP^T. probabilities(i): P^T's values i to i + 3.
  template <class Probabilities>
  __device__ __forceinline__ void make_score_gradients(int step, const Probabilities& probabilities,
                                                       AccS& acc) const {
    const float2* delta = query_pairs(smem.delta[Stages{uint32_t(step)}.stage()]);
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      const float2 pair = delta[i];
      const float4 p = probabilities(i);
      acc(i) = p.x * (acc(i) - pair.x);
      acc(i + 1) = p.y * (acc(i + 1) - pair.y);
      acc(i + 2) = p.z * (acc(i + 2) - pair.x);
      acc(i + 3) = p.w * (acc(i + 3) - pair.y);
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
      for (int i = 0; i < kTileM / 8; ++i) {
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          if (8 * i + c < begin || 8 * i + c >= end) acc(4 * i + 2 * j + c) = -INFINITY;
        }
      }
    }
  }

  // This consumer's (keys, queries) part of dS^T to the (queries, keys) tile.
  template <class Fragment>
  __device__ __forceinline__ void store_score_gradients(const Fragment& ds, int step) const {
    const StoreLane lane = StoreLane::columns();
    const auto tile = tile_ds(step);
    Element* target = &tile(int(lane.column), recompute(first_key) + thread / 32 * 16 + lane.row);
    CUTE_UNROLL
    for (int block = 0; block < kTileM / 16; ++block) {  // the swizzle repeats every 8 rows
      store_block<SM90_U16x8_STSM_T>(ds, block, target + 16 * block * kBoxColumns<kTileN>);
    }
    cutlass::arch::fence_view_async_shared();
    Barrier& full = smem.barriers.ds_full[Scores{uint32_t(step)}.stage()];
    if constexpr (Traits::kSplitKeys) {
      arrive_as_warp(full);
    } else {
      full.arrive();
    }
  }
  __device__ __forceinline__ void wait_for_ds(int step) const {
    const Scores ring{uint32_t(step)};
    smem.barriers.ds_full[ring.stage()].wait(ring.parity());
  }

  // Starts dV += P^T dO (B5). `p`: P^T as the A operand.
  template <class P>
  __device__ __forceinline__ void start_dv(P& p, int step, AccDv& acc) const {
    const auto dout = operand_b<MmaDv>(transposed(tile_dout(Stages{uint32_t(step)}.stage())));
    start_gemm<MmaDv, Accumulate::kYes>(p, dout, acc);
  }
  // Starts dK += dS^T Q (B6). `ds`: dS^T as the A operand.
  template <class Ds>
  __device__ __forceinline__ void start_dk(Ds& ds, int step, AccDk& acc) const {
    const auto q = operand_b<MmaDk>(transposed(tile_q(Stages{uint32_t(step)}.stage())));
    start_gemm<MmaDk, Accumulate::kYes>(ds, q, acc);
  }
  // Starts a part of this consumer's half of dQ = dS K, over all keys of the tile (B7).
  __device__ __forceinline__ void start_dq(int step, int dq_part, AccDq& acc) const {
    const int index = recompute(consumer) * Traits::kDqParts + dq_part;
    auto ds = operand_a<MmaDq>(
        part<Traits::kDqRows, kTileN>(tile_ds(step), Traits::kSplitDqRows ? index : 0, 0));
    const auto k = operand_b<MmaDq>(part<Traits::kDqColumns, kTileN>(
        transposed(tile_k()), Traits::kSplitDqRows ? 0 : index, 0));
    start_gemm<MmaDq, Accumulate::kNo>(ds, k, acc);
  }

  __device__ __forceinline__ void add_dq(int step, const QueryStep& at, int dq_part,
                                         const AccDq& acc) const {
    const BackwardParams& params = arguments.params;
    const bool ordered = params.dq_turn != nullptr;
    if (ordered && dq_part == 0) smem.barriers.turn_come.wait(step & 1);
    add_to_dq(
        params.dq_accum + query_tile<Traits>(params, work.coord.batch, at) * Traits::kDqElements,
        acc, consumer * Traits::kDqParts + dq_part);
    if (ordered && dq_part == Traits::kDqParts - 1) arrive_as_warp(smem.barriers.turn_used);
  }

  // Until both consumers are done with K and V.
  __device__ __forceinline__ void wait_for_both() const {
    arrive_as_warp(smem.barriers.done);
    smem.barriers.done.wait(0);
  }

  // The buffers of Q (and L) or of dO (and D) of a step are no longer needed.
  __device__ __forceinline__ void release_q(int step) const {
    arrive_as_warp(smem.barriers.q_empty[Stages{uint32_t(step)}.stage()]);
  }
  __device__ __forceinline__ void release_dout(int step) const {
    arrive_as_warp(smem.barriers.dout_empty[Stages{uint32_t(step)}.stage()]);
  }

  // B8: this consumer's keys of dK or dV, over those of K or V.
  template <int kBox, class Acc, class Tile>
  __device__ __forceinline__ void write_key_gradient(const CUtensorMap& map, const Acc& acc,
                                                     const Tile& tile) const {
    constexpr int kColumns = decltype(size<1>(tile))::value;
    const StoreLane lane = StoreLane::rows();
    // Any product with A in registers: the conversion's result is stored, not multiplied.
    const auto values = to_operand_a<Element, RegisterMma<Element, kKeys, 64, Major::MN>>(acc);
    const int row = first_key + thread / 32 * 16 + lane.row;
    CUTE_UNROLL
    for (int block = 0; block < kColumns / 16; ++block) {
      store_block<SM90_U32x4_STSM_N>(values, block, &tile(row, 16 * block + lane.column));
    }
    cutlass::arch::fence_view_async_shared();
    sync_consumer(consumer);
    if (thread == 0) {
      tma_store<kTileN, kColumns, kBox>(
          map, &tile(first_key, 0),
          {work.key_begin + first_key, work.coord.head, work.coord.batch});
    }
  }
  __device__ __forceinline__ void write_dv(const AccDv& acc) const {
    write_key_gradient<kBoxColumns<kHeadDimV>>(arguments.dv, acc, tile_v());
  }
  __device__ __forceinline__ void write_dk(AccDk& acc) const {
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) acc(i) *= arguments.params.softmax_scale;
    write_key_gradient<Traits::kBoxK>(arguments.dk, acc, tile_k());
  }
  // Shared memory has to outlive the stores.
  __device__ __forceinline__ void wait_for_stores() const {
    if (thread == 0) tma_store_wait<0>();
  }
};

}  // namespace flash_attn2::sm90
