// The loads of a thread block that takes whole heads, by a thread each for Q, for V, dO, L and D,
// and for K: none waits for another's buffer.
#pragma once

#include "backward_head.cuh"
#include "backward_producer.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct HeadLoads {
  using Producer = BackwardProducer<Traits>;
  const BackwardArguments& arguments;
  typename Traits::SharedStorage& smem;

  // Work `number` of the thread block: the key blocks of one head, then those of the head that
  // comes a grid later.
  __device__ __forceinline__ unsigned index_of(int number) const {
    const int blocks = key_blocks<Traits>(arguments.params), round = number / blocks;
    return (blockIdx.x + round * gridDim.x) * blocks + (number - round * blocks);
  }

  // Hands out the work, too.
  __device__ __forceinline__ void run_q() const {
    Stage<Traits::kStages> at;
    CUTE_NO_UNROLL
    for (int number = 0;; ++number) {
      if (hand_out_work<Traits>(arguments.params, smem, number, index_of(number))) return;
      const BackwardWork<Traits>& work = smem.work[number % Traits::kWorks];
      const BlockRange blocks = work.blocks;
      const TileCoord coord = work.coord;
      CUTE_NO_UNROLL
      for (int block = blocks.end - 1; block >= blocks.begin; --block, at = at.next()) {
        smem.barriers.q_empty[at.index].wait(at.parity ^ 1);
        uint64_t* full = Producer::open(smem.barriers.q_full[at.index], sizeof(smem.q[0]));
        tma_load<Traits::kTileM, Traits::kHeadDim>(
            arguments.q, full, smem.q[at.index], {block * Traits::kTileM, coord.head, coord.batch});
      }
    }
  }

  __device__ __forceinline__ void run_dout() const {
    wait_for_previous_kernel();  // which makes L and D
    Stage<Traits::kDoutStages> at;
    const auto open = [&](int bytes) {
      smem.barriers.dout_empty[at.index].wait(at.parity ^ 1);
      return Producer::open(smem.barriers.dout_full[at.index], bytes);
    };
    for_each_work<Traits>(smem, [&](const BackwardWork<Traits>& work, int number) {
      CUTE_NO_UNROLL
      for (int i = 0; i < kConsumers; ++i, at = at.next()) {
        uint64_t* full = open(sizeof(smem.dout[0]));
        tma_load<Traits::kKeys, Traits::kHeadDimV>(
            arguments.v, full, smem.dout[at.index],
            {work.key_begin + i * Traits::kKeys, work.coord.head, work.coord.batch});
      }
      const int tiles = query_tiles<Traits>(arguments.params);
      const int first_tile = work.kv_head(arguments.params) * tiles;
      CUTE_NO_UNROLL
      for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block, at = at.next()) {
        uint64_t* full = open(sizeof(smem.dout[0]) + sizeof(smem.delta[0]) + sizeof(smem.lse[0]));
        tma_load<Traits::kTileM, Traits::kHeadDimV>(
            arguments.dout, full, smem.dout[at.index],
            {block * Traits::kTileM, work.coord.head, work.coord.batch});
        tma_load_row(arguments.lse, full, smem.lse[at.index], first_tile + block);
        tma_load_row(arguments.delta, full, smem.delta[at.index], first_tile + block);
      }
      release_work<Traits>(smem, number);
    });
  }

  __device__ __forceinline__ void run_k() const {
    for_each_work<Traits>(smem, [&](const BackwardWork<Traits>& work, int number) {
      if (number > 0) wait_for_end<Traits>(smem, number - 1);
      const Producer producer{arguments, smem, work, 0};
      producer.load_k();
      release_work<Traits>(smem, number);
      prefetch_keys(index_of(number + 1));
    });
  }
  // K and V into L2. Q and dO are not worth it: they would drive others out.
  __device__ __forceinline__ void prefetch_keys(unsigned index) const {
    if (index >= key_tiles<Traits>(arguments.params)) return;
    const TileCoord coord = tile_of<Traits>(arguments.params, index);
    const int key_begin = coord.block * Traits::kTileN;
    tma_prefetch<Traits::kHeadDim, Traits::kBoxK>(arguments.k,
                                                  {key_begin, coord.head, coord.batch});
    CUTE_UNROLL
    for (int i = 0; i < kConsumers; ++i) {
      tma_prefetch<Traits::kHeadDimV>(arguments.v,
                                      {key_begin + i * Traits::kKeys, coord.head, coord.batch});
    }
  }
};

// By the producer's warpgroup.
template <class Traits>
__device__ __forceinline__ void load_heads(const BackwardArguments& arguments,
                                           typename Traits::SharedStorage& smem) {
  const HeadLoads<Traits> loads{arguments, smem};
  if (threadIdx.x == 0) loads.run_q();
  if (threadIdx.x == 32) loads.run_dout();
  if (threadIdx.x == 64) loads.run_k();
}

}  // namespace flash_attn2::sm90
