// The registry row of a kernel, from its traits.
#pragma once

#include <cutlass/numeric_types.h>

#include <string>

#include "../plan/registry.h"

namespace flash_attn2 {

template <class Element>
struct DTypeOf;
template <>
struct DTypeOf<cutlass::half_t> {
  static constexpr DType kValue = DType::kFloat16;
  static constexpr const char* kName = "fp16";
};
template <>
struct DTypeOf<cutlass::bfloat16_t> {
  static constexpr DType kValue = DType::kBFloat16;
  static constexpr const char* kName = "bf16";
};

// All but the launch function and what only some families have.
template <class Traits>
KernelRow describe(const char* family, int min_arch, Direction direction, int preference) {
  using DTypeTraits = DTypeOf<typename Traits::Element>;
  KernelRow row;
  row.name = std::string(family) + (direction == Direction::kForward ? "_fwd_" : "_bwd_") +
             DTypeTraits::kName + "_d" + std::to_string(Traits::kHeadDim);
  if (Traits::kHeadDimV != Traits::kHeadDim) row.name += "_v" + std::to_string(Traits::kHeadDimV);
  row.name += "_" + std::to_string(Traits::kTileM) + "x" + std::to_string(Traits::kTileN);
  row.family = family;
  row.direction = direction;
  row.dtype = DTypeTraits::kValue;
  row.head_dim = Traits::kHeadDim;
  row.head_dim_v = Traits::kHeadDimV;
  row.tile_m = Traits::kTileM;
  row.tile_n = Traits::kTileN;
  row.threads = Traits::kThreads;
  row.smem_bytes = Traits::kSmemBytes;
  row.min_arch = min_arch;
  row.preference = preference;
  return row;
}

}  // namespace flash_attn2
