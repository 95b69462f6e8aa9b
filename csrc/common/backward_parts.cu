#include "backward_parts.h"

#include <cutlass/numeric_types.h>

#include "../core/grid_dependency.cuh"
#include "../core/launch.h"

namespace flash_attn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements in 16 bytes

// (rows, head_parts, row_chunks) chunks, to be summed to (rows, row_chunks).
struct Gradient {
  const uint4* parts;
  uint4* sum;
  int64_t chunks;
  int row_chunks;
};
struct AddPartsParams {
  Gradient dk, dv;
  int head_parts;
};

template <class Element>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const __grid_constant__ AddPartsParams params) {
  wait_for_previous_kernel();
  int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool of_dk = index < params.dk.chunks;
  const Gradient& gradient = of_dk ? params.dk : params.dv;
  if (!of_dk) index -= params.dk.chunks;
  if (index >= gradient.chunks) return;
  const int64_t row = index / gradient.row_chunks;
  const uint4* part =
      gradient.parts + (row * (params.head_parts - 1) * gradient.row_chunks + index);
  float sums[kChunk] = {};
  for (int i = 0; i < params.head_parts; ++i, part += gradient.row_chunks) {
    const uint4 chunk = *part;
    const Element* elements = reinterpret_cast<const Element*>(&chunk);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sums[j] += float(elements[j]);
  }
  alignas(16) Element rounded[kChunk];
#pragma unroll
  for (int j = 0; j < kChunk; ++j) rounded[j] = Element(sums[j]);
  gradient.sum[index] = *reinterpret_cast<const uint4*>(rounded);
}

}  // namespace

void launch_add_parts(const BackwardParams& params, DType dtype, CUstream_st* stream) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = int64_t{shape.batch} * shape.seqlen_k * (shape.heads_k / params.head_parts);
  const auto gradient = [rows](const void* parts, void* sum, int columns) {
    const int row_chunks = columns / kChunk;
    return Gradient{static_cast<const uint4*>(parts), static_cast<uint4*>(sum), rows * row_chunks,
                    row_chunks};
  };
  const AddPartsParams all{gradient(params.dk_parts, params.dk.ptr, shape.head_dim),
                           gradient(params.dv_parts, params.dv.ptr, shape.head_dim_v),
                           params.head_parts};
  auto kernel = dtype == DType::kFloat16 ? add_parts_kernel<cutlass::half_t>
                                         : add_parts_kernel<cutlass::bfloat16_t>;
  const int64_t chunks = all.dk.chunks + all.dv.chunks;
  launch(kernel, (chunks + kThreads - 1) / kThreads, kThreads, 0, stream, all, "dK and dV of parts",
         Start::kWithPrevious);
}

}  // namespace flash_attn2
