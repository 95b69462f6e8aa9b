// Which tiles a team of the persistent forward grid works on, in which order. (One team is a thread
// block or a cluster of them, see ForwardTraits.)
#pragma once

#include <cutlass/fast_math.h>

#include "../core/schedule.h"

namespace flash_attn2::sm90 {

// What a team works on at a time.
struct ForwardTile {
  TileCoord coord;
  int head_k;
  int row_begin;      // may be negative, see next()
  BlockRange blocks;  // of keys that some row of the tile sees; if any, at least kMinBlocks
};

// What the schedule divides by, as multiplications: nothing hides a division between two tiles.
struct ScheduleDivisors {
  using Divisor = cutlass::FastDivmod;
  Divisor blocks, tiles_per_group, heads_per_group, tail_heads, heads, heads_per_kv_head;
  int groups = 0;  // before the tail
  int tail_begin = 0, first_tail_head = 0;

  ScheduleDivisors() = default;
  // `blocks`: of query rows, of one head.
  ScheduleDivisors(const ForwardParams& params, int blocks)
      : blocks(blocks),
        tiles_per_group(blocks * params.heads_per_group),  // fits, see the plan
        heads_per_group(params.heads_per_group),
        tail_heads(params.tail_heads),
        heads(params.shape.heads_q),
        heads_per_kv_head(params.shape.heads_q / params.shape.heads_k),
        first_tail_head(params.shape.heads_q * params.shape.batch - params.tail_heads) {
    groups = first_tail_head / params.heads_per_group;
    tail_begin = first_tail_head * blocks;
  }
};

// A static schedule, the same for producer and consumers without a word between them. Rounds of a
// tile for each team of the grid, if rounds_turn every other round backwards, so that the tiles of
// two rounds add up to about the same length for every team.
//
// Tiles lie in groups of heads, in each the longest tiles first, as in core/schedule.h, but the
// last group, the tail, has a size of its own. If groups_turn they alternate: longest tile first in
// the tail, backwards in the group before, so that lengths change slowly from round to round, also
// from group to group, and the last tiles are short. Where a group is a round, that alone makes
// lengths add up.
template <int kTileM, int kTileN, int kWarpRows, int kTeams, int kMinBlocks, int kCluster>
struct ForwardSchedule {
  const ForwardParams& params;
  const ScheduleDivisors& divisors;
  const VisibleKeys visible;
  const int blocks;  // of query rows, of one head
  const unsigned tiles;
  const int team;
  unsigned round = 0;

  __device__ __forceinline__ ForwardSchedule(const ForwardParams& params,
                                             const ScheduleDivisors& divisors, int team)
      : params(params),
        divisors(divisors),
        visible(params.shape, params.window),
        blocks(ceil_div(params.shape.seqlen_q, kTileM)),
        tiles(unsigned(blocks) * params.shape.heads_q * params.shape.batch),
        team(kTeams == 1 ? 0 : team) {}

  // The tile at `index` of that order.
  __device__ __forceinline__ TileCoord coord_of(int index) const {
    int head, rank;
    if (index >= divisors.tail_begin) {
      divisors.tail_heads(rank, head, index - divisors.tail_begin);
      head += divisors.first_tail_head;
    } else if (params.heads_per_group == 1) {
      divisors.blocks(head, rank, index);
    } else {
      int group, in_group;
      divisors.tiles_per_group(group, in_group, index);
      divisors.heads_per_group(rank, head, in_group);
      head += group * params.heads_per_group;
    }
    int batch, head_of_batch;
    divisors.heads(batch, head_of_batch, head);
    return {blocks - 1 - rank, head_of_batch, batch};
  }

  // The next tile; false when there is none.
  __device__ __forceinline__ bool next(ForwardTile& tile) {
    const unsigned rank = kTeams * (blockIdx.x / kCluster) + team;
    const unsigned ranks = kTeams * (gridDim.x / kCluster);
    unsigned index =
        round * ranks + (params.rounds_turn && round % 2 == 1 ? ranks - 1 - rank : rank);
    ++round;
    if (index >= tiles) return false;

    if (params.groups_turn && int(index) < divisors.tail_begin) {
      const unsigned group = divisors.tiles_per_group.div(int(index));
      if ((divisors.groups - group) % 2 == 1) {
        index = (2 * group + 1) * divisors.tiles_per_group.divisor - 1 - index;
      }
    }
    const AttentionShape& shape = params.shape;
    tile.coord = coord_of(int(index));
    tile.head_k = divisors.heads_per_kv_head.div(tile.coord.head);
    // The tiles of a head end with its last row, so that it is the first tile, the shortest under a
    // causal mask, that has rows to spare. Whole warps of them: no store may start before row 0.
    const int end = ceil_div(shape.seqlen_q, kWarpRows) * kWarpRows;
    tile.row_begin = end - (blocks - tile.coord.block) * kTileM;
    tile.blocks = visible.key_blocks(tile.row_begin, kTileM, kTileN);
    const int count = tile.blocks.end - tile.blocks.begin;
    if (count > 0 && count < kMinBlocks) tile.blocks.end += kMinBlocks - count;
    return true;
  }
};

}  // namespace flash_attn2::sm90
