// Backward pass on mma.sync (FlashAttention-2, section 3: algorithm 2, parallel over key blocks).
// One thread block owns kTileN keys of one KV head: K, V stay in shared memory, dK and dV in
// registers, while the query blocks that see those keys, of every query head of the group, stream
// by. dQ is what the key blocks share: an fp32 accumulator in global memory.
#pragma once

#include "../core/mask.cuh"
#include "../core/schedule.cuh"
#include "../core/softmax.cuh"
#include "dq_accumulator.cuh"
#include "gemm.cuh"

namespace flash_attn2::sm80 {

// kWarpsRowsS x (kWarps / kWarpsRowsS) warps share S and dP (kTileM x kTileN), likewise
// kWarpsRowsKV of them the keys of dK and dV (kTileN x kHeadDim) and kWarpsRowsQ the rows of dQ
// (kTileM x kHeadDim). The squarer a warp's share, the fewer bytes it reads from shared memory per
// product.
template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kWarps_, int kWarpsRowsS,
          int kWarpsRowsKV, int kWarpsRowsQ, int kStages_, int kScoreSplits_ = 1>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kThreads = 32 * kWarps_;
  static constexpr int kStages = kStages_;  // of Q and dO: 2 overlaps their loads with the products
  static constexpr int kScoreSplits = kScoreSplits_;  // S and dP are made in this many column parts

  using MmaS = typename WarpMma<Element, kWarpsRowsS, kWarps_ / kWarpsRowsS>::Type;
  using MmaKV = typename WarpMma<Element, kWarpsRowsKV, kWarps_ / kWarpsRowsKV>::Type;
  using MmaQ = typename WarpMma<Element, kWarpsRowsQ, kWarps_ / kWarpsRowsQ>::Type;

  using SmemQ = SmemTile<kTileM, kHeadDim>;   // also dO
  using SmemKV = SmemTile<kTileN, kHeadDim>;  // also dK, dV on their way out
  using SmemS = SmemTile<kTileM, kTileN>;     // P and dS

  static constexpr int kQElements = kTileM * kHeadDim;
  static constexpr int kKVElements = kTileN * kHeadDim;
  static constexpr int kSElements = kTileM * kTileN;
  static constexpr int kSmemBytes =
      (2 * kKVElements + kStages * 2 * kQElements + 2 * kSElements) * int(sizeof(Element));
};

// A step of a thread block's walk: all query blocks of the first head of the group, then of the
// next.
struct QueryStep {
  int head, block;

  __device__ __forceinline__ QueryStep next(const BlockRange& blocks) const {
    return block + 1 < blocks.end ? QueryStep{head, block + 1} : QueryStep{head + 1, blocks.begin};
  }
};

// The thread block's place in the grid. Where dQ is summed in a fixed order, blocks draw their
// place from a counter instead: a block then only ever waits for blocks that have already started.
__device__ __forceinline__ int64_t backward_index(const BackwardParams& params, int* drawn) {
  if (params.ticket == nullptr) return blockIdx.x;
  if (threadIdx.x == 0) *drawn = atomicAdd(params.ticket, 1);
  __syncthreads();
  const int index = *drawn;
  __syncthreads();  // the shared memory of `drawn` is free again
  return index;
}

// The shared-memory tiles of one (query block, key block) pair.
template <class Traits>
struct BackwardTiles {
  using Element = typename Traits::Element;
  template <class Layout_>
  using Tile = decltype(make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), Layout_{}));

  Tile<typename Traits::SmemQ> q, dout;
  Tile<typename Traits::SmemKV> k, v;
  Tile<typename Traits::SmemS> p, ds;

  // K, V, then stages of Q and dO side by side, then P, dS.
  __device__ __forceinline__ BackwardTiles(Element* smem, int stage)
      : q(at<typename Traits::SmemQ>(smem + 2 * kKV + stage * 2 * kQ)),
        dout(at<typename Traits::SmemQ>(smem + 2 * kKV + stage * 2 * kQ + kQ)),
        k(at<typename Traits::SmemKV>(smem)),
        v(at<typename Traits::SmemKV>(smem + kKV)),
        p(at<typename Traits::SmemS>(smem + 2 * kKV + Traits::kStages * 2 * kQ)),
        ds(at<typename Traits::SmemS>(smem + 2 * kKV + Traits::kStages * 2 * kQ +
                                      Traits::kSElements)) {}

 private:
  static constexpr int kQ = Traits::kQElements, kKV = Traits::kKVElements;

  template <class Layout_>
  __device__ __forceinline__ static auto at(Element* base) {
    return make_tensor(make_smem_ptr(base), Layout_{});
  }
};

