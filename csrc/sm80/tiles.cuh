// The tile table of the sm80 family: for every head dim the forward tile and the backward tiles, in
// order of preference. Later rows need less shared memory: sm_80 gives a thread block 163 KiB,
// sm_86, sm_89 and sm_120 99 KiB. sm_90 has 227 KiB and takes the first rows alone, so that the
// build (tools/nvcc_logged.py) compiles no other for it. docs/performance.md has the measurements
// behind the first rows.
#pragma once

#include <tuple>

#include "launch.cuh"

namespace flash_attn2::sm80 {

template <class Element, int kHeadDim>
struct Tiles;

// ForwardTraits: head_dim, tile_m, tile_n, warps, Q in registers, stages
// BackwardTraits: head_dim, tile_m, tile_n, warps, warps along the rows of S, KV, Q, stages, shares
// of S and dP
template <class Element>
struct Tiles<Element, 64> {
  using Forward = std::tuple<ForwardTraits<Element, 64, 128, 64, 4, true, 2>>;
  using Backward =
      std::tuple<BackwardTraits<Element, 64, 64, 128, 4, 2, 4, 2, 2, ScoreShares::kHalves>>;
};
template <class Element>
struct Tiles<Element, 96> {
  using Forward = std::tuple<ForwardTraits<Element, 96, 128, 64, 4, false, 2>>;
  using Backward =
      std::tuple<BackwardTraits<Element, 96, 64, 128, 8, 2, 4, 4, 3, ScoreShares::kWhole>,
                 BackwardTraits<Element, 96, 64, 64, 4, 2, 2, 2, 1, ScoreShares::kWhole>>;
};
template <class Element>
struct Tiles<Element, 128> {
  using Forward = std::tuple<ForwardTraits<Element, 128, 128, 64, 4, false, 2>>;
  using Backward =
      std::tuple<BackwardTraits<Element, 128, 64, 128, 8, 2, 4, 2, 3, ScoreShares::kWhole>,
                 BackwardTraits<Element, 128, 64, 64, 4, 2, 2, 2, 1, ScoreShares::kWhole>>;
};
template <class Element>
struct Tiles<Element, 192> {
  using Forward = std::tuple<ForwardTraits<Element, 192, 64, 64, 4, false, 1>>;
  using Backward =
      std::tuple<BackwardTraits<Element, 192, 64, 96, 8, 4, 2, 2, 2, ScoreShares::kWhole>,
                 BackwardTraits<Element, 192, 32, 64, 8, 2, 2, 2, 1, ScoreShares::kWhole>>;
};
template <class Element>
struct Tiles<Element, 256> {
  using Forward = std::tuple<ForwardTraits<Element, 256, 64, 64, 4, false, 1>>;
  using Backward =
      std::tuple<BackwardTraits<Element, 256, 64, 64, 8, 2, 2, 2, 2, ScoreShares::kPaired>,
                 BackwardTraits<Element, 256, 32, 64, 8, 2, 2, 2, 2, ScoreShares::kWhole>,
                 BackwardTraits<Element, 256, 32, 32, 4, 2, 2, 2, 1, ScoreShares::kWhole>>;
};

// Adds one row of the table to the registry. One a file: the front end's time and memory grow with
// the kernels of a file.
template <class Element, int kHeadDim, int kRow>
struct RegisterForward {
  RegisterForward() {
    using Rows = typename Tiles<Element, kHeadDim>::Forward;
    RegisterKernel(forward_row<std::tuple_element_t<kRow, Rows>>(kRow));
  }
};
template <class Element, int kHeadDim, int kRow>
struct RegisterBackward {
  RegisterBackward() {
    using Rows = typename Tiles<Element, kHeadDim>::Backward;
    RegisterKernel(backward_row<std::tuple_element_t<kRow, Rows>>(kRow));
  }
};

}  // namespace flash_attn2::sm80
