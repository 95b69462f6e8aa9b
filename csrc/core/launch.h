// Kernel launches with CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flash_attn2 {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("flash_attn2: ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

// Enqueues kernel(params) on the stream; an empty grid launches nothing.
template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int threads, int smem_bytes, cudaStream_t stream,
            const Params& params, const char* what) {
  if (grid == 0) return;
  if (smem_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        what);
  }
  kernel<<<dim3(unsigned(grid)), dim3(unsigned(threads)), size_t(smem_bytes), stream>>>(params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace flash_attn2
