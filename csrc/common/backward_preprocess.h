// Step B1, shared by the kernel families.
#pragma once

#include "../plan/registry.h"

namespace flash_attn2 {

// D = rowsum(dO * O) - dLSE and LSE * log2(e) for every query row of the first delta_lead KV heads
// (padding rows: 0 and +inf), and a zeroed dQ accumulator of head_dim_rounded floats a row; tile_m
// is the row padding. The counters and the ticket in the workspace are zeroed, too.
void launch_backward_preprocess(const BackwardParams& params, DType dtype, int tile_m,
                                int head_dim_rounded, CUstream_st* stream);

}  // namespace flash_attn2
