// Backward pass on mma.sync (FlashAttention-2, section 3: algorithm 2, parallel over key blocks).
// One thread block owns kTileN keys of one KV head: K, V stay in shared memory, dK and dV in
// registers, while the query blocks that see those keys, of every query head of the group, stream
// by. dQ is what the key blocks share: an fp32 accumulator in global memory.
#pragma once

#include "backward_scores.cuh"
#include "dq_accumulator.cuh"

namespace flash_attn2::sm80 {

// The thread block's place in the grid. Where dQ is summed in a fixed order, blocks draw their
// place from a counter instead: a block then only ever waits for blocks that have already started.
__device__ __forceinline__ unsigned backward_index(const BackwardParams& params, int* drawn) {
  if (params.ticket == nullptr) return blockIdx.x;
  if (threadIdx.x == 0) *drawn = atomicAdd(params.ticket, 1);
  __syncthreads();
  const int index = *drawn;
  __syncthreads();  // the shared memory of `drawn` is free again
  return index;
}

// (rows, columns) shared tile as the transposed operand of a product.
template <class Tile>
__device__ __forceinline__ auto transposed(const Tile& tile) {
  return operand<LoadMatrixTransposed>(
      make_tensor(tile.data(), Transposed<typename Tile::layout_type>{}));
}

// B5 to B7 of one (query block, key block) pair: adds dS K to the dQ accumulator, P^T dO to dV and
// dS^T Q to dK, both (kTileN, kHeadDim). dQ comes first so that its reductions are on their way
// while the tensor cores make the others.
template <class Traits, class Acc>
__device__ __forceinline__ void add_gradients(const KeyBlock<Traits>& keys,
                                              BackwardTiles<Traits> tiles, const QueryStep& at,
                                              Acc& acc_dk, Acc& acc_dv, int thread) {
  const BackwardParams& params = keys.params;
  typename Traits::MmaQ mma_q;
  auto acc_dq =
      partition_fragment_C(mma_q, cute::Shape<Int<Traits::kTileM>, Int<Traits::kHeadDim>>{});
  clear(acc_dq);
  gemm_ss<Traits::kAhead>(acc_dq, mma_q, operand<LoadMatrix>(tiles.ds), transposed(tiles.k),
                          thread);  // B7

  const int64_t row_block = keys.row_block(at);
  const int turn = keys.turn(at);
  wait_for_turn(params.dq_turn, row_block, turn);
  add_to_dq<Traits>(params.dq_accum + row_block * Traits::kQElements, acc_dq, thread);
  pass_turn(params.dq_turn, row_block, turn);

  typename Traits::MmaKV mma_kv;
  gemm_ss<Traits::kAhead>(acc_dv, mma_kv, transposed(tiles.p), transposed(tiles.dout),
                          thread);                                                             // B5
  gemm_ss<Traits::kAhead>(acc_dk, mma_kv, transposed(tiles.ds), transposed(tiles.q), thread);  // B6
}

// B8: one of dK, dV, through the shared memory that held K, V.
template <class Traits, class Tile, class Acc>
__device__ __forceinline__ void write_key_gradient(const KeyBlock<Traits>& keys,
                                                   const TensorView& view, int head_dim,
                                                   Tile& staging, const Acc& acc, int thread) {
  using Element = typename Traits::Element;
  const AttentionShape& shape = keys.params.shape;
  store_accumulators<Element>(typename Traits::MmaKV{}, acc, staging, thread);
  __syncthreads();
  store_tile<Element, Traits::kHeadDim, Traits::kThreads>(
      staging,
      global_tile<Element, Traits::kTileN, Traits::kHeadDim>(view, keys.coord.batch,
                                                             keys.coord.head, keys.key_begin),
      thread, shape.seqlen_k - keys.key_begin, head_dim);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kHeadDim = Traits::kHeadDim;
  constexpr int kStages = Traits::kStages;
  constexpr bool kPipelined = kStages == 3;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int thread = threadIdx.x;
  const AttentionShape& shape = params.shape;

  const KeyBlock<Traits> keys(params, backward_index(params, reinterpret_cast<int*>(smem)));
  const int group = shape.heads_q / shape.heads_k;
  const BlockRange blocks = keys.visible.query_blocks(keys.key_begin, kTileM, kTileN);
  const int steps = group * max(blocks.end - blocks.begin, 0);

  const auto tiles_of = [&](int step) {
    return BackwardTiles<Traits>(smem, step % kStages, step % Traits::kScoreBuffers);
  };
  const auto load_keys = [&](const TensorView& view, int head_dim, auto& target) {
    load_tile<Element, kHeadDim, Traits::kThreads>(
        global_tile<Element, kTileN, kHeadDim>(view, keys.coord.batch, keys.coord.head,
                                               keys.key_begin),
        target, thread, shape.seqlen_k - keys.key_begin, head_dim);
  };
  const auto load_queries = [&](const QueryStep& at, int step) {
    BackwardTiles<Traits> tiles = tiles_of(step);
    const int row_begin = at.block * kTileM;
    const auto load = [&](const TensorView& view, int head_dim, auto& target) {
      load_tile<Element, kHeadDim, Traits::kThreads>(
          global_tile<Element, kTileM, kHeadDim>(view, keys.coord.batch, at.head, row_begin),
          target, thread, shape.seqlen_q - row_begin, head_dim);
    };
    load(params.q, shape.head_dim, tiles.q);
    load(params.dout, shape.head_dim_v, tiles.dout);
  };

  typename Traits::MmaKV mma_kv;
  auto acc_dk = partition_fragment_C(mma_kv, cute::Shape<Int<kTileN>, Int<kHeadDim>>{});
  auto acc_dv = partition_fragment_C(mma_kv, cute::Shape<Int<kTileN>, Int<kHeadDim>>{});
  clear(acc_dk);
  clear(acc_dv);

  QueryStep at{keys.coord.head * group, blocks.begin};
  QueryStep previous = at;
  if (steps > 0) {
    BackwardTiles<Traits> tiles = tiles_of(0);
    load_keys(params.k, shape.head_dim, tiles.k);
    load_keys(params.v, shape.head_dim_v, tiles.v);
    load_queries(at, 0);
    cp_async_fence();
  }
  // Pipelined, the gradients of the last step have a turn of their own.
  const int turns = kPipelined && steps > 0 ? steps + 1 : steps;
  for (int step = 0; step < turns; ++step) {
    cp_async_wait<0>();
    // This step's Q and dO are there, and the P and dS of the step before where pipelined; all
    // warps are done with the tiles that are written next.
    __syncthreads();
    if (kStages > 1 && step + 1 < steps) load_queries(at.next(blocks), step + 1);
    cp_async_fence();

    if constexpr (kPipelined) {
      // A function of its own: ptxas then keeps all accumulators in registers.
      [&] {
        if (step == steps) return;
        score_gradients(keys, tiles_of(step), at, thread);
      }();
      if (step > 0) add_gradients(keys, tiles_of(step - 1), previous, acc_dk, acc_dv, thread);
    } else {
      score_gradients(keys, tiles_of(step), at, thread);
      __syncthreads();  // P and dS are there
      add_gradients(keys, tiles_of(step), at, acc_dk, acc_dv, thread);
    }
    if (kStages == 1 && step + 1 < steps) {
      __syncthreads();  // all warps are done with this Q and dO
      load_queries(at.next(blocks), 0);
      cp_async_fence();
    }
    previous = at;
    at = at.next(blocks);
  }

  cp_async_wait<0>();
  __syncthreads();  // all warps are done with K and V
  CUTE_UNROLL
  for (int i = 0; i < size(acc_dk); ++i) acc_dk(i) *= params.softmax_scale;
  BackwardTiles<Traits> tiles = tiles_of(0);
  write_key_gradient(keys, params.dk, shape.head_dim, tiles.k, acc_dk, thread);
  write_key_gradient(keys, params.dv, shape.head_dim_v, tiles.v, acc_dv, thread);
}

}  // namespace flash_attn2::sm80
