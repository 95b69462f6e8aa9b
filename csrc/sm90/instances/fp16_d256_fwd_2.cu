#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // wgmma with N = 80

#include "../forward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterForward<cutlass::half_t, 256, 2> row;
}  // namespace flash_attn2::sm90
