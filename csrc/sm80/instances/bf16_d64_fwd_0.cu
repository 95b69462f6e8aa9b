#include "../tiles.cuh"

namespace flash_attn2::sm80 {
static const RegisterForward<cutlass::bfloat16_t, 64, 0> row;
}  // namespace flash_attn2::sm80