// (rows, columns) shared tile as the transposed operand of a product.
template <class Tile>
__device__ __forceinline__ auto transposed(const Tile& tile) {
  return operand<LoadMatrixTransposed>(
      make_tensor(tile.data(), Transposed<typename Tile::layout_type>{}));
}

// B2 to B4 of one (query block, key block) pair: P and dS, (kTileM, kTileN), to shared memory. In
// kScoreSplits parts of the columns, one after the other, where registers would not hold all of S
// and dP beside dK and dV. `row` is the query block's first row in lse_log2 and delta.
template <class Traits>
__device__ __forceinline__ void score_gradients(const BackwardParams& params,
                                                const VisibleKeys& visible,
                                                BackwardTiles<Traits>& tiles, int64_t row,
                                                int row_begin, int key_begin, int thread) {
  using Element = typename Traits::Element;
  constexpr int kColumns = Traits::kTileN / Traits::kScoreSplits;
  using ScoreExtents = cute::Shape<Int<Traits::kTileM>, Int<kColumns>>;
  using KeyExtents = cute::Shape<Int<kColumns>, Int<Traits::kHeadDim>>;
  typename Traits::MmaS mma;
  auto coords =
      rows_columns(mma.get_thread_slice(thread).partition_C(make_identity_tensor(ScoreExtents{})));
  constexpr int kRows = decltype(size<0>(coords))::value;
  float row_lse[kRows], row_delta[kRows];
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {  // read early: used after the products
    row_lse[i] = params.lse_log2[row + get<0>(coords(i, 0))];
    row_delta[i] = params.delta[row + get<0>(coords(i, 0))];
  }
  const ScoreScale scale(params.softmax_scale);

  CUTE_UNROLL
  for (int part = 0; part < Traits::kScoreSplits; ++part) {
    auto acc_s = partition_fragment_C(mma, ScoreExtents{});
    clear(acc_s);
    gemm_ss(acc_s, mma, operand<LoadMatrix>(tiles.q),
            operand<LoadMatrix>(local_tile(tiles.k, KeyExtents{}, make_coord(part, 0))),
            thread);  // B2
    scale.prepare(acc_s);
    auto scores = rows_columns(acc_s);
    const int part_begin = key_begin + part * kColumns;
    if (visible.tile_needs_mask(row_begin, Traits::kTileM, part_begin, kColumns)) {
      apply_mask(scores, coords, visible, row_begin, part_begin);
    }
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) {
        scores(i, j) = exp2f(scores(i, j) * scale.log2 - row_lse[i]);
      }
    }
    store_accumulators<Element>(mma, acc_s,
                                local_tile(tiles.p, ScoreExtents{}, make_coord(0, part)), thread);

    auto acc_dp = partition_fragment_C(mma, ScoreExtents{});
    clear(acc_dp);
    gemm_ss(acc_dp, mma, operand<LoadMatrix>(tiles.dout),
            operand<LoadMatrix>(local_tile(tiles.v, KeyExtents{}, make_coord(part, 0))),
            thread);  // B3
    auto dscores = rows_columns(acc_dp);
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {  // B4
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) {
        dscores(i, j) = scores(i, j) * (dscores(i, j) - row_delta[i]);
      }
    }
    store_accumulators<Element>(mma, acc_dp,
                                local_tile(tiles.ds, ScoreExtents{}, make_coord(0, part)), thread);
  }
}

