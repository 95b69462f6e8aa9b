// Tile building blocks of the sm80 family: cp.async tile loads, ldmatrix-fed mma.sync products,
// accumulator views and tile stores.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
#include <type_traits>

#include "../core/params.h"

namespace flash_attn2::sm80 {

using namespace cute;

// Shared-memory tiles keep head_dim (or the key dimension) contiguous in 8-row atoms whose 16-byte
// chunks are XOR-swizzled with the row, so that ldmatrix, its transposed form and 16-byte copies
// meet no bank conflicts. An atom row is 64 columns, or 32 where 64 does not divide the width.
template <int kColumns>
struct SwizzledAtom {
  static constexpr int kWidth = kColumns % 64 == 0 ? 64 : 32;
  using Type =
      decltype(composition(Swizzle<(kWidth == 64 ? 3 : 2), 3, 3>{},
                           Layout<cute::Shape<_8, Int<kWidth>>, Stride<Int<kWidth>, _1>>{}));
};
template <int kRows, int kColumns>
using SmemTile = decltype(tile_to_shape(typename SwizzledAtom<kColumns>::Type{},
                                        cute::Shape<Int<kRows>, Int<kColumns>>{}));

// (rows, columns) tile seen as (columns, rows).
template <class Tile>
using Transposed = decltype(composition(
    Tile{}, make_layout(make_shape(size<1>(Tile{}), size<0>(Tile{})), GenRowMajor{})));

// Threads of a block over the 16-byte chunks of a tile: neighbours along head_dim first.
template <class Atom, int kHeadDim, int kThreads>
struct RowCopy {
  static constexpr int kChunk = 8;  // fp16/bf16 elements in 16 bytes
  static constexpr int kThreadsPerRow = SwizzledAtom<kHeadDim>::kWidth / kChunk;
  using Type = decltype(make_tiled_copy(
      Atom{},
      Layout<cute::Shape<Int<kThreads / kThreadsPerRow>, Int<kThreadsPerRow>>,
             Stride<Int<kThreadsPerRow>, _1>>{},
      Layout<cute::Shape<_1, Int<kChunk>>>{}));
};

// Rows [row_begin, row_begin + kRows) of one head of `view`: a (kRows, kHeadDim) tensor.
template <class Element, int kRows, int kHeadDim>
__device__ __forceinline__ auto global_tile(const TensorView& view, int batch, int head,
                                            int row_begin) {
  Element* base = static_cast<Element*>(view.ptr) + batch * view.batch_stride +
                  head * view.head_stride + row_begin * view.row_stride;
  return make_tensor(make_gmem_ptr(base), cute::Shape<Int<kRows>, Int<kHeadDim>>{},
                     make_stride(view.row_stride, _1{}));
}

// Starts the asynchronous copy of a (rows, head_dim) tile; rows from `rows` on and columns from
// `head_dim` on are filled with zeros and not read. The source pointer walks down the rows: offsets
// kept per row would cost two registers each for the whole kernel.
template <class Element, int kHeadDim, int kThreads, class Global, class Shared>
__device__ __forceinline__ void load_tile(const Global& global, Shared&& shared, int thread,
                                          int rows, int head_dim) {
  using CopyOp = SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>;
  using Rows = RowCopy<Copy_Atom<CopyOp, Element>, kHeadDim, kThreads>;
  constexpr int kRowStep = kThreads / Rows::kThreadsPerRow;
  constexpr int kColumnStep = Rows::kThreadsPerRow * Rows::kChunk;
  auto target = typename Rows::Type{}.get_slice(thread).partition_D(shared);  // (8, rows, columns)
  const int column = thread % Rows::kThreadsPerRow * Rows::kChunk;
  int row = thread / Rows::kThreadsPerRow;
  const int64_t row_stride = stride<0>(global);
  const Element* source = raw_pointer_cast(global.data()) + row * row_stride + column;
  CUTE_UNROLL
  for (int m = 0; m < size<1>(target); ++m, row += kRowStep, source += kRowStep * row_stride) {
    CUTE_UNROLL
    for (int k = 0; k < size<2>(target); ++k) {
      CopyOp::copy(*reinterpret_cast<const uint128_t*>(source + k * kColumnStep),
                   *reinterpret_cast<uint128_t*>(raw_pointer_cast(&target(0, m, k))),
                   row < rows && column + k * kColumnStep < head_dim);
    }
  }
}

// Writes the valid part of a (rows, head_dim) tile from shared to global memory.
template <class Element, int kHeadDim, int kThreads, class Shared, class Global>
__device__ __forceinline__ void store_tile(const Shared& shared, Global&& global, int thread,
                                           int rows, int head_dim) {
  using Atom = Copy_Atom<UniversalCopy<uint128_t>, Element>;
  typename RowCopy<Atom, kHeadDim, kThreads>::Type tiled_copy;
  auto thr_copy = tiled_copy.get_slice(thread);
  auto source = thr_copy.partition_S(shared);
  auto target = thr_copy.partition_D(global);
  auto coords = thr_copy.partition_D(make_identity_tensor(shape(global)));
  CUTE_UNROLL
  for (int m = 0; m < size<1>(source); ++m) {
    if (get<0>(coords(0, m, 0)) >= rows) continue;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(source); ++k) {
      if (get<1>(coords(0, 0, k)) < head_dim) copy(Atom{}, source(_, m, k), target(_, m, k));
    }
  }
}

