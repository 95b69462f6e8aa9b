// The tile table of the sm90 backward: for every head dim the tiles in order of preference.
#pragma once

#include <tuple>

#include "backward_launch.cuh"

namespace flash_attn2::sm90 {

template <class Element, int kHeadDim, int kHeadDimV = kHeadDim>
struct BackwardTiles;

// BackwardTraits: head_dim, tile_m, tile_n, what the consumers share, V's head_dim, thread blocks
// of a cluster, most keys. Up to 512 keys narrower tiles fill the sequence better.
template <class Element>
struct BackwardTiles<Element, 64> {
  using Rows = std::tuple<BackwardTraits<Element, 64, 64, 128, ConsumerSplit::kWholeHeads>,
                          BackwardTraits<Element, 64, 128, 128, ConsumerSplit::kKeys>>;
};
template <class Element>
struct BackwardTiles<Element, 64, 128> {
  using Rows = std::tuple<BackwardTraits<Element, 64, 64, 128, ConsumerSplit::kKeys, 128>>;
};
template <class Element>
struct BackwardTiles<Element, 96> {
  using Rows = std::tuple<BackwardTraits<Element, 96, 64, 128, ConsumerSplit::kKeys>>;
};
template <class Element>
struct BackwardTiles<Element, 128> {
  using Rows = std::tuple<BackwardTraits<Element, 128, 64, 128, ConsumerSplit::kKeys>>;
};
template <class Element>
struct BackwardTiles<Element, 192, 128> {
  using Rows = std::tuple<BackwardTraits<Element, 192, 64, 96, ConsumerSplit::kColumns, 128, 2>>;
};
template <class Element>
struct BackwardTiles<Element, 192> {
  using Rows = std::tuple<BackwardTraits<Element, 192, 64, 96, ConsumerSplit::kColumns, 192, 2>>;
};
template <class Element>
struct BackwardTiles<Element, 256> {
  using Rows =
      std::tuple<BackwardTraits<Element, 256, 64, 64, ConsumerSplit::kColumns, 256, 2, 512>,
                 BackwardTraits<Element, 256, 64, 80, ConsumerSplit::kColumns, 256, 2>>;
};

// Adds one row of the table to the registry; one a file.
template <class Element, int kHeadDim, int kRow, int kHeadDimV = kHeadDim>
struct RegisterBackward {
  RegisterBackward() {
    using Rows = typename BackwardTiles<Element, kHeadDim, kHeadDimV>::Rows;
    RegisterKernel(backward_row<std::tuple_element_t<kRow, Rows>>(kRow));
  }
};

}  // namespace flash_attn2::sm90
