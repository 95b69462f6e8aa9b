// Which tile of which head a thread block works on.
#pragma once

#include "window.h"

namespace flash_attn2 {

struct TileCoord {
  int block, head, batch;
};

// Forward order: heads are taken in groups; inside a group the last query block of every head comes
// first. With a causal mask that is the longest first, so that short blocks fill the tail of the
// grid. With one head a group, the thread blocks that run at a time share a few heads' K and V.
// index < blocks * heads * batches <= 2^31 - 1, see the plan.
__device__ __forceinline__ TileCoord forward_tile(unsigned index, int blocks, int heads,
                                                  int batches, int heads_per_group) {
  const unsigned tiles_per_group = unsigned(blocks) * heads_per_group;
  const unsigned group = index / tiles_per_group;
  const unsigned in_group = index - group * tiles_per_group;
  const int first_head = group * heads_per_group;
  const int group_heads = min(heads_per_group, heads * batches - first_head);
  const int rank = in_group / group_heads;
  const int head = first_head + in_group - rank * group_heads;
  return {blocks - 1 - rank, head % heads, head / heads};
}

// Backward order: the key blocks of one head are neighbours (they share Q, dO and the dQ
// accumulator in L2), the first block, the longest under a causal mask, first.
__device__ __forceinline__ TileCoord backward_tile(unsigned index, int blocks, int heads) {
  const int head = index / blocks;
  return {int(index - unsigned(head) * blocks), head % heads, head / heads};
}

}  // namespace flash_attn2
