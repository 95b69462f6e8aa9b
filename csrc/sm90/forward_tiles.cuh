// The tile table of the sm90 forward: for every head dim the tiles in order of preference.
// docs/performance.md has the measurements behind it.
#pragma once

#include <tuple>

#include "forward_launch.cuh"

namespace flash_attn2::sm90 {

template <class Element, int kHeadDim, int kHeadDimV = kHeadDim>
struct ForwardTiles;

// ForwardTraits: head_dim, tile_m, tile_n, V's head_dim, thread blocks of a cluster, most keys,
// teams, most keys without a mask. 192 rows are three consumer warpgroups, for head dims that are
// bound by the exponentials; the output of the large ones leaves registers for two. Clusters are
// for tiles of one length, and for long ones under a causal mask (csrc/plan). Two teams are for
// tiles so short that their beginnings and ends are most of the time. 64 keys at head dim 256 leave
// room for the output beside Q.
template <class Element>
struct ForwardTiles<Element, 64> {
  using Rows = std::tuple<ForwardTraits<Element, 64, 128, 64, 64, 1, 512, 2, 256>,
                          ForwardTraits<Element, 64, 192, 128>>;
};
template <class Element>
struct ForwardTiles<Element, 64, 128> {
  using Rows = std::tuple<ForwardTraits<Element, 64, 128, 128, 128>>;
};
template <class Element>
struct ForwardTiles<Element, 96> {
  using Rows = std::tuple<ForwardTraits<Element, 96, 192, 112>>;
};
template <class Element>
struct ForwardTiles<Element, 128> {
  using Rows = std::tuple<ForwardTraits<Element, 128, 128, 128, 128, 2>,
                          ForwardTraits<Element, 128, 128, 128>>;
};
template <class Element>
struct ForwardTiles<Element, 192, 128> {
  using Rows = std::tuple<ForwardTraits<Element, 192, 128, 128, 128>>;
};
template <class Element>
struct ForwardTiles<Element, 192> {
  using Rows = std::tuple<ForwardTraits<Element, 192, 128, 112>>;
};
template <class Element>
struct ForwardTiles<Element, 256> {
  using Rows = std::tuple<ForwardTraits<Element, 256, 128, 64, 256, 1, 2048, 1, 512>,
                          ForwardTraits<Element, 256, 128, 80, 256, 2>,
                          ForwardTraits<Element, 256, 128, 80>>;
};

// Adds one row of the table to the registry; one a file.
template <class Element, int kHeadDim, int kRow, int kHeadDimV = kHeadDim>
struct RegisterForward {
  RegisterForward() {
    using Rows = typename ForwardTiles<Element, kHeadDim, kHeadDimV>::Rows;
    RegisterKernel(forward_row<std::tuple_element_t<kRow, Rows>>(kRow));
  }
};

}  // namespace flash_attn2::sm90
