// Consumers with (keys, queries) products: P^T and dS^T of a thread are also the A operands, in
// registers, of dV and dK. Steps B2 to B6 of a tile and the store of dK and dV; the walk over the
// query tiles is in backward_keys.cuh and backward_head.cuh.
#pragma once

#include "backward_consumer.cuh"
#include "mask.cuh"

namespace flash_attn2::sm90 {

// A thread's accumulators of a (64 keys, queries) product lie in groups of four: queries (q, q + 1)
// of key r, then of key r + 8. This thread's pairs of LSE or delta: (i) for the group of
// accumulator i.
struct LoadedPairs {
  const float2* pairs;

  __device__ __forceinline__ LoadedPairs(const float* row, int thread)
      : pairs(reinterpret_cast<const float2*>(row) + unsigned(thread) % 4) {}
  __device__ __forceinline__ float2 operator()(int i) const { return pairs[i]; }
};

// The same, loaded at once.
template <int kQueries>
struct HeldPairs {
  float2 pairs[kQueries / 8];

  __device__ __forceinline__ HeldPairs(const float* row, int thread) {
    const LoadedPairs loaded(row, thread);
    CUTE_UNROLL
    for (int i = 0; i < kQueries / 8; ++i) pairs[i] = loaded(4 * i);
  }
  __device__ __forceinline__ float2 operator()(int i) const { return pairs[i / 4]; }
};

// The same where registers are so scarce that pairs loaded ahead would spill: the 8 lanes that need
// the same pairs load an eighth of them each, and pass them around when they are needed. Value k of
// the pairs is with lane group k % 8.
template <int kQueries>
struct ShuffledPairs {
  float values[kQueries / 32];
  int quad;

  __device__ __forceinline__ ShuffledPairs(const float* row, int thread) : quad(thread % 4) {
    const unsigned lane = unsigned(thread) % 32;
    const float* first = row + (lane / 8 * 8 + lane / 4 % 2 + lane % 4 * 2);
    CUTE_UNROLL
    for (int i = 0; i < kQueries / 32; ++i) values[i] = first[32 * i];
  }
  __device__ __forceinline__ float value(int k) const {
    return __shfl_sync(0xffffffffu, values[k / 8], k % 8 * 4 + quad);
  }
  __device__ __forceinline__ float2 operator()(int i) const {
    return make_float2(value(i / 2), value(i / 2 + 1));
  }
};

template <class Traits>
struct RegisterConsumer : BackwardConsumer<Traits> {
  using Base = BackwardConsumer<Traits>;
  using Base::arguments, Base::smem, Base::number, Base::consumer, Base::thread;
  using Base::Base, Base::kTileM, Base::kTileN, Base::kHeadDim, Base::kHeadDimV, Base::kKeys;
  using typename Base::Element;
  static_assert(kKeys == 64);
  using MmaS = SmemMma<Element, kKeys, kTileM, Major::K, Major::K>;  // S^T, dP^T
  using MmaDk = RegisterMma<Element, kKeys, kHeadDim, Major::MN>;
  using MmaDv = RegisterMma<Element, kKeys, kHeadDimV, Major::MN>;
  using AccS = Accumulator<MmaS, kKeys, kTileM>;
  using AccDk = Accumulator<MmaDk, kKeys, kHeadDim>;
  using AccDv = Accumulator<MmaDv, kKeys, kHeadDimV>;
  using LsePairs = std::conditional_t<kTileM == 128, ShuffledPairs<kTileM>, LoadedPairs>;

  // Of this consumer's S^T, inside the tile. With 64 queries a step ptxas would keep too much that
  // follows from it.
  __device__ __forceinline__ int first_key() const {
    return (kTileM == 128 ? consumer : recompute(consumer)) * kKeys;
  }

  // Starts S^T = K Q^T (B2). Returns the step's query tile, for `share`.
  __device__ __forceinline__ QueryTile start_scores(int step, AccS& acc) const {
    auto k = operand_a<MmaS>(part<kKeys, kHeadDim>(this->tile_k(), first_key() / kKeys, 0));
    const auto q = operand_b<MmaS>(this->tile_q(step));
    this->wait_for_q(step);
    const QueryTile tile = this->read_query_tile(step);
    start_gemm<MmaS, Accumulate::kNo>(k, q, acc);
    return tile;
  }
  // Starts dP^T = V dO^T (B3).
  __device__ __forceinline__ void start_dp(int step, AccS& acc) const {
    auto v = operand_a<MmaS>(part<kKeys, kHeadDimV>(this->tile_v(), first_key() / kKeys, 0));
    const auto dout = operand_b<MmaS>(this->tile_dout(step));
    this->wait_for_dout(step);
    start_gemm<MmaS, Accumulate::kNo>(v, dout, acc);
  }

