#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // wgmma with N = 112

#include "../forward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterForward<cutlass::bfloat16_t, 192, 0> row;
}  // namespace flash_attn2::sm90
