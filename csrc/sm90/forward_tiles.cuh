// The tile table of the sm90 family. docs/performance.md has the measurements behind it.
#pragma once

#include "forward_launch.cuh"

namespace flash_attn2::sm90 {

template <class Element, int kHeadDim, int kHeadDimV = kHeadDim>
struct Tiles;

// ForwardTraits: head_dim, tile_m, tile_n, V's head_dim where it differs. 192 rows are three
// consumer warpgroups, for head dims that are bound by the exponentials; the output of the large
// ones leaves registers for two.
template <class Element>
struct Tiles<Element, 64> {
  using Forward = ForwardTraits<Element, 64, 192, 128>;
};
template <class Element>
struct Tiles<Element, 64, 128> {
  using Forward = ForwardTraits<Element, 64, 128, 128, 128>;
};
template <class Element>
struct Tiles<Element, 96> {
  using Forward = ForwardTraits<Element, 96, 192, 112>;
};
template <class Element>
struct Tiles<Element, 128> {
  using Forward = ForwardTraits<Element, 128, 128, 128>;
};
template <class Element>
struct Tiles<Element, 192, 128> {
  using Forward = ForwardTraits<Element, 192, 128, 128, 128>;
};
template <class Element>
struct Tiles<Element, 192> {
  using Forward = ForwardTraits<Element, 192, 128, 112>;
};
template <class Element>
struct Tiles<Element, 256> {
  using Forward = ForwardTraits<Element, 256, 128, 80>;
};

// Adds a head dim's row of the table to the registry. One a file, as in csrc/sm80.
template <class Element, int kHeadDim, int kHeadDimV = kHeadDim>
struct RegisterForward {
  RegisterForward() {
    RegisterKernel(forward_row<typename Tiles<Element, kHeadDim, kHeadDimV>::Forward>(0));
  }
};

}  // namespace flash_attn2::sm90