  // The rest of B2: P^T = exp2(S^T * scale - L), in place. load_lse(): L as pairs, see above.
  // `masked`: some of it is hidden. `row_begin`: the tile's first row.
  template <class LoadLse>
  __device__ __forceinline__ void make_probabilities(const LoadLse& load_lse, bool masked,
                                                     int row_begin, AccS& acc) const {
    if (masked) {
      const VisibleKeys visible(arguments.params.shape, arguments.params.window);
      const int row = row_begin + thread % 4 * 2,
                key = this->work().key_begin + first_key() + thread / 32 * 16 + thread % 32 / 4;
      hide_columns(acc, [&](int j) {
        const BlockRange rows = visible.rows_of_key(key + 8 * j);
        return BlockRange{rows.begin - row, rows.end - row};
      });
    }
    const float scale_log2 = arguments.params.softmax_scale * kLog2e;
    const auto lse = load_lse();
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 4) {
      const float2 pair = lse(i);
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc(i + j) = exp2f(acc(i + j) * scale_log2 - (j % 2 == 0 ? pair.x : pair.y));
      }
    }
  }

  // B4: dS^T = P^T (dP^T - D), in place of dP^T, of a thread's values kBegin to kEnd.
  // probabilities(i): P^T's values i to i + 3. `delta`: D as pairs.
  template <int kBegin, int kEnd, class Pairs, class Probabilities>
  __device__ __forceinline__ void make_score_gradients(const Pairs& delta,
                                                       const Probabilities& probabilities,
                                                       AccS& acc) const {
    CUTE_UNROLL
    for (int i = kBegin; i < kEnd; i += 4) {
      const float2 pair = delta(i);
      const float4 p = probabilities(i);
      acc(i) = p.x * (acc(i) - pair.x);
      acc(i + 1) = p.y * (acc(i + 1) - pair.y);
      acc(i + 2) = p.z * (acc(i + 2) - pair.x);
      acc(i + 3) = p.w * (acc(i + 3) - pair.y);
    }
  }

  // Where in a buffer of dS this thread's first stmatrix row lies.
  __device__ __forceinline__ int find_ds_place() const {
    const StoreLane lane = StoreLane::columns(thread);
    const auto tile = this->tile_ds(0);
    return &tile(int(lane.column), first_key() + thread / 32 * 16 + lane.row) - smem.ds;
  }
  const int ds_place = find_ds_place();

  // This consumer's (keys, queries) part of dS^T to the (queries, keys) tile.
  template <class Fragment>
  __device__ __forceinline__ void store_score_gradients(const Fragment& ds, int step) const {
    Element* target =
        smem.ds + typename Base::Scores{uint32_t(step)}.stage() * Traits::kScoreElements + ds_place;
    CUTE_UNROLL
    for (int block = 0; block < kTileM / 16; ++block) {  // the swizzle repeats every 8 rows
      store_block<SM90_U16x8_STSM_T>(ds, block, target + 16 * block * kBoxColumns<kTileN>);
    }
    Barrier& full = smem.barriers.ds_full[typename Base::Scores{uint32_t(step)}.stage()];
    arrive_as_warp(full, thread);
  }

  // Starts dV += P^T dO (B5). `p`: P^T as the A operand.
  template <class P, class Tile>
  __device__ __forceinline__ void start_dv(P& p, const Tile& tile_dout, AccDv& acc) const {
    const auto dout = operand_b<MmaDv>(transposed(tile_dout));
    start_gemm<MmaDv, Accumulate::kYes>(p, dout, acc);
  }
  // Starts dK += dS^T Q (B6). `ds`: dS^T as the A operand.
  template <class Ds, class Tile>
  __device__ __forceinline__ void start_dk(Ds& ds, const Tile& tile_q, AccDk& acc) const {
    const auto q = operand_b<MmaDk>(transposed(tile_q));
    start_gemm<MmaDk, Accumulate::kYes>(ds, q, acc);
  }

  // B8, for this consumer's keys, by way of dS's place, which nobody reads any more.
  __device__ __forceinline__ void write_dv(const AccDv& acc) const {
    write_rows<kBoxColumns<kHeadDimV>>(arguments.dv, acc, smem_tile<kTileN, kHeadDimV>(smem.ds));
  }
  __device__ __forceinline__ void write_dk(AccDk& acc) const {
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) acc(i) *= arguments.params.softmax_scale;
    write_rows<Traits::kBoxK>(
        arguments.dk, acc,
        smem_tile<kTileN, kHeadDim, Traits::kBoxK>(smem.ds + kTileN * kHeadDimV));
  }
  // Until those of the work before have left.
  __device__ __forceinline__ void wait_for_gradients() const {
    if (number == 0) return;
    if (thread == 0) {
      tma_store_wait<0>();
      smem.barriers.gradients_left.arrive();
    }
    smem.barriers.gradients_left.wait((number & 1) ^ 1);
  }
  template <int kBox, class Acc, class Tile>
  __device__ __forceinline__ void write_rows(const CUtensorMap& map, const Acc& acc,
                                             const Tile& tile) const {
    constexpr int kColumns = decltype(size<1>(tile))::value;
    const StoreLane lane = StoreLane::rows(thread);
    const auto values = rounded<Element>(acc);
    const int row = first_key() + thread / 32 * 16 + lane.row;
    CUTE_UNROLL
    for (int block = 0; block < kColumns / 16; ++block) {
      store_block<SM90_U32x4_STSM_N>(values, block, &tile(row, 16 * block + lane.column));
    }
    this->template store_key_gradient<kColumns, kBox>(map, tile, first_key(), 0);
  }
};

}  // namespace flash_attn2::sm90
