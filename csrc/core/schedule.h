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
// accumulator in L2), the first one, the longest under a causal mask, first. But the last
// `tail_heads` heads go side by side, `heads_together` at a time, the first block of each first:
// else the longest block of the last head starts when little else is left, and the GPU waits for
// it. Where the order of the sums asks for it (core/turn_order.h), so do the other heads,
// `heads_in_reverse` at a time (0: one by one), the last block of each first.
FLASH_ATTN2_HOST_DEVICE TileCoord backward_tile(unsigned index, int blocks, int heads, int batches,
                                                int tail_heads, int heads_together,
                                                int heads_in_reverse) {
  const int first_of_tail = heads * batches - tail_heads;
  int head = index / blocks, block = index - unsigned(head) * blocks;
  const bool in_tail = head >= first_of_tail;
  if (in_tail || heads_in_reverse > 0) {
    const int begin = in_tail ? first_of_tail : 0, end = in_tail ? heads * batches : first_of_tail;
    const int together = in_tail ? heads_together : heads_in_reverse;
    const int first = begin + (head - begin) / together * together;
    const int side_by_side = end - first < together ? end - first : together;
    const unsigned place = index - unsigned(first) * blocks;
    const int rank = place / side_by_side;
    head = first + int(place - unsigned(rank) * side_by_side);
    block = in_tail ? rank : blocks - 1 - rank;
  }
  return {block, head % heads, head / heads};
}

}  // namespace flash_attn2
