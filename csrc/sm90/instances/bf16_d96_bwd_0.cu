#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // wgmma with N = 48

#include "../backward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterBackward<cutlass::bfloat16_t, 96, 0> row;
}  // namespace flash_attn2::sm90
