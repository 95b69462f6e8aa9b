#include "registry.h"

#include <utility>

namespace flash_attn2 {
namespace {

// A function-local static is built on first use, so it does not matter in which order the
// instance files' static RegisterKernel objects are initialised.
std::vector<KernelRow>& mutable_rows() {
  static std::vector<KernelRow> rows;
  return rows;
}

}  // namespace

const std::vector<KernelRow>& kernel_rows() { return mutable_rows(); }

RegisterKernel::RegisterKernel(KernelRow row) { mutable_rows().push_back(std::move(row)); }

}  // namespace flash_attn2