// m16n8k16 mma.sync, fp32 accumulators, kWarpsM x kWarpsN warps; a warp owns 16 rows and 16
// columns of each (16 * kWarpsM) x (16 * kWarpsN) step.
template <class Element, int kWarpsM, int kWarpsN>
struct WarpMma {
  using Atom = std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                                  MMA_Atom<SM80_16x8x16_F32F16F16F32_TN>,
                                  MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>>;
  using Type = TiledMMA<Atom, Layout<cute::Shape<Int<kWarpsM>, Int<kWarpsN>, _1>>,
                        Tile<Int<16 * kWarpsM>, Int<16 * kWarpsN>, _16>>;
};

using LoadMatrix = SM75_U32x4_LDSM_N;
using LoadMatrixTransposed = SM75_U16x8_LDSM_T;

// One operand of a product: a shared-memory tile and how ldmatrix reads it. `Op` is
// LoadMatrixTransposed where the tile is the transposed view of what lies in memory.
template <class Op, class Tensor_>
struct Operand {
  Tensor_ tile;  // (M or N, K)

  static constexpr auto extents() {
    return cute::Shape<Int<decltype(size<0>(tile))::value>, Int<decltype(size<1>(tile))::value>>{};
  }
};
template <class Op, class Tensor_>
__device__ __forceinline__ Operand<Op, Tensor_> operand(const Tensor_& tile) {
  return {tile};
}

// B of a product, read from shared memory 16 columns by 16 of K at a time.
template <class Mma, class Op, class Tile>
struct StreamedB {
  using Element = typename Tile::value_type;
  using Atom = Copy_Atom<Op, Element>;
  static constexpr auto kExtents = Operand<Op, Tile>::extents();

  decltype(make_tensor<Element>(partition_shape_B(Mma{}, kExtents))) fragment;
  decltype(make_tiled_copy_B(Atom{}, Mma{}).get_thread_slice(0).partition_S(std::declval<Tile>()))
      source;

  static constexpr int kColumnPairs = decltype(size<1>(fragment))::value / 2;
  static constexpr int kSteps = decltype(size<2>(fragment))::value;

  __device__ __forceinline__ StreamedB(const Tile& tile, int thread)
      : source(make_tiled_copy_B(Atom{}, Mma{}).get_thread_slice(thread).partition_S(tile)) {}

  // Columns [16 n, 16 n + 16) of the warp's share, at step k of K.
  __device__ __forceinline__ void load(int n, int k) {
    auto target = make_tiled_copy_B(Atom{}, Mma{}).get_thread_slice(0).retile_D(fragment);
    copy(Atom{}, source(_, n, k), target(_, n, k));
  }
};

// acc (M, N) += A (M, K) * B (N, K)^T, with fragments read from shared memory kAhead steps of K
// ahead of the tensor cores: a small, constant number of registers whatever the tile. Step k of K
// finds A's fragments in fragment_a(_, _, k), which load_a(k) puts there.
template <int kAhead, class Acc, class Mma, class FragmentA, class LoadA, class OpB, class TileB>
__device__ __forceinline__ void gemm_streamed(Acc& acc, Mma mma, const FragmentA& fragment_a,
                                              LoadA load_a, const Operand<OpB, TileB>& b,
                                              int thread) {
  StreamedB<Mma, OpB, TileB> streamed(b.tile, thread);
  constexpr int kPairs = decltype(streamed)::kColumnPairs;
  constexpr int kSteps = decltype(streamed)::kSteps;
  constexpr int kRowTiles = decltype(size<1>(acc))::value;
  CUTE_UNROLL
  for (int k = 0; k < kAhead && k < kSteps; ++k) {
    load_a(k);
    CUTE_UNROLL
    for (int n = 0; n < kPairs; ++n) streamed.load(n, k);
  }
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    CUTE_UNROLL
    for (int n = 0; n < kPairs; ++n) {
      if (n == 0 && k + kAhead < kSteps) load_a(k + kAhead);
      if (k + kAhead < kSteps) streamed.load(n, k + kAhead);
      CUTE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        gemm(mma, fragment_a(_, m, k), streamed.fragment(_, 2 * n, k), acc(_, m, 2 * n));
        gemm(mma, fragment_a(_, m, k), streamed.fragment(_, 2 * n + 1, k), acc(_, m, 2 * n + 1));
      }
    }
  }
}

