// In which order a forward takes its tiles: which heads go side by side.
#pragma once

#include "plan.h"

namespace flash_attn2 {

// Sets heads_per_group and, of a persistent grid, tail_heads, groups_turn and rounds_turn of a plan
// that has a row. See core/schedule.h and sm90/schedule.cuh.
void plan_forward_order(Plan& plan, const Problem& problem, const DeviceLimits& device);

}  // namespace flash_attn2
