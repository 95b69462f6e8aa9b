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

// Enqueues kernel(params) on the stream, in clusters of `cluster` thread blocks; an empty grid
// launches nothing.
template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int threads, int smem_bytes, cudaStream_t stream,
            const Params& params, const char* what, Start start = Start::kAfterPrevious,
            int cluster = 1) {
  if (grid == 0) return;
  if (smem_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        what);
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (start == Start::kWithPrevious) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(cluster), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), what);
}

}  // namespace flash_attn2
