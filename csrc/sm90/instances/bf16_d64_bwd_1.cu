#include "../backward_tiles.cuh"

namespace flash_attn2::sm90 {
static const RegisterBackward<cutlass::bfloat16_t, 64, 1> row;
}  // namespace flash_attn2::sm90
