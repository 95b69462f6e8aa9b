// Which tiles a thread block of the persistent forward grid works on, in which order.
#pragma once

#include "../core/schedule.cuh"

namespace flash_attn2::sm90 {

// What one thread block works on at a time.
struct ForwardTile {
  TileCoord coord;
  int head_k;
  int row_begin;      // may be negative, see next()
  BlockRange blocks;  // of keys that some row of the tile sees
};

// A static schedule, the same for producer and consumers without a word between them. Rounds of
// gridDim.x tiles in forward order (core/schedule.cuh), every other round backwards, so that the
// tiles of two rounds add up to about the same length for every thread block.
//
// The plan groups heads where a mask makes the tiles of a head so many and so different that this
// is not enough. Groups alternate, too: longest tile first in the last one, backwards in the one
// before, so that lengths change slowly from round to round, also from group to group, and the
// last tiles are short.
template <int kTileM, int kTileN, int kWarpRows>
struct ForwardSchedule {
  const ForwardParams& params;
  const VisibleKeys visible;
  const int blocks;  // of query rows, of one head
  const unsigned tiles, tiles_per_group;
  unsigned round = 0;

  __device__ __forceinline__ explicit ForwardSchedule(const ForwardParams& params)
      : params(params),
        visible(params.shape, params.window),
        blocks(ceil_div(params.shape.seqlen_q, kTileM)),
        tiles(unsigned(blocks) * params.shape.heads_q * params.shape.batch),
        tiles_per_group(unsigned(blocks) * params.heads_per_group) {}

  // The next tile; false when there is none.
  __device__ __forceinline__ bool next(ForwardTile& tile) {
    const unsigned first = round * gridDim.x;
    unsigned index = first + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    ++round;
    if (index >= tiles) return false;

    if (params.heads_per_group > 1) {
      const unsigned group = index / tiles_per_group;
      if (((tiles - 1) / tiles_per_group - group) % 2 == 1) {  // so the group has all its tiles
        index = (2 * group + 1) * tiles_per_group - 1 - index;
      }
    }
    const AttentionShape& shape = params.shape;
    tile.coord = forward_tile(index, blocks, shape.heads_q, shape.batch, params.heads_per_group);
    tile.head_k = tile.coord.head / (shape.heads_q / shape.heads_k);
    // The tiles of a head end with its last row, so that it is the first tile, the shortest under a
    // causal mask, that has rows to spare. Whole warps of them: no store may start before row 0.
    const int end = ceil_div(shape.seqlen_q, kWarpRows) * kWarpRows;
    tile.row_begin = end - (blocks - tile.coord.block) * kTileM;
    tile.blocks = visible.key_blocks(tile.row_begin, kTileM, kTileN);
    return true;
  }
};

}  // namespace flash_attn2::sm90
