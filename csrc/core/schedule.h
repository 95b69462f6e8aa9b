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
FLASH_ATTN2_HOST_DEVICE TileCoord forward_tile(unsigned index, int blocks, int heads, int batches,
                                               int heads_per_group) {
  const unsigned tiles_per_group = unsigned(blocks) * heads_per_group;
  const unsigned group = index / tiles_per_group;
  const unsigned in_group = index - group * tiles_per_group;
  const int first_head = group * heads_per_group;
  const int heads_left = heads * batches - first_head;
  const int group_heads = heads_left < heads_per_group ? heads_left : heads_per_group;
  const int rank = in_group / group_heads;
  const int head = first_head + in_group - rank * group_heads;
  return {blocks - 1 - rank, head % heads, head / heads};
}

// Backward order: the key blocks of one head are neighbours (they share Q, dO and the dQ
// accumulator in L2): the first block, the longest under a causal mask, first, or the last one
// where the order of the sums asks for it (core/turn_order.h). But the last `tail_heads` heads go
// side by side, `heads_together` at a time, the first block of each first: else the longest block
// of the last head starts when little else is left, and the GPU waits for it.
FLASH_ATTN2_HOST_DEVICE TileCoord backward_tile(unsigned index, int blocks, int heads, int batches,
                                                int tail_heads, int heads_together,
                                                bool last_block_first) {
  const int first_of_tail = heads * batches - tail_heads;
  int head = index / blocks, block = index - unsigned(head) * blocks;
  if (head < first_of_tail) {
    if (last_block_first) block = blocks - 1 - block;
  } else {
    const int first = first_of_tail + (head - first_of_tail) / heads_together * heads_together;
    const int heads_left = heads * batches - first;
    const int together = heads_left < heads_together ? heads_left : heads_together;
    const unsigned rank = index - unsigned(first) * blocks;
    block = rank / together;
    head = first + int(rank - unsigned(block) * together);
  }
  return {block, head % heads, head / heads};
}

}  // namespace flash_attn2
