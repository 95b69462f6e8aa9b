#include "../tiles.cuh"

namespace flash_attn2::sm80 {
static const RegisterBackward<cutlass::bfloat16_t, 96, 0> row;
}  // namespace flash_attn2::sm80
