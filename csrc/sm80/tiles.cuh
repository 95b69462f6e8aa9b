// The tile table of the sm80 family: for every head dim, in order of preference, the forward and
// backward tiles. Later rows of a head dim need less shared memory, for GPUs with 99 KiB a block.
#pragma once

#include "launch.cuh"

namespace flash_attn2::sm80 {

template <class Element, int kHeadDim>
struct Tiles;

template <class... Traits>
struct TraitsList {};

//                          head_dim, tile_m, tile_n, warps, Q in registers
//                          head_dim, tile_m, tile_n, warps, warps on rows of S, KV, Q, stages
template <class Element>
struct Tiles<Element, 64> {
  using Forward = TraitsList<ForwardTraits<Element, 64, 128, 64, 4, true>>;
  using Backward = TraitsList<BackwardTraits<Element, 64, 128, 128, 8, 4, 4, 4, 2>,
                              BackwardTraits<Element, 64, 64, 64, 4, 2, 2, 2, 2>>;
};
template <class Element>
struct Tiles<Element, 96> {
  using Forward = TraitsList<ForwardTraits<Element, 96, 128, 64, 4, false>>;
  using Backward = TraitsList<BackwardTraits<Element, 96, 64, 128, 8, 2, 4, 4, 2>,
                              BackwardTraits<Element, 96, 64, 64, 4, 2, 2, 2, 2>>;
};
template <class Element>
struct Tiles<Element, 128> {
  using Forward = TraitsList<ForwardTraits<Element, 128, 128, 64, 4, false>>;
  using Backward = TraitsList<BackwardTraits<Element, 128, 64, 128, 8, 2, 4, 2, 2>,
                              BackwardTraits<Element, 128, 64, 64, 4, 2, 2, 2, 1>>;
};
template <class Element>
struct Tiles<Element, 192> {
  using Forward = TraitsList<ForwardTraits<Element, 192, 128, 64, 8, false>,
                             ForwardTraits<Element, 192, 64, 32, 4, false>>;
  using Backward = TraitsList<BackwardTraits<Element, 192, 64, 64, 8, 4, 2, 2, 2>,
                              BackwardTraits<Element, 192, 64, 32, 4, 2, 2, 2, 1>>;
};
template <class Element>
struct Tiles<Element, 256> {
  using Forward = TraitsList<ForwardTraits<Element, 256, 128, 64, 8, true>,
                             ForwardTraits<Element, 256, 64, 32, 4, false>>;
  using Backward = TraitsList<BackwardTraits<Element, 256, 64, 64, 8, 4, 2, 2, 1>,
                              BackwardTraits<Element, 256, 32, 32, 4, 2, 2, 2, 1>>;
};

// Registers every row of one (dtype, head_dim).
template <class Element, int kHeadDim>
struct RegisterKernels {
  RegisterKernels() {
    add(typename Tiles<Element, kHeadDim>::Forward{}, typename Tiles<Element, kHeadDim>::Backward{});
  }

 private:
  template <class... Forward, class... Backward>
  static void add(TraitsList<Forward...>, TraitsList<Backward...>) {
    int preference = 0;
    (RegisterKernel(forward_row<Forward>(preference++)), ...);
    preference = 0;
    (RegisterKernel(backward_row<Backward>(preference++)), ...);
  }
};

}  // namespace flash_attn2::sm80
