#include "../forward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterForward<cutlass::half_t, 96, 0> row;
}  // namespace flash_attn2::sm90
