// What a plan counts in: the tiles of a kernel row, the clusters that a GPU runs at a time.
#pragma once

#include "plan.h"

namespace flash_attn2 {

inline constexpr int64_t kBytesPerElement = 2;  // fp16 and bf16

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_masked(const Window& window) { return window.left >= 0 || window.right >= 0; }

// Whether most tiles of a head see about as many keys.
inline bool tiles_are_equal(const Window& window) {
  return (window.left < 0) == (window.right < 0);
}

// Query rows that work together: of a thread block, or of a forward cluster, which shares a tile.
inline int rows_of_tile(const KernelRow& row) {
  return row.direction == Direction::kForward ? row.tile_m * row.cluster : row.tile_m;
}

inline int64_t query_tiles(const KernelRow& row, const AttentionShape& shape) {
  return ceil_div(shape.seqlen_q, rows_of_tile(row));
}

inline int64_t clusters_at_a_time(const KernelRow& row, const DeviceLimits& device) {
  return device.sm_count / row.cluster;
}

}  // namespace flash_attn2
