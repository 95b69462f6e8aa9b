#include "device.h"

#include <algorithm>
#include <cctype>
#include <limits>
#include <stdexcept>
#include <utility>

namespace flash_attn2 {
namespace {

constexpr int kKiB = 1024;
constexpr int64_t kMiB = 1024 * 1024;

// Opt-in shared memory of one block, by compute capability (CUDA programming guide, "Technical
// specifications per compute capability").
constexpr int kSmem80 = 163 * kKiB;
constexpr int kSmem86 = 99 * kKiB;   // also sm_89 and sm_120
constexpr int kSmem90 = 227 * kKiB;  // also sm_100

std::string folded(const std::string& name) {
  std::string result;
  for (const char c : name) {
    if (c == ' ' || c == '-' || c == '_') continue;
    result += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return result;
}

// One entry of an architecture list: "90a" is number 90, suffix 'a'.
struct Arch {
  int number;
  char suffix;  // 'a', 'f' or 0
};

Arch parse_arch(const std::string& entry) {
  const char last = entry.back();
  const bool has_suffix = last == 'a' || last == 'f';
  return {std::stoi(entry), has_suffix ? last : '\0'};
}

bool machine_code_runs(const Arch& built, int device_arch) {
  if (built.suffix == 'a') return built.number == device_arch;
  return built.number / 10 == device_arch / 10 && built.number <= device_arch;
}

}  // namespace

const std::vector<DeviceLimits>& known_devices() {
  static const std::vector<DeviceLimits> devices = {
      {"A100", 80, 108, kSmem80, 40 * kMiB},     {"A30", 80, 56, kSmem80, 24 * kMiB},
      {"A10", 86, 72, kSmem86, 6 * kMiB},        {"A40", 86, 84, kSmem86, 6 * kMiB},
      {"A6000", 86, 84, kSmem86, 6 * kMiB},      {"RTX3090", 86, 82, kSmem86, 6 * kMiB},
      {"L4", 89, 58, kSmem86, 48 * kMiB},        {"L40S", 89, 142, kSmem86, 96 * kMiB},
      {"RTX4090", 89, 128, kSmem86, 72 * kMiB},  {"H100", 90, 132, kSmem90, 50 * kMiB},
      {"H100PCIe", 90, 114, kSmem90, 50 * kMiB}, {"H200", 90, 132, kSmem90, 60 * kMiB},
      {"GH200", 90, 132, kSmem90, 60 * kMiB},    {"B200", 100, 148, kSmem90, 126 * kMiB},
      {"RTX5090", 120, 170, kSmem86, 96 * kMiB},
  };
  return devices;
}

const DeviceLimits& find_device(const std::string& name) {
  const std::string wanted = folded(name);
  std::string names;
  for (const DeviceLimits& device : known_devices()) {
    if (folded(device.name) == wanted) return device;
    names += (names.empty() ? "" : ", ") + device.name;
  }
  throw std::invalid_argument("gpu: is '" + name + "', it must be one of " + names);
}

std::vector<std::string> split_archs(const std::string& archs) {
  std::vector<std::string> entries;
  std::string entry;
  for (const char c : archs + ";") {
    if (c != ';' && c != ',' && c != ' ') {
      entry += c;
    } else if (!entry.empty()) {
      entries.push_back(std::move(entry));
      entry.clear();
    }
  }
  return entries;
}

bool built_for(const std::string& archs, int device_arch) {
  int newest_generic = 0;
  int oldest = std::numeric_limits<int>::max();
  for (const std::string& entry : split_archs(archs)) {
    const Arch arch = parse_arch(entry);
    if (machine_code_runs(arch, device_arch)) return true;
    if (arch.suffix == 0) newest_generic = std::max(newest_generic, arch.number);
    oldest = std::min(oldest, arch.number);
  }
  const int ptx = newest_generic > 0 ? newest_generic : oldest;
  return ptx <= device_arch;
}

std::string why_unusable(const DeviceLimits& device, const std::string& archs) {
  const std::string arch = std::to_string(device.arch);
  const std::string gpu = "q: its device " + device.name + " is sm_" + arch;
  if (device.arch < kOldestArch) {
    return gpu + ", it must be sm_" + std::to_string(kOldestArch) + " or newer";
  }
  if (built_for(archs, device.arch)) return "";
  return gpu + ", it must be one that this build has code for: " + archs +
         ". To build for it, set FLASH_ATTN2_ARCHS=" + arch + (device.arch == 90 ? "a" : "") +
         " and type: pip install .";
}

}  // namespace flash_attn2
