// Which tiles a team of the persistent forward grid works on, in which order. (One team is a thread
// block, see ForwardTraits.)
#pragma once

#include <cutlass/fast_math.h>

#include "../core/schedule.h"

namespace flash_attn2::sm90 {

// What a team works on at a time.
struct ForwardTile {
  TileCoord coord;
  int head_k;
  int row_begin;      // may be negative, see next()
  BlockRange blocks;  // of keys that some row of the tile sees
};

// What the schedule divides by, as multiplications: nothing hides a division between two tiles.
struct ScheduleDivisors {
  using Divisor = cutlass::FastDivmod;
  Divisor blocks, tiles_per_group, heads_per_group, heads, heads_per_kv_head;

  ScheduleDivisors() = default;
  // `blocks`: of query rows, of one head.
  ScheduleDivisors(const ForwardParams& params, int blocks)
      : blocks(blocks),
        tiles_per_group(blocks * params.heads_per_group),  // fits, see the plan
        heads_per_group(params.heads_per_group),
        heads(params.shape.heads_q),
        heads_per_kv_head(params.shape.heads_q / params.shape.heads_k) {}
};

// A static schedule, the same for producer and consumers without a word between them. Rounds of a
// tile for each team of the grid in forward order (core/schedule.h), every other round backwards,
// so that the tiles of two rounds add up to about the same length for every team.
//
// The plan groups heads where a mask makes the tiles of a head so many and so different that this
// is not enough. Groups alternate, too: longest tile first in the last one, backwards in the one
// before, so that lengths change slowly from round to round, also from group to group, and the
// last tiles are short.
template <int kTileM, int kTileN, int kWarpRows, int kTeams>
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

  // core/schedule.h's forward_tile without its divisions.
  __device__ __forceinline__ TileCoord coord_of(int index) const {
    const AttentionShape& shape = params.shape;
    int head, rank;
    if (params.heads_per_group == 1) {
      divisors.blocks(head, rank, index);
    } else {
      int group, in_group;
      divisors.tiles_per_group(group, in_group, index);
      const int first_head = group * params.heads_per_group;
      const int heads_left = shape.heads_q * shape.batch - first_head;
      if (heads_left >= params.heads_per_group) {
        divisors.heads_per_group(rank, head, in_group);
      } else {
        rank = in_group / heads_left;
        head = in_group - rank * heads_left;
      }
      head += first_head;
    }
    int batch, head_of_batch;
    divisors.heads(batch, head_of_batch, head);
    return {blocks - 1 - rank, head_of_batch, batch};
  }

  // The next tile; false when there is none.
  __device__ __forceinline__ bool next(ForwardTile& tile) {
    const unsigned rank = kTeams * blockIdx.x + team, ranks = kTeams * gridDim.x;
    unsigned index = round * ranks + (round % 2 == 0 ? rank : ranks - 1 - rank);
    ++round;
    if (index >= tiles) return false;

    if (params.heads_per_group > 1) {
      const unsigned group = divisors.tiles_per_group.div(int(index));
      const unsigned last_group = divisors.tiles_per_group.div(int(tiles - 1));
      if ((last_group - group) % 2 == 1) {  // so the group has all its tiles
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
    return true;
  }
};

}  // namespace flash_attn2::sm90
