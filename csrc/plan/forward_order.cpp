#include "forward_order.h"

#include <algorithm>
#include <numeric>

#include "../core/window.h"
#include "tiles.h"

namespace flash_attn2 {
namespace {

// See heads_of_group, plan_persistent_groups and even_groups.
constexpr int64_t kHeadsOfGroup = 16;
constexpr int64_t kMostTilesOfHead = 16;
constexpr int64_t kManyRounds = 7;
constexpr int kTallestHeadByHead = 128;
constexpr int kTeamsLookedAt = 5;
constexpr int64_t kRoundsLookedAt = 64;
constexpr double kNearlyEven = 1.01;

// How many query heads may run side by side so that their K and V stay in half of the L2 cache;
// the other half is for Q, out and whatever else passes. Whole groups of query heads that share a
// KV head, one at least.
int heads_that_share_l2(const AttentionShape& shape, int64_t l2_bytes) {
  const int64_t query_heads = int64_t{shape.batch} * shape.heads_q;
  const int64_t group = shape.heads_q / shape.heads_k;
  const int64_t kv_head_bytes =
      kBytesPerElement * shape.seqlen_k * (shape.head_dim + shape.head_dim_v);
  if (kv_head_bytes == 0) return static_cast<int>(std::max<int64_t>(query_heads, 1));
  const int64_t kv_heads = std::max<int64_t>(l2_bytes / 2 / kv_head_bytes, 1);
  return static_cast<int>(std::max<int64_t>(std::min(kv_heads * group, query_heads), 1));
}

// Head by head, the thread blocks that run at a time read the same K and V, which halves what L2
// has to deliver. Tiles of different lengths want the longest ones of some heads first.
int heads_of_group(const AttentionShape& shape, const Window& window, const DeviceLimits& device) {
  if (tiles_are_equal(window)) return 1;
  const int64_t group = shape.heads_q / shape.heads_k;
  return static_cast<int>(std::min<int64_t>(heads_that_share_l2(shape, device.l2_bytes),
                                            ceil_div(kHeadsOfGroup, group) * group));
}

// Groups of a persistent grid that turn (sm90/schedule.cuh).
struct Groups {
  int64_t heads;  // query heads of each
  bool rounds_turn;
};

// The steps of the busiest team, by some of the teams and, where there are many heads, by those of
// the last rounds. A tile takes one for each of its key blocks, and about one to begin and to end.
int64_t steps_of_busiest_team(const KernelRow& row, const Problem& problem, int64_t teams,
                              const Groups& groups) {
  const int64_t heads = groups.heads;
  const AttentionShape& shape = problem.shape;
  const VisibleKeys visible(shape, problem.window);
  const int64_t blocks = query_tiles(row, shape);
  const int64_t query_heads =
      std::min(int64_t{shape.batch} * shape.heads_q, ceil_div(kRoundsLookedAt * teams, blocks));
  const int64_t tail = (query_heads - 1) % heads + 1, tail_begin = (query_heads - tail) * blocks;
  const auto steps = [&](int64_t index) {
    int64_t rank = (index - tail_begin) / tail;
    if (index < tail_begin) {
      const int64_t tiles_of_group = heads * blocks, in_group = index % tiles_of_group;
      const bool backwards = (tail_begin / tiles_of_group - index / tiles_of_group) % 2 == 1;
      rank = (backwards ? tiles_of_group - 1 - in_group : in_group) / heads;
    }
    const int row_begin = static_cast<int>(blocks - 1 - rank) * rows_of_tile(row);
    const BlockRange keys = visible.key_blocks(row_begin, rows_of_tile(row), row.tile_n);
    return std::max(keys.end - keys.begin, 0) + 1;
  };
  int64_t most = 0;
  for (int i = 0; i < kTeamsLookedAt; ++i) {
    const int64_t team = (teams - 1) * i / (kTeamsLookedAt - 1);
    int64_t sum = 0;
    for (int64_t round = 0, first = 0; first < query_heads * blocks; ++round, first += teams) {
      const int64_t index =
          first + (groups.rounds_turn && round % 2 == 1 ? teams - 1 - team : team);
      if (index < query_heads * blocks) sum += steps(index);
    }
    most = std::max(most, sum);
  }
  return most;
}

// What the heads of a group read of K and V should stay in L2, for reading it from memory again
// takes power, and teams should have about the same steps. As a rule they do in groups of one round
// whose rounds do not turn, and of an even number of rounds that do. The smallest of some groups
// that come out about as even as the best; at most what L2 holds, or about 16 heads.
Groups even_groups(const KernelRow& row, const Problem& problem, int64_t teams,
                   const DeviceLimits& device) {
  const AttentionShape& shape = problem.shape;
  const int64_t query_heads = int64_t{shape.batch} * shape.heads_q;
  const int64_t kv_group = shape.heads_q / shape.heads_k;
  const auto whole_kv_groups = [&](int64_t heads) { return ceil_div(heads, kv_group) * kv_group; };
  int64_t most = std::max<int64_t>(heads_that_share_l2(shape, device.l2_bytes),
                                   whole_kv_groups(kHeadsOfGroup));
  most = ceil_div(query_heads, ceil_div(query_heads, most));
  most = std::min(whole_kv_groups(most), query_heads);

  std::vector<Groups> choices;
  std::vector<int64_t> steps;
  const auto consider = [&](const Groups& groups) {
    choices.push_back(groups);
    steps.push_back(steps_of_busiest_team(row, problem, teams, groups));
  };
  const int64_t tiles_of_kv_head = query_tiles(row, shape) * kv_group;
  for (int64_t rounds : {1, 2, 4, 6, 8}) {
    const int64_t kv_heads = (rounds * teams + tiles_of_kv_head / 2) / tiles_of_kv_head;
    const int64_t heads = kv_heads * kv_group;
    if (heads >= most) break;
    if (heads > 0) consider({heads, rounds > 1});
  }
  consider({most, true});
  const int64_t least = *std::min_element(steps.begin(), steps.end());
  size_t i = 0;
  while (steps[i] > kNearlyEven * least) ++i;
  return choices[i];
}

// For a persistent grid, whose tiles are shared out beforehand: the heads of a group, and those of
// the last one. Tiles of different lengths come out even head by head only where there are many of
// them and few a head, in rounds of the teams that repeat: what is left after these, and no less
// than a round, goes side by side at the end, where the short tiles make up for each other. Between
// two bounds of a window most tiles of a head have one length, so that there may be many of them,
// too. And it is worth it only where the products are most of the work: not in the tall tiles of
// small head dims. Else heads go in groups (even_groups), all together where there are few tiles.
// docs/performance.md has the shares of idle time.
void plan_persistent_groups(Plan& plan, const Problem& problem, const DeviceLimits& device) {
  const KernelRow& row = *plan.row;
  const AttentionShape& shape = problem.shape;
  const int64_t query_heads = int64_t{shape.batch} * shape.heads_q;
  const int64_t tiles = query_tiles(row, shape);
  plan.tail_heads = 1;
  if (!is_masked(problem.window) || tiles * query_heads == 0) return;
  const int64_t teams = clusters_at_a_time(row, device) * row.teams;
  const int64_t rounds = tiles * query_heads / teams;
  if (rounds < kManyRounds) {
    plan.heads_per_group = plan.tail_heads = static_cast<int>(query_heads);
  } else if (row.tile_m <= kTallestHeadByHead &&
             (tiles <= kMostTilesOfHead || tiles_are_equal(problem.window))) {
    const int64_t heads_that_repeat = std::lcm(tiles, 2 * teams) / tiles;
    int64_t tail = query_heads % heads_that_repeat;
    if (0 < tail && tail * tiles < teams) tail += heads_that_repeat;
    plan.tail_heads = static_cast<int>(std::clamp<int64_t>(tail, 1, query_heads));
  } else {
    const Groups groups = even_groups(row, problem, teams, device);
    plan.heads_per_group = static_cast<int>(groups.heads);
    plan.tail_heads = static_cast<int>((query_heads - 1) % groups.heads + 1);
    plan.groups_turn = true;
    plan.rounds_turn = groups.rounds_turn;
  }
}

}  // namespace

void plan_forward_order(Plan& plan, const Problem& problem, const DeviceLimits& device) {
  if (plan.row->persistent) {
    plan_persistent_groups(plan, problem, device);
  } else {
    plan.heads_per_group = heads_of_group(problem.shape, problem.window, device);
  }
}

}  // namespace flash_attn2
