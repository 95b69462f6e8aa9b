// Step B1 of query rows: D = rowsum(dO * O) - dLSE and L = LSE * log2(e). Neighbouring threads
// share a row, each has 16 bytes of its O and dO.
#pragma once

#include <cmath>

#include "params.h"
#include "softmax.cuh"

namespace flash_attn2 {

inline constexpr int kDeltaChunk = 8;  // elements in 16 bytes

// What a thread has read of a row.
struct DeltaRow {
  uint4 out = {0, 0, 0, 0}, dout = {0, 0, 0, 0};
  float lse = -INFINITY, dlse = 0.f;

  // Of the thread's chunks.
  template <class Element>
  __device__ __forceinline__ float dot() const {
    const Element* const xs = reinterpret_cast<const Element*>(&out);
    const Element* const ys = reinterpret_cast<const Element*>(&dout);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kDeltaChunk; ++i) sum += float(xs[i]) * float(ys[i]);
    return sum;
  }
  // `place`: of the row in L and D. `dot`: of the whole row.
  __device__ __forceinline__ void store(const BackwardParams& params, int64_t place,
                                        float dot) const {
    // +inf makes P = exp2(S - L) vanish: for padding rows and for rows that see no key.
    const bool sees_keys = lse != -INFINITY;
    params.lse_log2[place] = sees_keys ? lse * kLog2e : INFINITY;
    params.delta[place] = sees_keys ? dot - dlse : 0.f;
  }
};

// A thread's chunk of the rows of a query head, from `row` on. Rows from seqlen_q on are padding,
// and columns from head_dim_v on zeros.
template <class Element>
struct DeltaSource {
  const Element *out, *dout;
  int64_t lse_place;
  int rows;  // to the end of the head
  bool has_column;

  // `head`: of all of the batch.
  __device__ __forceinline__ DeltaSource(const BackwardParams& params, int head, int row,
                                         int column) {
    const AttentionShape& shape = params.shape;
    const int batch = head / shape.heads_q;
    const auto find = [&](const TensorView& view) {
      return static_cast<const Element*>(view.ptr) + batch * view.batch_stride +
             (head - batch * shape.heads_q) * view.head_stride + row * view.row_stride + column;
    };
    out = find(params.out);
    dout = find(params.dout);
    lse_place = int64_t(head) * shape.seqlen_q + row;
    rows = shape.seqlen_q - row;
    has_column = column < shape.head_dim_v;
  }
  // The row that comes i after the first one.
  __device__ __forceinline__ DeltaRow load(const BackwardParams& params, int i) const {
    DeltaRow row;
    if (i >= rows) return row;
    if (has_column) {
      row.out = *reinterpret_cast<const uint4*>(out + i * params.out.row_stride);
      row.dout = *reinterpret_cast<const uint4*>(dout + i * params.dout.row_stride);
    }
    row.lse = params.lse[lse_place + i];
    if (params.dlse != nullptr) row.dlse = params.dlse[lse_place + i];
    return row;
  }
};

// Over `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

}  // namespace flash_attn2
