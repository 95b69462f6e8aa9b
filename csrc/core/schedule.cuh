// Which tile of which head a thread block works on.
#pragma once

#include "window.h"

namespace flash_attn2 {

struct TileCoord {
  int block, head, batch;
};

// Forward order: heads are taken in groups whose K and V fit in half of the L2 cache; inside a
// group the last query block of every head comes first. With a causal mask that is the longest
// first, so that short blocks fill the tail of the grid.
__device__ __forceinline__ TileCoord forward_tile(int64_t index, int blocks, int heads, int batches,
                                                  int heads_per_group) {
  const int all_heads = heads * batches;
  const int64_t tiles_per_group = int64_t(blocks) * heads_per_group;
  const int group = int(index / tiles_per_group);
  const int in_group = int(index - group * tiles_per_group);
  const int first_head = group * heads_per_group;
  const int group_heads = min(heads_per_group, all_heads - first_head);
  const int rank = in_group / group_heads;
  const int head = first_head + in_group - rank * group_heads;
  return {blocks - 1 - rank, head % heads, head / heads};
}

// Backward order: the key blocks of one head are neighbours (they share Q, dO and the dQ
// accumulator in L2), the first block, the longest under a causal mask, first.
__device__ __forceinline__ TileCoord backward_tile(int64_t index, int blocks, int heads) {
  const int head = int(index / blocks);
  return {int(index - int64_t(head) * blocks), head % heads, head / heads};
}

}  // namespace flash_attn2
