// The sum of dK and dV over the parts of a group of query heads, see head_parts in plan/plan.cpp.
#pragma once

#include "../plan/registry.h"

namespace flash_attn2 {

// dk and dv, which are contiguous, from dk_parts and dv_parts. Starts while the kernels before it
// end.
void launch_add_parts(const BackwardParams& params, DType dtype, CUstream_st* stream);

}  // namespace flash_attn2
