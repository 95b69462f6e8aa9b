#include "../tiles.cuh"

namespace flash_attn2::sm80 {
static const RegisterForward<cutlass::half_t, 128, 0> row;
}  // namespace flash_attn2::sm80
