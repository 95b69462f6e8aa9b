// What a thread block of the backward works on: its traits, its shared memory and its place in the
// problem.
#pragma once

#include "../core/schedule.h"
#include "gemm.cuh"

namespace flash_attn2::sm80 {

// How the warps of a block share S = Q K^T and dP = dO V^T, both (kTileM, kTileN).
enum class ScoreShares {
  kWhole,   // every warp makes its share of S, then the same share of dP
  kHalves,  // the same, for one half of the columns after the other: half the registers
  kPaired,  // half of the warps make S while the others make dP: squarer shares, so that a product
            // reads less shared memory, and then pairs of warps swap halves
};

// kWarpsRowsS warps along the rows of S (of all warps, or of half where they are paired), likewise
// kWarpsRowsKV along the keys of dK and dV (kTileN x kHeadDim) and kWarpsRowsQ along the rows of dQ
// (kTileM x kHeadDim). The squarer a warp's share, the fewer bytes it reads from shared memory per
// product.
template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kWarps_, int kWarpsRowsS,
          int kWarpsRowsKV, int kWarpsRowsQ, int kStages_, ScoreShares kScores_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim;  // V has Q's bucket
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kThreads = 32 * kWarps_;
  // Of Q and dO. 1: loads are exposed. 2: they overlap with the products. 3: besides, dQ, dK and dV
  // of one step are made beside S and dP of the next, with one barrier a step and two P and dS.
  static constexpr int kStages = kStages_;
  static constexpr int kScoreBuffers = kStages == 3 ? 2 : 1;
  static constexpr ScoreShares kScores = kScores_;
  // Steps of K that fragments are read ahead. One where shared memory is the limit, or the loads
  // are exposed anyway: more would only take registers.
  static constexpr int kAhead = kHeadDim == 256 || kStages == 1 ? 1 : 2;
  static constexpr int kThreadsS = kScores == ScoreShares::kPaired ? kThreads / 2 : kThreads;

  using MmaS = typename WarpMma<Element, kWarpsRowsS, kThreadsS / 32 / kWarpsRowsS>::Type;
  using MmaKV = typename WarpMma<Element, kWarpsRowsKV, kWarps_ / kWarpsRowsKV>::Type;
  using MmaQ = typename WarpMma<Element, kWarpsRowsQ, kWarps_ / kWarpsRowsQ>::Type;

  using SmemQ = SmemTile<kTileM, kHeadDim>;   // also dO
  using SmemKV = SmemTile<kTileN, kHeadDim>;  // also dK, dV on their way out
  using SmemS = SmemTile<kTileM, kTileN>;     // P and dS

  // Shared memory: K, V, stages of Q and dO side by side, buffers of P and dS side by side, and
  // what paired warps swap: half of S and half of dP in fp32.
  static constexpr int kQElements = kTileM * kHeadDim;
  static constexpr int kKVElements = kTileN * kHeadDim;
  static constexpr int kSElements = kTileM * kTileN;
  static constexpr int kElements =
      2 * (kKVElements + kStages * kQElements + kScoreBuffers * kSElements);
  static constexpr int kSwapFloats = kScores == ScoreShares::kPaired ? kSElements : 0;
  static constexpr int kSmemBytes =
      kElements * int(sizeof(Element)) + kSwapFloats * int(sizeof(float));
};

// The shared-memory tiles of one (query block, key block) pair.
template <class Traits>
struct BackwardTiles {
  using Element = typename Traits::Element;
  template <class Layout_>
  using Tile = decltype(make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), Layout_{}));

  Tile<typename Traits::SmemQ> q, dout;
  Tile<typename Traits::SmemKV> k, v;
  Tile<typename Traits::SmemS> p, ds;
  float4* swap;

  __device__ __forceinline__ BackwardTiles(unsigned char* smem, int stage, int buffer)
      : q(at<typename Traits::SmemQ>(smem, 2 * kKV + stage * 2 * kQ)),
        dout(at<typename Traits::SmemQ>(smem, 2 * kKV + stage * 2 * kQ + kQ)),
        k(at<typename Traits::SmemKV>(smem, 0)),
        v(at<typename Traits::SmemKV>(smem, kKV)),
        p(at<typename Traits::SmemS>(smem, kFirstP + buffer * 2 * kS)),
        ds(at<typename Traits::SmemS>(smem, kFirstP + buffer * 2 * kS + kS)),
        swap(reinterpret_cast<float4*>(smem + Traits::kElements * sizeof(Element))) {}

 private:
  static constexpr int kQ = Traits::kQElements, kKV = Traits::kKVElements, kS = Traits::kSElements;
  static constexpr int kFirstP = 2 * (kKV + Traits::kStages * kQ);

  template <class Layout_>
  __device__ __forceinline__ static auto at(unsigned char* smem, int element) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(smem) + element), Layout_{});
  }
};

// A step of a thread block's walk: all query blocks of the first head of the group, then of the
// next.
struct QueryStep {
  int head, block;

  __device__ __forceinline__ QueryStep next(const BlockRange& blocks) const {
    return block + 1 < blocks.end ? QueryStep{head, block + 1} : QueryStep{head + 1, blocks.begin};
  }
};

// A thread block's key block, and where a query step lies relative to it.
template <class Traits>
struct KeyBlock {
  const BackwardParams& params;
  VisibleKeys visible;
  TileCoord coord;  // head: the KV head
  int key_begin;

  __device__ __forceinline__ KeyBlock(const BackwardParams& params, unsigned index)
      : params(params),
        visible(params.shape, params.window),
        coord(backward_tile(index, ceil_div(params.shape.seqlen_k, Traits::kTileN),
                            params.shape.heads_k, params.shape.batch, params.tail_heads,
                            params.heads_together, /*heads_in_reverse=*/0)),
        key_begin(coord.block * Traits::kTileN) {}

  // Index of the step's query block among those of all heads: its tile of the dQ accumulator; times
  // kTileM, its first row in lse_log2 and delta.
  __device__ __forceinline__ int64_t row_block(const QueryStep& at) const {
    const int row_blocks = ceil_div(params.shape.seqlen_q, Traits::kTileM);
    return (int64_t(coord.batch) * params.shape.heads_q + at.head) * row_blocks + at.block;
  }
  // How many key blocks add to the step's dQ before this one.
  __device__ __forceinline__ int turn(const QueryStep& at) const {
    return coord.block -
           visible.key_blocks(at.block * Traits::kTileM, Traits::kTileM, Traits::kTileN).begin;
  }
};

}  // namespace flash_attn2::sm80
