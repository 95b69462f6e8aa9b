// Tensor maps and the bulk copies that use them. Every map sees a (batch, seqlen, heads, head_dim)
// tensor as coordinates (column, row, head, batch) and moves boxes of kBoxColumns columns, one
// swizzle span, so a tile of head_dim columns is a row of slabs, each (rows, kBoxColumns).
// Out of bounds, loads fill zeros and stores write nothing: rows past the sequence's end never
// reach the next sequence, and a head_dim below the kernel's bucket needs no other care. A load may
// start at a negative row, a store may not.
#pragma once

#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "../core/launch.h"
#include "../core/params.h"
#include "../plan/registry.h"

namespace flash_attn2::sm90 {

// Columns of one swizzle span of 16-bit elements: 128 bytes, or 64 or 32 where more do not divide.
template <int kColumns>
inline constexpr int kBoxColumns = kColumns % 64 == 0   ? 64
                                   : kColumns % 32 == 0 ? 32
                                                        : 16;

inline CUtensorMapSwizzle tensor_map_swizzle(int box_columns) {
  return box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
         : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                             : CU_TENSOR_MAP_SWIZZLE_32B;
}

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("flash_attn2: the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

inline CUtensorMap encode_tensor_map(CUtensorMapDataType type, int rank, void* base,
                                     const cuuint64_t* extents, const cuuint64_t* strides,
                                     const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = [&] {
    return tensor_map_encoder()(&map, type, cuuint32_t(rank), base, extents, strides, box,
                                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // this is the thread's first call to CUDA
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    result = encode();
  }
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("flash_attn2: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(result)));
  }
  return map;
}

inline cuuint64_t at_least_one(int64_t extent) { return cuuint64_t(extent > 0 ? extent : 1); }

// The map of `view`, (batch, rows, heads, columns). A tensor without elements is never read, but
// its map has to be valid: `fallback`, any aligned device address, stands in for its pointer.
inline CUtensorMap make_tensor_map(const TensorView& view, DType dtype, int batch, int rows,
                                   int heads, int columns, int box_rows, int box_columns,
                                   void* fallback) {
  constexpr int64_t kElementBytes = 2;
  // A dimension of one element may come with any stride; the encoder wants multiples of 16 bytes.
  const auto bytes = [](int64_t stride, int extent) {
    return cuuint64_t(extent > 1 ? stride * kElementBytes : 16);
  };
  const cuuint64_t extents[4] = {cuuint64_t(columns), at_least_one(rows), at_least_one(heads),
                                 at_least_one(batch)};
  const cuuint64_t strides[3] = {bytes(view.row_stride, rows), bytes(view.head_stride, heads),
                                 bytes(view.batch_stride, batch)};
  const cuuint32_t box[4] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, 1};
  return encode_tensor_map(
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, rows == 0 ? fallback : view.ptr, extents, strides, box, tensor_map_swizzle(box_columns));
}

// The map of contiguous fp32 numbers, (count, length): boxes are whole rows.
inline CUtensorMap make_row_map(float* base, int64_t count, int length, void* fallback) {
  const cuuint64_t extents[2] = {cuuint64_t(length), at_least_one(count)};
  const cuuint64_t strides[1] = {length * sizeof(float)};
  const cuuint32_t box[2] = {cuuint32_t(length), 1};
  return encode_tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, count == 0 ? fallback : base,
                           extents, strides, box, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// Where a tile starts in its tensor.
struct TmaCoord {
  int row, head, batch;
  int column = 0;
};

// Starts the load of a (kRows, kColumns) tile; `barrier` counts its bytes. One thread calls this.
template <int kRows, int kColumns, int kBox = kBoxColumns<kColumns>, class Element>
__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t* barrier, Element* smem,
                                         const TmaCoord& at) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBox) {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 smem + column * kRows, at.column + column, at.row, at.head,
                                 at.batch);
  }
}

// Brings it into L2.
template <int kColumns, int kBox = kBoxColumns<kColumns>>
__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map, const TmaCoord& at) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBox) {
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, at.column + column, at.row, at.head, at.batch);
  }
}

// The same for every thread block of a cluster: each loads the part of kRows / kCluster rows that
// its rank names, into the same place of all, whose barriers at `barrier` count the bytes.
template <int kCluster, int kRows, int kColumns, class Element>
__device__ __forceinline__ void tma_load_for_all(const CUtensorMap& map, uint64_t* barrier,
                                                 Element* smem, const TmaCoord& at) {
  constexpr int kBox = kBoxColumns<kColumns>;
  const int row = int(cute::block_rank_in_cluster()) * (kRows / kCluster);
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBox) {
    cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&map, barrier, uint16_t((1 << kCluster) - 1),
                                           uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                           smem + column * kRows + row * kBox, at.column + column,
                                           at.row + row, at.head, at.batch);
  }
}

// Starts the copy of `bytes` of shared memory to thread block `rank` of the cluster. `target`, and
// `barrier`, which counts them there, are given as the addresses of this thread block's own.
__device__ __forceinline__ void copy_to_peer(const void* source, void* target, uint64_t* barrier,
                                             int bytes, int rank) {
  const auto remote = [rank](void* address) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(mapped)
                 : "r"(cute::cast_smem_ptr_to_uint(address)), "r"(rank));
    return mapped;
  };
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote(target)),
      "r"(cute::cast_smem_ptr_to_uint(source)), "r"(bytes), "r"(remote(barrier))
      : "memory");
}

// Starts the load of row `row` of a make_row_map.
__device__ __forceinline__ void tma_load_row(const CUtensorMap& map, uint64_t* barrier, float* smem,
                                             int row) {
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                               smem, 0, row);
}

// Starts the store of a box's rows of a (kRows, kColumns) tile, whose first element is `smem`.
template <int kRows, int kColumns, int kBox = kBoxColumns<kColumns>, class Element>
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const Element* smem,
                                          const TmaCoord& at) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBox) {
    cute::SM90_TMA_STORE_4D::copy(&map, smem + column * kRows, at.column + column, at.row, at.head,
                                  at.batch);
  }
  cute::tma_store_arrive();
}

}  // namespace flash_attn2::sm90
