// Host side of the sm90 family: tensor maps, launches, and the registry rows of an instance file.
#pragma once

#include "../core/kernel_row.h"
#include "../core/launch.h"
#include "forward_kernel.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
void launch_forward(const ForwardParams& params, const LaunchConfig& config, CUstream_st* stream) {
  if (config.grid == 0) return;  // an empty tensor has no map
  constexpr DType kDType = DTypeOf<typename Traits::Element>::kValue;
  const AttentionShape& shape = params.shape;
  const auto queries = [&](const TensorView& view, int columns, int box_rows, int box_columns) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_q, shape.heads_q, columns,
                           box_rows, box_columns, params.out.ptr);
  };
  const auto keys = [&](const TensorView& view, int columns, int box_columns) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_k, shape.heads_k, columns,
                           Traits::kPartRows, box_columns, params.out.ptr);
  };
  ForwardArguments arguments;
  arguments.params = params;
  arguments.divisors = {params, ceil_div(shape.seqlen_q, Traits::kClusterRows)};
  constexpr int kBoxQ = kBoxColumns<Traits::kHeadDim>, kBoxV = kBoxColumns<Traits::kHeadDimV>;
  arguments.q = queries(params.q, shape.head_dim, Traits::kGroupRows, kBoxQ);
  arguments.k = keys(params.k, shape.head_dim, kBoxQ);
  arguments.v = keys(params.v, shape.head_dim_v, kBoxV);
  arguments.out = queries(params.out, shape.head_dim_v, Traits::kWarpRows, kBoxV);
  launch(forward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream,
         arguments, "forward", Start::kAfterPrevious, Traits::kCluster);
}

template <class Traits>
KernelRow forward_row(int preference) {
  KernelRow row = describe<Traits>("sm90", 90, Direction::kForward, preference);
  row.max_arch = 90;
  row.persistent = true;
  row.teams = Traits::kTeams;
  row.max_keys = Traits::kMaxKeys;
  row.max_unmasked_keys = Traits::kMaxUnmaskedKeys;
  row.cluster = Traits::kCluster;
  if (row.cluster > 1) row.name += "_x" + std::to_string(row.cluster);
  row.forward = launch_forward<Traits>;
  return row;
}

}  // namespace flash_attn2::sm90
