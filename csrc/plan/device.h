// What the plan knows of a GPU: a few numbers, from a table by name (so that a plan can be made
// and tested where no GPU is) or from the running device (csrc/ops/device.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn2 {

constexpr int kOldestArch = 80;

struct DeviceLimits {
  std::string name;
  int arch = 0;                  // compute capability, 10 * major + minor
  int sm_count = 0;              // streaming multiprocessors
  int smem_per_block_optin = 0;  // most dynamic shared memory of one thread block, bytes
  int64_t l2_bytes = 0;
};

// GPUs that a plan can be asked for by name.
const std::vector<DeviceLimits>& known_devices();

// The entry of that name (case, spaces, '-' and '_' do not count: "rtx 4090" is RTX4090).
// Throws std::invalid_argument that lists the known names.
const DeviceLimits& find_device(const std::string& name);

// Whether code built for `archs`, a list like "80;90a" as FLASH_ATTN2_ARCHS has it, runs on a
// device. Machine code for 80 runs on every 8.x, for 90a on 9.0 alone, for 100f on 10.0 and later
// 10.x. The build adds PTX of the newest architecture without a suffix (of the oldest one's base
// where all have a suffix), which everything newer runs.
bool built_for(const std::string& archs, int device_arch);

// "80;90a" -> {"80", "90a"}; separators are ';', ',' and spaces.
std::vector<std::string> split_archs(const std::string& archs);

// Why a build for `archs` cannot serve a device (older than sm_80, or no code that it runs), as an
// error message; empty where it can.
std::string why_unusable(const DeviceLimits& device, const std::string& archs);

}  // namespace flash_attn2
