#include "device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

namespace flash_attn2 {
namespace {

struct CachedDevice {
  std::once_flag queried;
  DeviceLimits limits;
  std::string why_unusable;  // empty: usable
};

DeviceLimits query(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  DeviceLimits limits;
  limits.name = "cuda:" + std::to_string(index);
  limits.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                attribute(cudaDevAttrComputeCapabilityMinor);
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  limits.smem_per_block_optin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  return limits;
}

}  // namespace

std::string built_archs() { return FLASH_ATTN2_ARCHS; }

const DeviceLimits& running_device(int index) {
  static std::vector<CachedDevice> devices(c10::cuda::device_count());
  CachedDevice& device = devices.at(index);
  std::call_once(device.queried, [&] {
    device.limits = query(index);
    device.why_unusable = why_unusable(device.limits, built_archs());
  });
  TORCH_CHECK(device.why_unusable.empty(), device.why_unusable);
  return device.limits;
}

}  // namespace flash_attn2
