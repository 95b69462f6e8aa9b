#include "../tiles.cuh"

namespace flash_attn2::sm80 {
static const RegisterBackward<cutlass::half_t, 64, 0> row;
}  // namespace flash_attn2::sm80
