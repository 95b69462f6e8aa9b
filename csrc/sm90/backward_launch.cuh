// Host side of the sm90 backward: tensor maps, launches, and the registry row.
#pragma once

#include <algorithm>

#include "../common/backward_parts.h"
#include "../common/backward_preprocess.h"
#include "../core/kernel_row.h"
#include "../core/launch.h"
#include "backward_kernel.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
BackwardArguments backward_arguments(const BackwardParams& params) {
  constexpr DType kDType = DTypeOf<typename Traits::Element>::kValue;
  const AttentionShape& shape = params.shape;
  // Any device address, for the maps of tensors without elements.
  void* const fallback = shape.seqlen_k > 0 ? params.k.ptr : params.lse_log2;
  const auto queries = [&](const TensorView& view, int columns, int box_columns,
                           int box_rows = Traits::kTileM / Traits::kCluster) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_q, shape.heads_q, columns,
                           box_rows, box_columns, fallback);
  };
  const auto keys = [&](const TensorView& view, int heads, int columns, int box_rows,
                        int box_columns) {
    return make_tensor_map(view, kDType, shape.batch, shape.seqlen_k, heads, columns, box_rows,
                           box_columns, fallback);
  };
  const int heads_k = shape.heads_k / params.head_parts;
  const auto gradient = [&](const TensorView& sum, void* parts, int columns) {
    if (params.head_parts == 1) return sum;
    const int64_t row_stride = int64_t{shape.heads_k} * columns;
    return TensorView{parts, shape.seqlen_k * row_stride, row_stride, columns};
  };
  BackwardArguments arguments;
  arguments.q = queries(params.q, shape.head_dim, kBoxColumns<Traits::kHeadDim>);
  arguments.k = keys(params.k, heads_k, shape.head_dim, Traits::kTileN, Traits::kBoxK);
  arguments.v =
      keys(params.v, heads_k, shape.head_dim_v,
           Traits::kWholeHeads ? Traits::kKeys : Traits::kTileN, kBoxColumns<Traits::kHeadDimV>);
  arguments.dout = queries(params.dout, shape.head_dim_v, kBoxColumns<Traits::kHeadDimV>);
  arguments.dq =
      queries(params.dq, shape.head_dim, kBoxColumns<Traits::kDqColumns>, Traits::kDqRows);
  arguments.dk = keys(gradient(params.dk, params.dk_parts, shape.head_dim), shape.heads_k,
                      shape.head_dim, Traits::kGradientKeys, Traits::kBoxK);
  arguments.dv = keys(gradient(params.dv, params.dv_parts, shape.head_dim_v), shape.heads_k,
                      shape.head_dim_v, Traits::kGradientKeys, kBoxColumns<Traits::kHeadDimV>);
  const int64_t query_tiles =
      int64_t(shape.batch) * shape.heads_q * ceil_div(shape.seqlen_q, Traits::kTileM);
  arguments.lse = make_row_map(params.lse_log2, query_tiles, Traits::kTileM, fallback);
  arguments.delta = make_row_map(params.delta, query_tiles, Traits::kTileM, fallback);
  arguments.params = params;
  return arguments;
}

template <class Traits>
void launch_backward(const BackwardParams& params, const LaunchConfig& config,
                     CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  // The last KV heads' query tiles are left for the post-process; without keys, all; none where
  // dQ is made in shared memory.
  const int kv_heads = shape.batch * shape.heads_k;
  const int heads_left = Traits::kWholeHeads                  ? 0
                         : Traits::kDqRing && config.grid > 0 ? std::min(params.dq_lag, kv_heads)
                                                              : kv_heads;
  const int64_t tiles_left = int64_t(heads_left) * (shape.heads_q / shape.heads_k) *
                             ceil_div(shape.seqlen_q, Traits::kTileM);
  launch_backward_preprocess(params, DTypeOf<typename Traits::Element>::kValue, Traits::kTileM,
                             Traits::kHeadDim, stream);
  if (config.grid == 0 && tiles_left == 0) return;
  const BackwardArguments arguments = backward_arguments<Traits>(params);
  launch(backward_kernel<Traits>, config.grid, Traits::kThreads, config.smem_bytes, stream,
         arguments, "backward", Start::kWithPrevious, Traits::kCluster);
  launch(dq_postprocess_kernel<Traits>, tiles_left, kPostprocessThreads, 0, stream, arguments,
         "dQ post-process", Start::kWithPrevious);
  if (params.head_parts > 1) {
    launch_add_parts(params, DTypeOf<typename Traits::Element>::kValue, stream);
  }
}

template <class Traits>
KernelRow backward_row(int preference) {
  KernelRow row = describe<Traits>("sm90", 90, Direction::kBackward, preference);
  row.max_arch = 90;
  row.head_rows = Traits::kHeadTiles * Traits::kTileM;
  row.dq_ring = Traits::kDqRing;
  row.delta_ahead = Traits::kDeltaAhead;
  row.persistent = Traits::kPersistent;
  row.max_keys = row.max_unmasked_keys = Traits::kMaxKeys;
  row.cluster = Traits::kCluster;
  if (row.cluster > 1) row.name += "_x" + std::to_string(row.cluster);
  row.backward = launch_backward<Traits>;
  return row;
}

}  // namespace flash_attn2::sm90
