// P and dS of one (query block, key block) pair (steps B2 to B4), by any of the ScoreShares.
#pragma once

#include "../core/softmax.cuh"
#include "backward_tiles.cuh"
#include "mask.cuh"

namespace flash_attn2::sm80 {

// The L * log2(e) and D of a thread's kRows rows. Read before the products and used after them.
template <int kRows>
struct RowStatistics {
  float lse_log2[kRows], delta[kRows];

  template <class Coords>
  __device__ __forceinline__ RowStatistics(const BackwardParams& params, int64_t first_row,
                                           const Coords& coords) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      lse_log2[i] = params.lse_log2[first_row + get<0>(coords(i, 0))];
      delta[i] = params.delta[first_row + get<0>(coords(i, 0))];
    }
  }
};

// B2's second half: masks a part of S whose first column is the key `key_begin`, and turns it into
// P = exp2(scale_log2 * S - L * log2(e)). scores, coords: (rows, columns).
template <class Traits, int kColumns, class Scores, class Coords, int kRows>
__device__ __forceinline__ void to_probabilities(Scores& scores, const Coords& coords,
                                                 const KeyBlock<Traits>& keys, int row_begin,
                                                 int key_begin, const RowStatistics<kRows>& rows) {
  if (keys.visible.tile_needs_mask(row_begin, Traits::kTileM, key_begin, kColumns)) {
    apply_mask(scores, coords, keys.visible, row_begin, key_begin);
  }
  const float scale_log2 = keys.params.softmax_scale * kLog2e;
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) {
      scores(i, j) = exp2f(scores(i, j) * scale_log2 - rows.lse_log2[i]);
    }
  }
}

// B4: dP becomes dS = P (dP - D), both (rows, columns).
template <class Scores, int kRows>
__device__ __forceinline__ void to_score_gradients(Scores& dscores, const Scores& scores,
                                                   const RowStatistics<kRows>& rows) {
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) {
      dscores(i, j) = scores(i, j) * (dscores(i, j) - rows.delta[i]);
    }
  }
}

// ScoreShares::kWhole and kHalves.
template <class Traits>
__device__ __forceinline__ void shared_scores(const KeyBlock<Traits>& keys,
                                              BackwardTiles<Traits>& tiles, const QueryStep& at,
                                              int thread) {
  using Element = typename Traits::Element;
  constexpr int kParts = Traits::kScores == ScoreShares::kHalves ? 2 : 1;
  constexpr int kColumns = Traits::kTileN / kParts;
  using ScoreExtents = cute::Shape<Int<Traits::kTileM>, Int<kColumns>>;
  using KeyExtents = cute::Shape<Int<kColumns>, Int<Traits::kHeadDim>>;
  typename Traits::MmaS mma;
  auto coords =
      rows_columns(mma.get_thread_slice(thread).partition_C(make_identity_tensor(ScoreExtents{})));
  constexpr int kRows = decltype(size<0>(coords))::value;
  const RowStatistics<kRows> rows(keys.params, keys.row_block(at) * Traits::kTileM, coords);

  CUTE_UNROLL
  for (int part = 0; part < kParts; ++part) {
    auto acc_s = partition_fragment_C(mma, ScoreExtents{});
    clear(acc_s);
    gemm_ss<Traits::kAhead>(
        acc_s, mma, operand<LoadMatrix>(tiles.q),
        operand<LoadMatrix>(local_tile(tiles.k, KeyExtents{}, make_coord(part, 0))),
        thread);  // B2
    auto scores = rows_columns(acc_s);
    to_probabilities<Traits, kColumns>(scores, coords, keys, at.block * Traits::kTileM,
                                       keys.key_begin + part * kColumns, rows);
    store_accumulators<Element>(mma, acc_s,
                                local_tile(tiles.p, ScoreExtents{}, make_coord(0, part)), thread);

    auto acc_dp = partition_fragment_C(mma, ScoreExtents{});
    clear(acc_dp);
    gemm_ss<Traits::kAhead>(
        acc_dp, mma, operand<LoadMatrix>(tiles.dout),
        operand<LoadMatrix>(local_tile(tiles.v, KeyExtents{}, make_coord(part, 0))),
        thread);  // B3
    auto dscores = rows_columns(acc_dp);
    to_score_gradients(dscores, scores, rows);
    store_accumulators<Element>(mma, acc_dp,
                                local_tile(tiles.ds, ScoreExtents{}, make_coord(0, part)), thread);
  }
}