// B8: one of dK, dV, through the shared memory that held K, V.
template <class Traits, class Tile, class Acc>
__device__ __forceinline__ void write_key_gradient(const BackwardParams& params,
                                                   const TensorView& view, const TileCoord& coord,
                                                   Tile& staging, const Acc& acc, int thread) {
  using Element = typename Traits::Element;
  const int key_begin = coord.block * Traits::kTileN;
  store_accumulators<Element>(typename Traits::MmaKV{}, acc, staging, thread);
  __syncthreads();
  store_tile<Element, Traits::kHeadDim, Traits::kThreads>(
      staging,
      global_tile<Element, Traits::kTileN, Traits::kHeadDim>(view, coord.batch, coord.head,
                                                             key_begin),
      thread, params.shape.seqlen_k - key_begin, params.shape.head_dim);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kHeadDim = Traits::kHeadDim;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x;
  const AttentionShape& shape = params.shape;
  const VisibleKeys visible(shape, params.window);

  const TileCoord coord =  // head: the KV head
      backward_tile(backward_index(params, reinterpret_cast<int*>(smem)),
                    ceil_div(shape.seqlen_k, kTileN), shape.heads_k);
  const int key_begin = coord.block * kTileN;
  const int group = shape.heads_q / shape.heads_k;
  const BlockRange blocks = visible.query_blocks(key_begin, kTileM, kTileN);
  const int steps = group * max(blocks.end - blocks.begin, 0);
  const int row_blocks = ceil_div(shape.seqlen_q, kTileM);

  Element* elements = reinterpret_cast<Element*>(smem);

  auto load_keys = [&](const TensorView& view, auto& target) {
    load_tile<Element, kHeadDim, Traits::kThreads>(
        global_tile<Element, kTileN, kHeadDim>(view, coord.batch, coord.head, key_begin), target,
        thread, shape.seqlen_k - key_begin, shape.head_dim);
  };
  auto load_queries = [&](const QueryStep& at, int stage) {
    BackwardTiles<Traits> tiles(elements, stage);
    const int row_begin = at.block * kTileM;
    const auto load = [&](const TensorView& view, auto& target) {
      load_tile<Element, kHeadDim, Traits::kThreads>(
          global_tile<Element, kTileM, kHeadDim>(view, coord.batch, at.head, row_begin), target,
          thread, shape.seqlen_q - row_begin, shape.head_dim);
    };
    load(params.q, tiles.q);
    load(params.dout, tiles.dout);
  };

  typename Traits::MmaKV mma_kv;
  auto acc_dk = partition_fragment_C(mma_kv, cute::Shape<Int<kTileN>, Int<kHeadDim>>{});
  auto acc_dv = partition_fragment_C(mma_kv, cute::Shape<Int<kTileN>, Int<kHeadDim>>{});
  clear(acc_dk);
  clear(acc_dv);

  QueryStep at{coord.head * group, blocks.begin};
  if (steps > 0) {
    BackwardTiles<Traits> tiles(elements, 0);
    load_keys(params.k, tiles.k);
    load_keys(params.v, tiles.v);
    load_queries(at, 0);
    cp_async_fence();
  }
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Traits::kStages;
    const int row_begin = at.block * kTileM;
    const int64_t row_block =
        (int64_t(coord.batch) * shape.heads_q + at.head) * row_blocks + at.block;
    cp_async_wait<0>();
    __syncthreads();  // Q and dO are there; all warps are done with P, dS and the other stage
    if (Traits::kStages == 2 && step + 1 < steps) load_queries(at.next(blocks), stage ^ 1);
    cp_async_fence();

    BackwardTiles<Traits> tiles(elements, stage);
    score_gradients(params, visible, tiles, row_block * kTileM, row_begin, key_begin, thread);
    __syncthreads();  // P and dS are there

    // B7: this block's share of dQ = dS K, (kTileM, kHeadDim).
    typename Traits::MmaQ mma_q;
    auto acc_dq = partition_fragment_C(mma_q, cute::Shape<Int<kTileM>, Int<kHeadDim>>{});
    clear(acc_dq);
    gemm_ss(acc_dq, mma_q, operand<LoadMatrix>(tiles.ds), transposed(tiles.k), thread);

    const int turn = coord.block - visible.key_blocks(row_begin, kTileM, kTileN).begin;
    wait_for_turn(params.dq_turn, row_block, turn);
    add_to_dq<Traits>(params.dq_accum + row_block * Traits::kQElements, acc_dq, thread);
    pass_turn(params.dq_turn, row_block, turn);

    // B5: dV += P^T dO and B6: dK += dS^T Q, (kTileN, kHeadDim). They come after dQ so that its
    // reductions are on their way while the tensor cores work.
    gemm_ss(acc_dv, mma_kv, transposed(tiles.p), transposed(tiles.dout), thread);
    gemm_ss(acc_dk, mma_kv, transposed(tiles.ds), transposed(tiles.q), thread);
    if (Traits::kStages == 1 && step + 1 < steps) {
      __syncthreads();  // all warps are done with this Q and dO
      load_queries(at.next(blocks), 0);
      cp_async_fence();
    }
    at = at.next(blocks);
  }

  cp_async_wait<0>();
  __syncthreads();  // all warps are done with K and V
  CUTE_UNROLL
  for (int i = 0; i < size(acc_dk); ++i) acc_dk(i) *= params.softmax_scale;
  BackwardTiles<Traits> tiles(elements, 0);
  write_key_gradient<Traits>(params, params.dk, coord, tiles.k, acc_dk, thread);
  write_key_gradient<Traits>(params, params.dv, coord, tiles.v, acc_dv, thread);
}

}  // namespace flash_attn2::sm80
