// Tile building blocks of the sm90 family: shared-memory tiles that TMA writes and wgmma reads,
// wgmma products, accumulator conversion and stores.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

#include "tma.cuh"
#include "wgmma.h"

namespace flash_attn2::sm90 {

using namespace cute;

// Keeps the compiler from computing what follows from x once, before the loop, to hold it in
// registers that the loop has not got.
__device__ __forceinline__ int recompute(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A zero that ptxas does not know, for the same purpose: `recompute` leaves no instruction behind.
// For converged warps.
__device__ __forceinline__ int opaque_zero() {
  unsigned lanes;
  asm volatile("activemask.b32 %0;" : "=r"(lanes));
  return int(~lanes);
}

// (rows, columns) tile, columns contiguous, in slabs of all rows by kBox columns: one swizzle span
// and one TMA box each.
template <int kRows, int kColumns, int kBox = kBoxColumns<kColumns>, class Element>
__device__ __forceinline__ auto smem_tile(Element* base) {
  using Atom = std::conditional_t<kBox == 64, GMMA::Layout_K_SW128_Atom<Element>,
                                  std::conditional_t<kBox == 32, GMMA::Layout_K_SW64_Atom<Element>,
                                                     GMMA::Layout_K_SW32_Atom<Element>>>;
  return make_tensor(make_smem_ptr(base),
                     tile_to_shape(Atom{}, cute::Shape<Int<kRows>, Int<kColumns>>{}));
}

// The same memory seen as (columns, rows).
template <class Tile>
__device__ __forceinline__ auto transposed(const Tile& tile) {
  constexpr int kRows = decltype(size<0>(tile))::value, kColumns = decltype(size<1>(tile))::value;
  return make_tensor(
      tile.data(), composition(tile.layout(), make_layout(cute::Shape<Int<kColumns>, Int<kRows>>{},
                                                          Stride<Int<kRows>, _1>{})));
}

// Part (i, j) of a tile that is divided into parts of kRows x kColumns.
template <int kRows, int kColumns, class Tile>
__device__ __forceinline__ auto part(const Tile& tile, int i, int j) {
  return local_tile(tile, cute::Shape<Int<kRows>, Int<kColumns>>{}, make_coord(i, j));
}

// CuTe has wgmmas of 8, 16, 32, 64, 96, 128, 192 and 256 columns; asked for others it takes a
// narrower one without a word. wgmma.h adds some, for A from shared memory.
constexpr bool cute_has_wgmma(int columns) {
  return columns == 8 || columns == 16 || columns == 32 || columns == 64 || columns == 96 ||
         columns == 128 || columns == 192 || columns == 256;
}
template <class Operation, int kColumns>
struct Wgmma {
  using TiledMma = decltype(make_tiled_mma(Operation{}));
  static_assert(size<1>(typename TiledMma::AtomShape_MNK{}) == kColumns,
                "no wgmma of so many columns: add it to wgmma.h");
};
template <class Element, int kRows, int kColumns, Major kMajorA, Major kMajorB>
constexpr auto smem_operation() {
  if constexpr (cute_has_wgmma(kColumns)) {
    return GMMA::ss_op_selector<Element, Element, float,
                                cute::Shape<Int<kRows>, Int<kColumns>, _16>, kMajorA, kMajorB>();
  } else {
    return SmemWgmma<Element, kColumns, kMajorA, kMajorB>{};
  }
}

// One warpgroup's product with kRows x kColumns results; A from shared memory, or from registers.
template <class Element, int kRows, int kColumns, Major kMajorA, Major kMajorB>
using SmemMma =
    typename Wgmma<decltype(smem_operation<Element, kRows, kColumns, kMajorA, kMajorB>()),
                   kColumns>::TiledMma;
template <class Element, int kRows, int kColumns, Major kMajorB>
using RegisterMma =
    typename Wgmma<decltype(GMMA::rs_op_selector<Element, Element, float,
                                                 cute::Shape<Int<kRows>, Int<kColumns>, _16>,
                                                 Major::K, kMajorB>()),
                   kColumns>::TiledMma;

template <class Mma, int kRows, int kColumns>
using Accumulator = decltype(partition_fragment_C(Mma{}, cute::Shape<Int<kRows>, Int<kColumns>>{}));

// Descriptors of a shared-memory tile as an operand: the same for all threads.
template <class Mma, class Tile>
__device__ __forceinline__ auto operand_a(const Tile& tile) {
  const auto slice = Mma{}.get_thread_slice(0);
  return slice.make_fragment_A(slice.partition_A(tile));
}
template <class Mma, class Tile>
__device__ __forceinline__ auto operand_b(const Tile& tile) {
  const auto slice = Mma{}.get_thread_slice(0);
  return slice.make_fragment_B(slice.partition_B(tile));
}

enum class Accumulate { kNo, kYes };

// Starts acc (M, N) (+)= A (M, K) B (N, K)^T, in a group that is not closed yet. Fragments: A and B
// descriptors of shared-memory tiles, or A in registers.
template <class Mma, Accumulate kAccumulate, class A, class B, class Acc>
__device__ __forceinline__ void issue_gemm(A& a, const B& b, Acc& acc) {
  Mma mma;
  warpgroup_fence_operand(acc);
  if constexpr (!std::is_same_v<typename A::value_type, GmmaDescriptor>) warpgroup_fence_operand(a);
  warpgroup_arrive();
  mma.accumulate_ = kAccumulate == Accumulate::kYes ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    gemm(mma, a(_, _, k), b(_, _, k), acc);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
}

// The same, as a group of its own for finish_gemm.
template <class Mma, Accumulate kAccumulate, class A, class B, class Acc>
__device__ __forceinline__ void start_gemm(A& a, const B& b, Acc& acc) {
  issue_gemm<Mma, kAccumulate>(a, b, acc);
  warpgroup_commit_batch();
}

// Waits until at most kGroups later products are in flight; `acc` is complete then.
template <int kGroups, class... Acc>
__device__ __forceinline__ void finish_gemm(Acc&... acc) {
  warpgroup_wait<kGroups>();
  (warpgroup_fence_operand(acc), ...);
}

// Accumulators of a (64, K) product as the A operand of the next: element k of a thread is element
// k of the other, so only the type changes.
template <class Acc, class Operand>
__device__ __forceinline__ void round_to(const Acc& acc, Operand& operand) {
  using Element = typename Operand::value_type;
  auto pairs = recast<cutlass::Array<Element, 2>>(operand);
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  CUTE_UNROLL
  for (int i = 0; i < size(pairs); ++i) {
    pairs(i) = convert(cutlass::Array<float, 2>{acc(2 * i), acc(2 * i + 1)});
  }
}
// Accumulators in another type.
template <class Element, class Acc>
__device__ __forceinline__ auto rounded(const Acc& acc) {
  auto result = make_tensor<Element>(shape(acc));
  round_to(acc, result);
  return result;
}
template <class Element, class Mma, class Acc>
__device__ __forceinline__ auto to_operand_a(const Acc& acc) {
  constexpr int kColumns = decltype(size<0, 2>(acc))::value * 8;
  auto result = make_tensor<Element>(partition_shape_A(Mma{}, cute::Shape<_64, Int<kColumns>>{}));
  round_to(acc, result);
  return result;
}

// Writes the 16 x 16 block of one warp, held as the four registers of an A operand, to shared
// memory: `rows` keeps the block as it is, `columns` transposes it. `target(row, column)` is the
// address of an element of the tile that the 8 contiguous elements of a stmatrix row start at.
struct StoreLane {
  int row, column;  // of this lane's stmatrix row, inside the block

  __device__ __forceinline__ static StoreLane rows(int thread) {
    const int lane = thread % 32;
    return {lane % 16, lane / 16 * 8};
  }
  __device__ __forceinline__ static StoreLane columns(int thread) {
    const int lane = thread % 32;
    return {lane / 8 % 2 * 8, lane % 8 + lane / 16 * 8};
  }
};

template <class Copy, class Fragment, class Element>
__device__ __forceinline__ void store_block(const Fragment& fragment, int block, Element* target) {
  const auto words = recast<uint32_t>(fragment);
  Copy::copy(words(4 * block), words(4 * block + 1), words(4 * block + 2), words(4 * block + 3),
             *reinterpret_cast<uint128_t*>(target));
}
// The 16 x 16 block of one warp as the four registers of an A operand, from shared memory; `source`
// as StoreLane::rows has it.
template <class Fragment, class Element>
__device__ __forceinline__ void load_block(Fragment& fragment, int block, const Element* source) {
  auto words = recast<uint32_t>(fragment);
  SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const uint128_t*>(source), words(4 * block),
                          words(4 * block + 1), words(4 * block + 2), words(4 * block + 3));
}
// The first 8 columns of a block alone.
template <class Copy, class Fragment, class Element>
__device__ __forceinline__ void store_half_block(const Fragment& fragment, int block,
                                                 Element* target) {
  const auto words = recast<uint32_t>(fragment);
  Copy::copy(words(4 * block), words(4 * block + 1), *reinterpret_cast<uint128_t*>(target));
}

}  // namespace flash_attn2::sm90
