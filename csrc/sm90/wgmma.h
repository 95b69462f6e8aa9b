// wgmma for numbers of columns that CuTe has only where CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED is
// defined, at 40 s of nvcc for each file that does. A and B from shared memory, fp32 results.
#pragma once

#include <cutlass/numeric_types.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace flash_attn2::sm90 {

using cute::GMMA::Major;

// 64 x kColumns results of a 16-deep product; an operation for cute::MMA_Atom.
template <class Element, int kColumns, Major kMajorA, Major kMajorB>
struct SmemWgmma {};

// The instruction takes every accumulator of a thread, kColumns / 2, as an operand of its own:
// F(n) for n from 1 to a last one.
#define FLASH_ATTN2_TEN(F, t) \
  F(t##0) F(t##1) F(t##2) F(t##3) F(t##4) F(t##5) F(t##6) F(t##7) F(t##8) F(t##9)
#define FLASH_ATTN2_TO_19(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) FLASH_ATTN2_TEN(F, 1)
#define FLASH_ATTN2_TO_23(F) FLASH_ATTN2_TO_19(F) F(20) F(21) F(22) F(23)
#define FLASH_ATTN2_TO_39(F) FLASH_ATTN2_TO_19(F) FLASH_ATTN2_TEN(F, 2) FLASH_ATTN2_TEN(F, 3)
#define FLASH_ATTN2_TO_55(F) \
  FLASH_ATTN2_TO_39(F) FLASH_ATTN2_TEN(F, 4) F(50) F(51) F(52) F(53) F(54) F(55)
#define FLASH_ATTN2_NAME(n) ", %" #n
#define FLASH_ATTN2_OPERAND(n) , "+f"(acc(n))

// `accumulators`: all but the first; then the numbers of the operands that follow them.
#define FLASH_ATTN2_WGMMA(columns, type, accumulators, a, b, accumulate, major_a, major_b)      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                 \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type    \
               " {%0" accumulators(FLASH_ATTN2_NAME) "}, %" #a ", %" #b ", p, 1, 1, %" #major_a \
                                                     ", %" #major_b ";\n}\n"                    \
               : "+f"(acc(0))accumulators(FLASH_ATTN2_OPERAND)                                  \
               : "l"(desc_a), "l"(desc_b), "r"(int(traits.accumulate_)), "n"(int(kMajorA)),     \
                 "n"(int(kMajorB)))

// acc (+)= a b^T: what MMA_Atom calls.
template <class Element, int kColumns, Major kMajorA, Major kMajorB, class Acc, class LayoutAcc,
          class A, class LayoutA, class B, class LayoutB, class C, class LayoutC>
CUTE_HOST_DEVICE void mma_unpack(
    const cute::MMA_Traits<SmemWgmma<Element, kColumns, kMajorA, kMajorB>>& traits,
    cute::Tensor<Acc, LayoutAcc>& acc, const cute::Tensor<A, LayoutA>& a,
    const cute::Tensor<B, LayoutB>& b, const cute::Tensor<C, LayoutC>&) {
#ifdef __CUDA_ARCH__
  static_assert(decltype(cute::size(acc))::value == kColumns / 2);
  const uint64_t desc_a = a(0), desc_b = b(0);
  constexpr bool kBf16 = std::is_same_v<Element, cutlass::bfloat16_t>;
  static_assert(kBf16 || std::is_same_v<Element, cutlass::half_t>);
  if constexpr (kColumns == 40 && kBf16) {
    FLASH_ATTN2_WGMMA(40, bf16, FLASH_ATTN2_TO_19, 20, 21, 22, 23, 24);
  } else if constexpr (kColumns == 40) {
    FLASH_ATTN2_WGMMA(40, f16, FLASH_ATTN2_TO_19, 20, 21, 22, 23, 24);
  } else if constexpr (kColumns == 48 && kBf16) {
    FLASH_ATTN2_WGMMA(48, bf16, FLASH_ATTN2_TO_23, 24, 25, 26, 27, 28);
  } else if constexpr (kColumns == 48) {
    FLASH_ATTN2_WGMMA(48, f16, FLASH_ATTN2_TO_23, 24, 25, 26, 27, 28);
  } else if constexpr (kColumns == 80 && kBf16) {
    FLASH_ATTN2_WGMMA(80, bf16, FLASH_ATTN2_TO_39, 40, 41, 42, 43, 44);
  } else if constexpr (kColumns == 80) {
    FLASH_ATTN2_WGMMA(80, f16, FLASH_ATTN2_TO_39, 40, 41, 42, 43, 44);
  } else if constexpr (kColumns == 112 && kBf16) {
    FLASH_ATTN2_WGMMA(112, bf16, FLASH_ATTN2_TO_55, 56, 57, 58, 59, 60);
  } else {
    static_assert(kColumns == 112, "no wgmma of so many columns: add it here");
    FLASH_ATTN2_WGMMA(112, f16, FLASH_ATTN2_TO_55, 56, 57, 58, 59, 60);
  }
#endif
}

#undef FLASH_ATTN2_TEN
#undef FLASH_ATTN2_TO_19
#undef FLASH_ATTN2_TO_23
#undef FLASH_ATTN2_TO_39
#undef FLASH_ATTN2_TO_55
#undef FLASH_ATTN2_NAME
#undef FLASH_ATTN2_OPERAND
#undef FLASH_ATTN2_WGMMA

}  // namespace flash_attn2::sm90

template <class Element, int kColumns, cute::GMMA::Major kMajorA, cute::GMMA::Major kMajorB>
struct cute::MMA_Traits<flash_attn2::sm90::SmemWgmma<Element, kColumns, kMajorA, kMajorB>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<kMajorA>;
  using FrgTypeB = GMMA::smem_desc<kMajorB>;
  using Shape_MNK = cute::Shape<_64, Int<kColumns>, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 16>;
  using BLayout = GMMA::ABLayout<kColumns, 16>;
  using CLayout = GMMA::CLayout_64xN<kColumns>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};