// Both operands in shared memory.
template <int kAhead, class Acc, class Mma, class OpA, class TileA, class OpB, class TileB>
__device__ __forceinline__ void gemm_ss(Acc& acc, Mma mma, const Operand<OpA, TileA>& a,
                                        const Operand<OpB, TileB>& b, int thread) {
  using Element = typename TileA::value_type;
  using Atom = Copy_Atom<OpA, Element>;
  auto copy_a = make_tiled_copy_A(Atom{}, mma).get_thread_slice(thread);
  auto fragment_a = make_tensor<Element>(partition_shape_A(mma, a.extents()));
  auto source_a = copy_a.partition_S(a.tile);
  auto target_a = copy_a.retile_D(fragment_a);
  const auto load_a = [&](int k) { copy(Atom{}, source_a(_, _, k), target_a(_, _, k)); };
  gemm_streamed<kAhead>(acc, mma, fragment_a, load_a, b, thread);
}

// A already in registers.
template <int kAhead, class Acc, class Mma, class FragmentA, class OpB, class TileB>
__device__ __forceinline__ void gemm_rs(Acc& acc, Mma mma, const FragmentA& fragment_a,
                                        const Operand<OpB, TileB>& b, int thread) {
  gemm_streamed<kAhead>(acc, mma, fragment_a, [](int) {}, b, thread);
}

// Reads the A fragments of a whole (M, K) tile.
template <class Mma, class Op, class Tile>
__device__ __forceinline__ auto load_fragment_a(Mma mma, const Operand<Op, Tile>& a, int thread) {
  using Element = typename Tile::value_type;
  auto copy_a = make_tiled_copy_A(Copy_Atom<Op, Element>{}, mma).get_thread_slice(thread);
  auto fragment = make_tensor<Element>(partition_shape_A(mma, a.extents()));
  copy(Copy_Atom<Op, Element>{}, copy_a.partition_S(a.tile), copy_a.retile_D(fragment));
  return fragment;
}

// Accumulators ((2, 2), MMA_M, MMA_N) seen as (rows, columns) of this thread.
template <class Layout_>
__device__ __forceinline__ auto rows_columns_layout(Layout_ acc) {
  auto split = logical_divide(acc, cute::Shape<_2>{});  // ((2, 2), MMA_M, MMA_N)
  return make_layout(make_layout(get<0, 1>(split), get<1>(split)),
                     make_layout(get<0, 0>(split), get<2>(split)));
}
template <class Tensor_>
__device__ __forceinline__ auto rows_columns(Tensor_&& acc) {
  return make_tensor(std::forward<Tensor_>(acc).data(), rows_columns_layout(acc.layout()));
}

// The accumulators of a product as the A operand of the next: ((2, 2), MMA_M, MMA_N) becomes
// ((2, 2, 2), MMA_M, MMA_N / 2). Registers only; no data moves between threads.
template <class Tensor_>
__device__ __forceinline__ auto as_operand_a(Tensor_&& acc) {
  auto pairs = logical_divide(acc.layout(), cute::Shape<Underscore, Underscore, _2>{});
  auto layout = make_layout(make_layout(get<0, 0>(pairs), get<0, 1>(pairs), get<2, 0>(pairs)),
                            get<1>(pairs), get<2, 1>(pairs));
  return make_tensor(acc.data(), layout);
}

template <class Element, class Tensor_>
__device__ __forceinline__ auto convert(const Tensor_& source) {
  constexpr int kCount = decltype(size(source))::value;
  cutlass::NumericArrayConverter<Element, float, kCount> converter;
  auto values = converter(*reinterpret_cast<const cutlass::Array<float, kCount>*>(source.data()));
  auto result = make_tensor<Element>(source.layout());
  CUTE_UNROLL
  for (int i = 0; i < kCount; ++i) result.data()[i] = values[i];
  return result;
}

// Accumulators, converted to Element, to a shared tile. (stmatrix measures no faster here.)
template <class Element, class Mma, class Acc, class Tile>
__device__ __forceinline__ void store_accumulators(Mma mma, const Acc& acc, Tile&& tile,
                                                   int thread) {
  using Atom = Copy_Atom<UniversalCopy<uint32_t>, Element>;
  auto thr_copy = make_tiled_copy_C(Atom{}, mma).get_thread_slice(thread);
  auto values = convert<Element>(acc);
  copy(Atom{}, thr_copy.retile_S(values), thr_copy.partition_D(tile));
}

}  // namespace flash_attn2::sm80
