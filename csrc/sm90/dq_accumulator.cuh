// The fp32 dQ accumulator in global memory that key blocks share (steps B7 and B8).
//
// It is private to the backward, so a (kTileM, kHeadDim) tile lies in parts as the consumers have
// them (BackwardTraits::kDqParts): value group i of thread t in part p is at
// ((p * groups + i) * 128 + t) * 4. A warp adds to whole cache lines, in the order of its lanes:
// lanes in another order cost 10% of the kernel.
//
// With kDqRing it is a ring of slots, few enough for the L2 cache. KV head n of the batch has slot
// n % dq_slots:
//
//   - the key blocks of head n add to it, then count themselves in dq_added[n];
//   - those of head n + dq_lag, each for a share of the tiles, wait for these, write dQ, zero the
//     slot, and count themselves in dq_converted[n]: spare warps, under the products;
//   - those of head n + dq_slots wait for these before they add.
//
// The last dq_lag heads are left for the post-process kernel. A key block waits only for ones of
// lower index, which are drawn first, so that none waits in a circle.
#pragma once

#include "../core/grid_dependency.cuh"
#include "delta_ahead.cuh"

namespace flash_attn2::sm90 {

// `target`: of the thread's first value group.
template <class Acc>
__device__ __forceinline__ void add_to_dq(float* target, const Acc& acc) {
  CUTE_UNROLL
  for (int i = 0; i < size(acc); i += 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     target + i * kWarpGroupThreads),
                 "f"(acc(i)), "f"(acc(i + 1)), "f"(acc(i + 2)), "f"(acc(i + 3))
                 : "memory");
  }
}

// B8: dQ = softmax_scale * accumulator, rounded, of one part of a query tile, by `threads` threads
// into shared memory, as smem_tile has it: slabs of kBox columns, in each row 16-byte chunks in an
// order of their own. (cute's address of an element takes registers that this has not got.)
// `take(i)`: value group i.
template <class Traits, int kUnroll, class Take>
__device__ __forceinline__ void round_dq(const Take& take, float softmax_scale, int thread,
                                         int threads, typename Traits::Element* target) {
  using Element = typename Traits::Element;
  constexpr int kBox = kBoxColumns<Traits::kDqColumns>, kChunks = kBox / 8;
#pragma unroll kUnroll
  for (int i = thread; i < Traits::kDqPartElements / 4; i += threads) {
    const int row = i % 32 / 4, warp_row = i % 128 / 32 * 16, chunk = i / 128;
    const int slab = chunk / kChunks * Traits::kDqRows;
    const int place = chunk % kChunks ^ row / (8 / kChunks);
    Element* const pairs = target + (slab + warp_row + row) * kBox + place * 8 + i % 4 * 2;
    const float4 x = take(i);
    const auto put = [&](Element* place, float first, float second) {
      alignas(4)
          const Element pair[2] = {Element(first * softmax_scale), Element(second * softmax_scale)};
      *reinterpret_cast<uint32_t*>(place) = *reinterpret_cast<const uint32_t*>(pair);
    };
    put(pairs, x.x, x.y);
    put(pairs + 8 * kBox, x.z, x.w);
  }
}

// Starts the store of part `part` of a query tile's dQ, for one thread. `tile`: see tile_index.
template <class Traits>
__device__ __forceinline__ void store_dq(const BackwardArguments& arguments,
                                         const typename Traits::Element* source, int tile,
                                         int part) {
  const AttentionShape& shape = arguments.params.shape;
  const int row_blocks = ceil_div(shape.seqlen_q, Traits::kTileM), head_row = tile / row_blocks;
  const int row_begin = (tile - head_row * row_blocks) * Traits::kTileM;
  tma_store<Traits::kDqRows, Traits::kDqColumns>(
      arguments.dq, source,
      {row_begin + (Traits::kSplitDqRows ? part * Traits::kDqRows : 0), head_row % shape.heads_q,
       head_row / shape.heads_q, Traits::kSplitDqRows ? 0 : part * Traits::kDqColumns});
}

// Whether key blocks of a later head wait for this one.
template <class Traits>
__device__ __forceinline__ bool has_converters(const BackwardParams& params,
                                               const BackwardWork<Traits>& work) {
  return work.kv_head(params) + params.dq_lag < params.shape.batch * params.shape.heads_k;
}

// By one thread, when all is added.
template <class Traits>
__device__ __forceinline__ void count_dq_added(const BackwardParams& params,
                                               const BackwardWork<Traits>& work) {
  __threadfence();
  atomicAdd(params.dq_added + work.kv_head(params), 1);
}

// By one thread, before anything is added.
template <class Traits>
__device__ __forceinline__ void wait_for_dq_slot(const BackwardParams& params,
                                                 const BackwardWork<Traits>& work) {
  const int head = work.kv_head(params) - params.dq_slots;
  if (head >= 0) wait_for_count(params.dq_converted + head, key_blocks<Traits>(params));
}

// A key block's share of the KV head that comes dq_lag before its own, a part of a tile at a time:
// by bulk copy into shared memory, rounded, to dQ by bulk copy, and zeros back the same way. So few
// warps, and with few registers, do not wait for each load. What follows from the number of the
// part is worked out where it is needed: with more registers than there are here, ptxas spills in
// the consumers, too.
template <class Traits>
struct DqConverter {
  static constexpr int kParts = Traits::kDqParts;
  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const int kv_head, block;  // whose dQ, and which key block's share

  __device__ __forceinline__ DqConverter(const BackwardArguments& arguments,
                                         typename Traits::SharedStorage& smem,
                                         const BackwardWork<Traits>& work)
      : arguments(arguments),
        smem(smem),
        kv_head(work.kv_head(arguments.params) - arguments.params.dq_lag),
        block(work.coord.block) {}

