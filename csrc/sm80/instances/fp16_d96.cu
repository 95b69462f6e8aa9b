#include "../tiles.cuh"

namespace flash_attn2::sm80 {
static const RegisterKernels<cutlass::half_t, 96> rows;
}  // namespace flash_attn2::sm80
