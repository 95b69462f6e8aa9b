// Deterministic mode: the order in which key blocks add to a query block's dQ, and the walks over
// the query blocks that let them do so without waiting. Plain integers, shared by host tests and
// kernels.
//
// Heads of the tail, which go side by side (core/schedule.h): in the order of the keys. All walks
// go downwards from the last query block, and a key block starts when those of the other heads have
// started since the one before, which is that much ahead.
//
// Other heads, under a mask: the last key block first, as they start. Each walks upwards from the
// first query block that sees it. A later key block starts sooner, by as much as those of the heads
// that go side by side with its own take to start, and at a later query block, so where two meet it
// is ahead by both.
//
// So far a key block waits only for ones of lower index, which start first.
//
// Other heads, without a mask: the key blocks are taken in groups of neighbours, which run side by
// side: `group` is what the GPU has room for at a time. Groups add in the order of the keys. Inside
// a group the walks start evenly spread over the query blocks and go around: block r of the group's
// n starts floor(r m / n) of m query blocks before the end, and the order is that in which they
// arrive. All walks are of one length, so that the key blocks of all heads start in rounds of
// `group`: those of a head that start in one round are a group, or some would wait for others that
// start a walk later. A block waits only for blocks of earlier groups, or for steps of its own
// group that come earlier (by head, step and r), so none waits for itself in a circle.
#pragma once

#include "window.h"

namespace flash_attn2 {

struct TurnOrder {
  VisibleKeys visible;
  int tile_m, tile_n, key_blocks, group;
  bool downwards, around;  // the walks; neither: upwards
  int shift;               // around: place in its round of the head's first key block

  // `head`: of all KV heads of the batch.
  FLASH_ATTN2_HOST_DEVICE TurnOrder(const BackwardParams& params, int tile_m, int tile_n, int head)
      : visible(params.shape, params.window),
        tile_m(tile_m),
        tile_n(tile_n),
        key_blocks(ceil_div(visible.seqlen_k, tile_n)),
        group(params.turn_group),
        downwards(head >= params.shape.batch * params.shape.heads_k - params.tail_heads),
        around(!downwards && visible.left < 0 && visible.right < 0),
        shift(around ? unsigned(head) * key_blocks % group : 0) {}  // no overflow: see the plan

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
    if (!around) {
      const BlockRange keys = visible.key_blocks(query_block * tile_m, tile_m, tile_n);
      return downwards ? key_block - keys.begin : keys.end - 1 - key_block;
    }
    // The walks that go around before they arrive are first, in the order of the keys.
    const BlockRange members = group_of(key_block);
    const int count = members.end - members.begin, r = key_block - members.begin;
    const unsigned blocks = ceil_div(visible.seqlen_q, tile_m);
    const int first = ((blocks - query_block) * count + blocks - 1) / blocks;
    return members.begin + (r >= first ? r - first : r + count - first);
  }
};

}  // namespace flash_attn2
