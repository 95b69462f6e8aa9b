// Host side of the sm90 backward: tensor maps, launches, and the registry row.
#pragma once

#include "../common/backward_preprocess.h"
#include "../core/kernel_row.h"
#include "../core/launch.h"
#include "backward_kernel.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
BackwardArguments backward_arguments(const BackwardParams& params) {
  constexpr DType kDType = DTypeOf<typename Traits::Element>::kValue;
  const AttentionShape& shape = params.shape;
  const auto queries = [&](const TensorView& view, int columns, int box_columns) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_q, shape.heads_q, columns,
                           Traits::kTileM, box_columns, params.k.ptr);
  };
  const auto keys = [&](const TensorView& view, int columns, int box_rows, int box_columns) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_k, shape.heads_k, columns,
                           box_rows, box_columns, params.k.ptr);
  };
  BackwardArguments arguments;
  arguments.q = queries(params.q, shape.head_dim, kBoxColumns<Traits::kHeadDim>);
  arguments.k = keys(params.k, shape.head_dim, Traits::kTileN, Traits::kBoxK);
  arguments.v = keys(params.v, shape.head_dim_v, Traits::kTileN, kBoxColumns<Traits::kHeadDimV>);
  arguments.dout = queries(params.dout, shape.head_dim_v, kBoxColumns<Traits::kHeadDimV>);
  arguments.dk = keys(params.dk, shape.head_dim, Traits::kGradientKeys, Traits::kBoxK);
  arguments.dv =
      keys(params.dv, shape.head_dim_v, Traits::kGradientKeys, kBoxColumns<Traits::kHeadDimV>);
  const int64_t query_tiles =
      int64_t(shape.batch) * shape.heads_q * ceil_div(shape.seqlen_q, Traits::kTileM);
  arguments.lse = make_row_map(params.lse_log2, query_tiles, Traits::kTileM, params.k.ptr);
  arguments.delta = make_row_map(params.delta, query_tiles, Traits::kTileM, params.k.ptr);
  arguments.params = params;
  return arguments;
}

template <class Traits>
void launch_backward(const BackwardParams& params, const LaunchConfig& config,
                     CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  const int64_t row_blocks =
      int64_t(shape.batch) * shape.heads_q * ceil_div(shape.seqlen_q, Traits::kTileM);
  launch_backward_preprocess(params, DTypeOf<typename Traits::Element>::kValue, Traits::kTileM,
                             Traits::kHeadDim, stream);
  if (config.grid > 0) {  // tensor maps need a key
    launch(backward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream,
           backward_arguments<Traits>(params), "backward", Start::kWithPrevious);
  }
  launch(dq_postprocess_kernel<Traits>, row_blocks, kPostprocessThreads, 0, stream, params,
         "dQ post-process", Start::kWithPrevious);
}

template <class Traits>
KernelRow backward_row(int preference) {
  KernelRow row = describe<Traits>("sm90", 90, Direction::kBackward, preference);
  row.max_arch = 90;
  row.backward = launch_backward<Traits>;
  return row;
}

}  // namespace flash_attn2::sm90
