// Deterministic mode: the order in which key blocks add to a query block's dQ, and the walks over
// the query blocks that let them do so without waiting. Plain integers, shared by host tests and
// kernels.
//
// The key blocks of a head are taken in groups of neighbours, which run side by side: `group` is
// what the GPU has room for at a time. Groups add in the order of the keys. Inside a group the
// order is that in which the walks arrive:
//
//   - under a mask, each key block walks upwards from the first query block that sees it. A later
//     key block starts at a later query block, so it arrives first where they meet. Blocks that
//     start together then end one after the other, the last key block first, and so start those of
//     the next head, if a head fills the GPU: every other head then walks downwards from the last
//     query block, in the order of the keys, and its blocks end together;
//   - without a mask, the walks start evenly spread over the query blocks and go around: block r of
//     the group's n starts floor(r m / n) of m query blocks before the end. All walks are of one
//     length, so that the key blocks of all heads start in rounds of `group`: those of a head that
//     start in one round are a group, or some would wait for others that start a walk later.
//
// Where heads go side by side (tail_heads), each has its share of the room, and walks upwards.
//
// A block waits only for blocks of earlier groups, or for steps of its own group that come earlier
// (by head, step and r, or by the order of the keys), so none waits for itself in a circle.
#pragma once

#include "window.h"

namespace flash_attn2 {

struct TurnOrder {
  VisibleKeys visible;
  int tile_m, tile_n, key_blocks, group;
  bool around, downwards;  // neither: upwards
  int shift;               // around: place in its round of the head's first key block

  // `head`: of all KV heads of the batch.
  FLASH_ATTN2_HOST_DEVICE TurnOrder(const BackwardParams& params, int tile_m, int tile_n, int head)
      : visible(params.shape, params.window),
        tile_m(tile_m),
        tile_n(tile_n),
        key_blocks(ceil_div(visible.seqlen_k, tile_n)),
        group(params.turn_group),
        around(visible.left < 0 && visible.right < 0),
        downwards(!around && params.turns_alternate && head % 2 == 1),
        shift(around ? unsigned(head) * key_blocks % group : 0) {  // no overflow: see the plan
    const int heads = params.shape.batch * params.shape.heads_k;
    if (head >= heads - params.tail_heads) {
      group = group > params.tail_heads ? group / params.tail_heads : 1;
      downwards = false;
    }
  }

  // Key blocks of the group that `key_block` is in.
  FLASH_ATTN2_HOST_DEVICE BlockRange group_of(int key_block) const {
    const int begin = (key_block + shift) / group * group - shift, end = begin + group;
    return {begin > 0 ? begin : 0, end < key_blocks ? end : key_blocks};
  }

  // Where the walk of `key_block` over the query blocks that see it starts.
  FLASH_ATTN2_HOST_DEVICE int start(int key_block, const BlockRange& query_blocks) const {
    if (downwards) return query_blocks.end - 1;
    if (!around) return query_blocks.begin;
    const BlockRange members = group_of(key_block);
    const unsigned count = members.end - members.begin, r = key_block - members.begin;
    const int ahead = r * query_blocks.end / count;  // no overflow, see the plan
    return ahead == 0 ? 0 : query_blocks.end - ahead;
  }

  // How many key blocks add to the dQ of `query_block` before `key_block`.
  FLASH_ATTN2_HOST_DEVICE int turn(int key_block, int query_block) const {
    const BlockRange members = group_of(key_block);
    if (!around) {
      const BlockRange keys = visible.key_blocks(query_block * tile_m, tile_m, tile_n);
      if (downwards) return key_block - keys.begin;
      const int begin = members.begin > keys.begin ? members.begin : keys.begin;
      const int end = members.end < keys.end ? members.end : keys.end;
      return (begin - keys.begin) + (end - 1 - key_block);
    }
    // The walks that go around before they arrive are first, in the order of the keys.
    const int count = members.end - members.begin, r = key_block - members.begin;
    const unsigned blocks = ceil_div(visible.seqlen_q, tile_m);
    const int first = ((blocks - query_block) * count + blocks - 1) / blocks;
    return members.begin + (r >= first ? r - first : r + count - first);
  }
};

}  // namespace flash_attn2
