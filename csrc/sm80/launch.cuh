// Host side of the sm80 family: launches, and the registry rows of an instance file.
#pragma once

#include "../common/backward_preprocess.h"
#include "../core/kernel_row.h"
#include "../core/launch.h"
#include "backward_kernel.cuh"
#include "forward_kernel.cuh"

namespace flash_attn2::sm80 {

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
  launch(backward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream, params,
         "backward");
  launch(dq_postprocess_kernel<Traits>, row_blocks, Traits::kThreads,
         Traits::kQElements * int(sizeof(typename Traits::Element)), stream, params,
         "dQ post-process");
}

template <class Traits>
KernelRow forward_row(int preference) {
  KernelRow row = describe<Traits>("sm80", 80, Direction::kForward, preference);
  row.forward = launch_forward<Traits>;
  return row;
}

template <class Traits>
KernelRow backward_row(int preference) {
  KernelRow row = describe<Traits>("sm80", 80, Direction::kBackward, preference);
  row.backward = launch_backward<Traits>;
  return row;
}

}  // namespace flash_attn2::sm80