// ScoreShares::kPaired. Thread t of the first half of the block makes a part of S, thread
// t + kThreads / 2 the same part of dP. They swap halves of its columns through shared memory, so
// that the first has the left columns of both, the second the right ones.
template <class Traits>
__device__ __forceinline__ void paired_scores(const KeyBlock<Traits>& keys,
                                              BackwardTiles<Traits>& tiles, const QueryStep& at,
                                              int thread) {
  using Element = typename Traits::Element;
  constexpr int kColumns = Traits::kTileN / 2;
  using HalfExtents = cute::Shape<Int<Traits::kTileM>, Int<kColumns>>;
  typename Traits::MmaS mma;
  const bool right = thread >= Traits::kThreadsS;
  const int place = thread % Traits::kThreadsS;
  auto coords =
      rows_columns(mma.get_thread_slice(place).partition_C(make_identity_tensor(HalfExtents{})));
  constexpr int kRows = decltype(size<0>(coords))::value;
  const RowStatistics<kRows> rows(keys.params, keys.row_block(at) * Traits::kTileM, coords);

  // B2 and B3: S or dP, (kTileM, kTileN).
  auto acc = partition_fragment_C(mma, cute::Shape<Int<Traits::kTileM>, Int<Traits::kTileN>>{});
  clear(acc);
  gemm_ss<Traits::kAhead>(acc, mma, operand<LoadMatrix>(right ? tiles.dout : tiles.q),
                          operand<LoadMatrix>(right ? tiles.v : tiles.k), place);

  auto acc_s = partition_fragment_C(mma, HalfExtents{});
  auto acc_dp = partition_fragment_C(mma, HalfExtents{});
  constexpr int kHalf = decltype(size(acc_s))::value;
  static_assert(decltype(size(acc))::value == 2 * kHalf,
                "the columns of S divide evenly among the warps");
  CUTE_UNROLL
  for (int i = 0; i < kHalf; i += 4) {
    const auto give = [&](int j) { return right ? acc(i + j) : acc(kHalf + i + j); };
    tiles.swap[i / 4 * Traits::kThreads + thread] = {give(0), give(1), give(2), give(3)};
  }
  asm volatile("bar.sync %0, 64;" ::"r"(1 + place / 32) : "memory");  // the two warps of the pair
  CUTE_UNROLL
  for (int i = 0; i < kHalf; i += 4) {
    const float4 got = tiles.swap[i / 4 * Traits::kThreads + (thread ^ Traits::kThreadsS)];
    const float values[4] = {got.x, got.y, got.z, got.w};
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      acc_s(i + j) = right ? values[j] : acc(i + j);
      acc_dp(i + j) = right ? acc(kHalf + i + j) : values[j];
    }
  }

  auto scores = rows_columns(acc_s);
  auto dscores = rows_columns(acc_dp);
  to_probabilities<Traits, kColumns>(scores, coords, keys, at.block * Traits::kTileM,
                                     keys.key_begin + (right ? kColumns : 0), rows);
  to_score_gradients(dscores, scores, rows);
  const auto half = make_coord(0, int(right));
  store_accumulators<Element>(mma, acc_s, local_tile(tiles.p, HalfExtents{}, half), place);
  store_accumulators<Element>(mma, acc_dp, local_tile(tiles.ds, HalfExtents{}, half), place);
}

// B2 to B4: P and dS, (kTileM, kTileN), to shared memory.
template <class Traits>
__device__ __forceinline__ void score_gradients(const KeyBlock<Traits>& keys,
                                                BackwardTiles<Traits> tiles, const QueryStep& at,
                                                int thread) {
  if constexpr (Traits::kScores == ScoreShares::kPaired) {
    paired_scores(keys, tiles, at, thread);
  } else {
    shared_scores(keys, tiles, at, thread);
  }
}

}  // namespace flash_attn2::sm80
