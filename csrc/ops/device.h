// The running device as the plan sees it.
#pragma once

#include <string>

#include "../plan/device.h"

namespace flash_attn2 {

// Limits of CUDA device `index`, asked from the driver once per device. Raises when the GPU is
// older than sm_80 or when this build holds no code that it runs.
const DeviceLimits& running_device(int index);

// The architectures of this build, as FLASH_ATTN2_ARCHS had them: "80;90a".
std::string built_archs();

}  // namespace flash_attn2