  // The converters are the last warps of the producer's warpgroup, all that are spare.
  __device__ __forceinline__ static int first_thread(const BackwardParams& params) {
    return params.dq_turn != nullptr ? 96 : 32;
  }
  __device__ __forceinline__ int threads() const {
    return kWarpGroupThreads - first_thread(arguments.params);
  }
  __device__ __forceinline__ bool is_first() const {
    return threadIdx.x == first_thread(arguments.params);
  }
  // Query tile of part n of the share, among those of the KV head.
  __device__ __forceinline__ int tile(int n) const {
    return block + n / kParts * key_blocks<Traits>(arguments.params);
  }
  __device__ __forceinline__ float* sums(int n) const {
    const BackwardParams& params = arguments.params;
    const int place = kv_head % params.dq_slots * query_tiles<Traits>(params) + tile(n);
    return params.dq_accum + int64_t(place) * Traits::kDqElements +
           n % kParts * Traits::kDqPartElements;
  }

  __device__ __forceinline__ void load(int n) const {
    constexpr int kBytes = sizeof(smem.converted.sums);
    smem.barriers.dq_full.arrive_and_expect_tx(kBytes);
    cute::SM90_BULK_COPY_G2S::copy(sums(n), reinterpret_cast<uint64_t*>(&smem.barriers.dq_full),
                                   smem.converted.sums, kBytes);
  }
  // From smem.converted.sums, which becomes zero, to smem.converted.dq.
  __device__ __forceinline__ void round(int threads) const {
    const auto take = [&](int i) {
      float4& x = reinterpret_cast<float4*>(smem.converted.sums)[i];
      const float4 value = x;
      x = make_float4(0.f, 0.f, 0.f, 0.f);
      return value;
    };
    round_dq<Traits, 1>(take, arguments.params.softmax_scale,
                        threadIdx.x + threads - kWarpGroupThreads, threads, smem.converted.dq);
  }
  __device__ __forceinline__ void store(int n) const {
    store_dq<Traits>(arguments, smem.converted.dq,
                     kv_head * query_tiles<Traits>(arguments.params) + tile(n), n % kParts);
    cute::SM90_BULK_COPY_S2G::copy(smem.converted.sums, sums(n), sizeof(smem.converted.sums));
    cute::tma_store_arrive();
    tma_store_wait<0>();
  }

  // `parts`: that the thread block has converted so far.
  __device__ __forceinline__ void run(int& parts) const {
    const BackwardParams& params = arguments.params;
    if (kv_head < 0 || params.shape.seqlen_q == 0) return;  // without rows nobody sets the counters
    wait_for_count(params.dq_added + kv_head, key_blocks<Traits>(params));
    fence_bulk_copies();
    CUTE_NO_UNROLL
    for (int n = 0; tile(n) < query_tiles<Traits>(params); ++n, ++parts) {
      if (is_first()) load(n);
      smem.barriers.dq_full.wait(parts & 1);
      round(threads());
      cutlass::arch::fence_view_async_shared();
      sync_converters(threads());
      if (is_first()) store(recompute(n));
    }
    if (is_first()) {
      wait_for_bulk_writes();
      fence_bulk_copies();
      __threadfence();
      atomicAdd(params.dq_converted + kv_head, 1);
    }
  }
};

// All that the thread block converts. Between two key blocks the one before is counted.
template <class Traits>
__device__ __forceinline__ void run_converter(const BackwardArguments& arguments,
                                              typename Traits::SharedStorage& smem) {
  wait_for_previous_kernel();
  int parts = 0;
  for_each_work<Traits>(smem, [&](const BackwardWork<Traits>& work, int number) {
    const DqConverter<Traits> converter(arguments, smem, work);
    if constexpr (Traits::kDeltaAhead) {
      if (converter.is_first()) count_delta_ahead(arguments.params, smem, work);
    }
    converter.run(parts);
    sync_converters(converter.threads());
    if (converter.is_first() && has_converters(arguments.params, work)) {
      wait_for_end<Traits>(smem, number);
      count_dq_added(arguments.params, work);
    }
    release_work<Traits>(smem, number);
  });
}

inline constexpr int kPostprocessThreads = 256;

// What the thread blocks did not convert. One thread block per tile.
template <class Traits>
__global__ void __launch_bounds__(kPostprocessThreads)
    dq_postprocess_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int kPartElements = Traits::kDqPartElements;
  __shared__ alignas(1024) typename Traits::Element dq[Traits::kDqElements];
  const BackwardParams& params = arguments.params;
  const int tiles = query_tiles<Traits>(params);
  const int tile = params.shape.batch * params.shape.heads_k * tiles - gridDim.x + blockIdx.x;
  const int place = tile - tiles_before_slots<Traits>(params, tile / tiles);
  const float4* sums =
      reinterpret_cast<const float4*>(params.dq_accum + int64_t(place) * Traits::kDqElements);
  wait_for_previous_kernel();
  CUTE_UNROLL
  for (int part = 0; part < Traits::kDqElements / kPartElements; ++part) {
    round_dq<Traits, 8>([&](int i) { return __ldcg(sums + part * (kPartElements / 4) + i); },
                        params.softmax_scale, threadIdx.x, kPostprocessThreads,
                        dq + part * kPartElements);
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    CUTE_UNROLL
    for (int part = 0; part < Traits::kDqElements / kPartElements; ++part) {
      store_dq<Traits>(arguments, dq + part * kPartElements, tile, part);
    }
    tma_store_wait<0>();
  }
}

}  // namespace flash_attn2::sm90
