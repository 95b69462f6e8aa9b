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

enum class Start {
  kAfterPrevious,  // when all that was enqueued before has ended
  kWithPrevious,   // maybe earlier, see grid_dependency.cuh
};

// Enqueues kernel(params) on the stream; an empty grid launches nothing.
template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int threads, int smem_bytes, cudaStream_t stream,
            const Params& params, const char* what, Start start = Start::kAfterPrevious) {
  if (grid == 0) return;
  if (smem_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        what);
  }
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(smem_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start == Start::kWithPrevious ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), what);
}

}  // namespace flash_attn2
