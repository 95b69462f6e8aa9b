// Host side of the sm80 family: launches, and the registry rows of an instance file.
#pragma once

#include "../common/backward_preprocess.h"
#include "../core/launch.h"
#include "../plan/registry.h"
#include "backward_kernel.cuh"
#include "forward_kernel.cuh"

namespace flash_attn2::sm80 {

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

template <class Traits>
KernelRow describe(Direction direction, int preference) {
  using DTypeTraits = DTypeOf<typename Traits::Element>;
  KernelRow row;
  row.name = std::string("sm80_") + (direction == Direction::kForward ? "fwd_" : "bwd_") +
             DTypeTraits::kName + "_d" + std::to_string(Traits::kHeadDim) + "_" +
             std::to_string(Traits::kTileM) + "x" + std::to_string(Traits::kTileN);
  row.family = "sm80";
  row.direction = direction;
  row.dtype = DTypeTraits::kValue;
  row.head_dim = Traits::kHeadDim;
  row.tile_m = Traits::kTileM;
  row.tile_n = Traits::kTileN;
  row.threads = Traits::kThreads;
  row.smem_bytes = Traits::kSmemBytes;
  row.min_arch = 80;
  row.preference = preference;
  return row;
}

template <class Traits>
void launch_forward(const ForwardParams& params, const LaunchConfig& config, CUstream_st* stream) {
  launch(forward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream, params,
         "forward");
}

template <class Traits>
void launch_backward(const BackwardParams& params, const LaunchConfig& config,
                     CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  const int64_t row_blocks =
      int64_t(shape.batch) * shape.heads_q * ceil_div(shape.seqlen_q, Traits::kTileM);
  launch_backward_preprocess(params, DTypeOf<typename Traits::Element>::kValue, Traits::kTileM,
                             Traits::kHeadDim, stream);
  if (params.dq_turn != nullptr) {
    check_cuda(cudaMemsetAsync(params.dq_turn, 0, row_blocks * sizeof(int), stream), "dq_turn");
    check_cuda(cudaMemsetAsync(params.ticket, 0, sizeof(int), stream), "ticket");
  }
  launch(backward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream, params,
         "backward");
  launch(dq_postprocess_kernel<Traits>, row_blocks, Traits::kThreads,
         Traits::kQElements * int(sizeof(typename Traits::Element)), stream, params,
         "dQ post-process");
}

template <class Traits>
KernelRow forward_row(int preference) {
  KernelRow row = describe<Traits>(Direction::kForward, preference);
  row.forward = launch_forward<Traits>;
  return row;
}

template <class Traits>
KernelRow backward_row(int preference) {
  KernelRow row = describe<Traits>(Direction::kBackward, preference);
  row.backward = launch_backward<Traits>;
  return row;
}

}  // namespace flash_attn2::sm80
