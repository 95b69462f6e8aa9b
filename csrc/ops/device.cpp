#include "device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

namespace flash_attn2 {
namespace {

constexpr int kOldestArch = 80;

struct CachedDevice {
  std::once_flag queried;
  DeviceLimits limits;
  bool usable = false;
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
    device.usable =
        device.limits.arch >= kOldestArch && built_for(built_archs(), device.limits.arch);
  });
  const int arch = device.limits.arch;
  TORCH_CHECK(device.usable || arch >= kOldestArch, "q: the GPU ", device.limits.name, " is sm_",
              arch, ", it must be sm_", kOldestArch, " or newer");
  TORCH_CHECK(device.usable, "q: the GPU ", device.limits.name, " is sm_", arch,
              ", it must be one that this build has code for: ", built_archs(),
              ". To build for it, set FLASH_ATTN2_ARCHS=",
              arch == 90 ? "90a" : std::to_string(arch), " and type: pip install .");
  return device.limits;
}

}  // namespace flash_attn2
