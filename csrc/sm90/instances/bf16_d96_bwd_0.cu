#include "../backward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterBackward<cutlass::bfloat16_t, 96, 0> row;
}  // namespace flash_attn2::sm90
