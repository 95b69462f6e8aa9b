// The producer's side of the sm90 forward (F1): one thread that keeps TMA loads of Q, K and V ahead
// of the consumers, across tiles.
#pragma once

#include "forward_traits.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
struct ForwardProducer {
  using Element = typename Traits::Element;
  const ForwardArguments& arguments;
  typename Traits::TeamStorage& smem;
  const int team;
  Ring<Traits::kStages> ring_k, ring_v;
  uint32_t q_parity = 0;  // of the tile

  // Waits until the consumers have left the buffer, announces its bytes and returns the barrier.
  __device__ __forceinline__ static uint64_t* open(LoadBarrier& full, Barrier& empty,
                                                   uint32_t parity, int elements) {
    empty.wait(parity ^ 1);
    full.arrive_and_expect_tx(elements * int(sizeof(Element)));
    return reinterpret_cast<uint64_t*>(&full);
  }

  __device__ __forceinline__ void load_q(const ForwardTile& tile) {
    for (int group = 0; group < Traits::kGroups; ++group) {
      uint64_t* barrier = open(smem.barriers.q_full[group], smem.barriers.q_empty[group], q_parity,
                               Traits::kQElements);
      tma_load<Traits::kGroupRows, Traits::kHeadDim>(
          arguments.q, barrier, smem.q[group],
          {tile.row_begin + Traits::group_row(group), tile.coord.head, tile.coord.batch});
    }
    q_parity ^= 1;
  }

  template <int kColumns>
  __device__ __forceinline__ static void load_block(const CUtensorMap& map, uint64_t* barrier,
                                                    Element* target, const ForwardTile& tile,
                                                    int block) {
    const TmaCoord at = {block * Traits::kTileN, tile.head_k, tile.coord.batch};
    if constexpr (Traits::kCluster == 1) {
      tma_load<Traits::kTileN, kColumns>(map, barrier, target, at);
    } else {
      tma_load_for_all<Traits::kCluster, Traits::kTileN, kColumns>(map, barrier, target, at);
    }
  }

  __device__ __forceinline__ void load_k(const ForwardTile& tile, int block) {
    const int stage = ring_k.stage();
    uint64_t* barrier = open(smem.barriers.k_full[stage], smem.barriers.k_empty[stage],
                             ring_k.parity(), Traits::kKElements);
    load_block<Traits::kHeadDim>(arguments.k, barrier, smem.k[stage], tile, block);
    ++ring_k.use;
  }

  __device__ __forceinline__ void load_v(const ForwardTile& tile, int block) {
    const int stage = ring_v.stage();
    if constexpr (!Traits::kOwnOutBuffer) {
      if (tile.blocks.end - block <= Traits::kStages) wait_for_output(stage);
    }
    uint64_t* barrier = open(smem.barriers.v_full[stage], smem.barriers.v_empty[stage],
                             ring_v.parity(), Traits::kVElements);
    load_block<Traits::kHeadDimV>(arguments.v, barrier, smem.v[stage], tile, block);
    ++ring_v.use;
  }

  // Until the output of the tile before, if there is one, has left a stage of V. (q_parity is one
  // tile ahead by now.)
  __device__ __forceinline__ void wait_for_output(int stage) {
    smem.barriers.out_empty[stage].wait(q_parity);
  }

  // In the order in which the consumers want them: K runs one block ahead of V.
  __device__ __forceinline__ void run() {
    typename Traits::Schedule schedule(arguments.params, arguments.divisors, team);
    ForwardTile tile;
    while (schedule.next(tile)) {
      const bool any_key = tile.blocks.begin < tile.blocks.end;
      int block = tile.blocks.end - 1;
      if (any_key) load_k(tile, block);
      load_q(tile);  // of every tile: the output may take its place
      CUTE_NO_UNROLL
      for (; block > tile.blocks.begin; --block) {
        load_k(tile, block - 1);
        load_v(tile, block);
      }
      if (any_key) {
        load_v(tile, block);
      } else if constexpr (!Traits::kOwnOutBuffer) {
        for (int stage = 0; stage < Traits::kStages; ++stage) wait_for_output(stage);
      }
    }
  }
};

}  // namespace flash_attn2::sm90
