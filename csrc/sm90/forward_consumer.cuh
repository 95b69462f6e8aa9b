// A consumer warpgroup of the sm90 forward: 64 query rows of every tile (steps F2 to F7).
#pragma once

#include "../core/mask.cuh"
#include "forward_traits.cuh"
#include "softmax.cuh"

namespace flash_attn2::sm90 {

// One thread's accumulators of a 64-row wgmma, ((2, 2, N / 8), 1, 1), seen as (rows, columns).
template <class Acc>
__device__ __forceinline__ auto rows_columns(Acc& acc) {
  const auto layout = acc.layout();
  return make_tensor(acc.data(), make_layout(get<0, 1>(layout),
                                             make_layout(get<0, 0>(layout), get<0, 2>(layout))));
}

// A warpgroup's part of a tile: 64 rows from row_begin and the key blocks that one of them sees.
struct GroupTile {
  TileCoord coord;
  int row_begin;
  BlockRange blocks;
  int leading, trailing;  // blocks of the whole tile before and after these, last block first

  __device__ __forceinline__ bool any_key() const { return blocks.begin < blocks.end; }
};

template <class Traits>
struct ForwardConsumer {
  using Element = typename Traits::Element;
  using MmaS = typename Traits::MmaS;
  using MmaO = typename Traits::MmaO;
  static constexpr int kTileN = Traits::kTileN, kGroupRows = Traits::kGroupRows;
  static constexpr int kOutColumns = Traits::kOutColumns;
  using AccS = Accumulator<MmaS, kGroupRows, kTileN>;
  using AccO = Accumulator<MmaO, kGroupRows, Traits::kHeadDimV>;
  using P = decltype(to_operand_a<Element, MmaO>(AccS{}));
  using Rounded = decltype(to_operand_a<Element, MmaO>(AccO{}));
  static constexpr int kRows = 2;  // of a tile, held by one thread
  using Softmax = OverlappedSoftmax<kRows>;
  using GroupTurns = Turns<Traits::kGroups>;
  using BlockRing = Ring<Traits::kStages>;

  const ForwardArguments& arguments;
  typename Traits::SharedStorage& smem;
  const int group, thread;  // thread: inside the group
  const VisibleKeys visible;
  const float scale_log2;
  BlockRing ring;    // of the block whose scores are next
  BlockRing ring_v;  // of the block whose P waits for its V
  Ring<Traits::kQStages> ring_q;
  AccO acc_out;
  P probabilities;
  Softmax softmax;

  __device__ __forceinline__ ForwardConsumer(const ForwardArguments& arguments,
                                             typename Traits::SharedStorage& smem, int group)
      : arguments(arguments),
        smem(smem),
        group(group),
        thread(threadIdx.x % kWarpGroupThreads),
        visible(arguments.params.shape, arguments.params.window),
        scale_log2(arguments.params.softmax_scale * kLog2e) {
    clear(acc_out);
  }

  // Every warp tells the producer that it no longer reads the buffer.
  __device__ __forceinline__ void release(Barrier& empty) const {
    if (thread % 32 == 0) empty.arrive();
  }
  __device__ __forceinline__ void release_q() {
    release(smem.barriers.q_empty[ring_q.stage()][group]);
    ++ring_q.use;
  }

  __device__ __forceinline__ void wait_for_q() const {
    smem.barriers.q_full[ring_q.stage()][group].wait(ring_q.parity());
  }

  // F2 to F5 for one key block, with F6 of the block before it (unless kFirst): S = Q K^T and
  // O += P V are issued together, and the softmax of S runs while P V is computed.
  template <bool kFirst>
  __device__ __forceinline__ void step(const GroupTile& tile, int block) {
    AccS acc_s;
    if constexpr (kFirst) wait_for_q();
    start_scores(acc_s);
    if constexpr (!kFirst) start_output();
    GroupTurns::pass(group);
    finish_scores<kFirst ? 0 : 1>(tile, block, acc_s);
    auto scores = rows_columns(acc_s);
    float factor[kRows];
    const bool grew = softmax.update(scores, factor, scale_log2);
    if constexpr (!kFirst) {
      finish_output<0>();
      auto out = rows_columns(acc_out);
      if (grew) scale_rows(out, factor);
    }
    keep_probabilities(acc_s);
  }

  // The first step of a tile around the end of the one before, `ended`, whose last O += P V is
  // still to be issued: both products together where Q has a second buffer. Elsewhere Q is on its
  // way, so O += P V goes first, and an output that leaves in parts is stored around the softmax.
  __device__ __forceinline__ void step_across(const GroupTile& tile, int block,
                                              const GroupTile& ended) {
    AccS acc_s;
    auto scores = rows_columns(acc_s);
    Softmax last = softmax;
    softmax = Softmax();
    float unused[kRows];
    if constexpr (Traits::kQStages > 1) {
      wait_for_q();
      start_scores(acc_s);
      start_output();
      GroupTurns::pass(group);
      finish_scores<1>(tile, block, acc_s);
      softmax.update(scores, unused, scale_log2);
      finish_output<0>();
      store_output<0, Traits::kOutParts>(round_output(ended, last), ended);
    } else {
      start_output();
      wait_for_q();
      start_scores(acc_s);
      GroupTurns::pass(group);
      finish_output<1>();
      const Rounded out = round_output(ended, last);
      store_output<0, 1>(out, ended);
      finish_scores<0>(tile, block, acc_s);
      softmax.update(scores, unused, scale_log2);
      store_output<1, Traits::kOutParts>(out, ended);
    }
    clear(acc_out);
    keep_probabilities(acc_s);
  }

  // Starts S = Q K^T in this group's turn.
  __device__ __forceinline__ void start_scores(AccS& acc_s) const {
    auto q =
        operand_a<MmaS>(smem_tile<kGroupRows, Traits::kHeadDim>(smem.q[ring_q.stage()][group]));
    const auto k = operand_b<MmaS>(smem_tile<kTileN, Traits::kHeadDim>(smem.k[ring.stage()]));
    smem.barriers.k_full[ring.stage()].wait(ring.parity());
    GroupTurns::wait(group);
    start_gemm<MmaS, Accumulate::kNo>(q, k, acc_s);
  }

  // Waits for S, leaves K, and Q after a tile's last block, and masks (F3).
  template <int kLaterProducts>
  __device__ __forceinline__ void finish_scores(const GroupTile& tile, int block, AccS& acc_s) {
    finish_gemm<kLaterProducts>(acc_s);
    release(smem.barriers.k_empty[ring.stage()]);
    if (Traits::kOwnOutBuffer && block == tile.blocks.begin) release_q();
    if (visible.tile_needs_mask(tile.row_begin, kGroupRows, block * kTileN, kTileN)) {
      // Relative to the thread's first row and column, coordinates are constants.
      const auto coords = [](int i, int j) { return make_coord(8 * i, j % 2 + j / 2 * 8); };
      auto scores = rows_columns(acc_s);
      apply_mask(scores, coords, visible, tile.row_begin + thread_row(),
                 block * kTileN + thread % 4 * 2);
    }
  }

  __device__ __forceinline__ void keep_probabilities(const AccS& acc_s) {
    round_to(acc_s, probabilities);
    ring_v = ring;
    ++ring.use;
  }

  // Starts O += P V (F6).
  __device__ __forceinline__ void start_output() {
    const auto v =
        operand_b<MmaO>(transposed(smem_tile<kTileN, Traits::kHeadDimV>(smem.v[ring_v.stage()])));
    smem.barriers.v_full[ring_v.stage()].wait(ring_v.parity());
    start_gemm<MmaO, Accumulate::kYes>(probabilities, v, acc_out);
  }

  template <int kLaterProducts>
  __device__ __forceinline__ void finish_output() {
    finish_gemm<kLaterProducts>(acc_out);
    release(smem.barriers.v_empty[ring_v.stage()]);
  }

  // The end of a tile after which nothing is under way.
  __device__ __forceinline__ void finish_tile(const GroupTile& tile) {
    if (tile.any_key()) {
      start_output();
      finish_output<0>();
    }
    if constexpr (!Traits::kOwnOutBuffer) sync_rows<Traits::kGroups>(group);  // all left Q
    store_output<0, Traits::kOutParts>(round_output(tile, softmax), tile);
    softmax = Softmax();
    clear(acc_out);
    if constexpr (!Traits::kOwnOutBuffer) {
      wait_for_store();
      release_q();
    }
  }

  // Key blocks of the tile that no row of this group sees.
  __device__ __forceinline__ void skip(int blocks) {
    CUTE_NO_UNROLL
    for (; blocks > 0; --blocks) {
      smem.barriers.k_full[ring.stage()].wait(ring.parity());
      release(smem.barriers.k_empty[ring.stage()]);
      GroupTurns::wait(group);
      GroupTurns::pass(group);
      smem.barriers.v_full[ring.stage()].wait(ring.parity());
      release(smem.barriers.v_empty[ring.stage()]);
      ++ring.use;
    }
  }

  // The first row of the group's tile that this thread holds; the other one is 8 below.
  __device__ __forceinline__ int thread_row() const {
    return thread / 32 * Traits::kWarpRows + thread % 32 / 4;
  }

  // F7: L = m + log l to memory; O / l, rounded, as stmatrix takes it.
  __device__ __forceinline__ Rounded round_output(const GroupTile& tile, Softmax& state) {
    float inverse_sum[kRows], lse[kRows];
    state.finish(inverse_sum, lse, scale_log2);
    const AttentionShape& shape = arguments.params.shape;
    float* lse_head =
        arguments.params.lse +
        (int64_t(tile.coord.batch) * shape.heads_q + tile.coord.head) * shape.seqlen_q;
    if (thread % 4 == 0) {  // one thread of each quad
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = tile.row_begin + thread_row() + 8 * i;
        if (row < shape.seqlen_q) lse_head[row] = lse[i];
      }
    }
    auto out = rows_columns(acc_out);
    scale_rows(out, inverse_sum);
    return to_operand_a<Element, MmaO>(acc_out);
  }

  // Stores parts of kOutColumns columns of the output. Every warp stores its 16 rows by itself.
  template <int kFirstPart, int kEndPart>
  __device__ __forceinline__ void store_output(const Rounded& out, const GroupTile& tile) {
    constexpr int kBlocks = kOutColumns / 16;
    const int warp_row = thread / 32 * Traits::kWarpRows;
    Element* const buffer = smem.out_tile(group);
    const auto target = smem_tile<kGroupRows, kOutColumns>(buffer);
    const StoreLane lane = StoreLane::rows();
    CUTE_UNROLL
    for (int part = kFirstPart; part < kEndPart; ++part) {
      wait_for_store();
      CUTE_UNROLL
      for (int block = 0; block < kBlocks; ++block) {
        store_block<SM90_U32x4_STSM_N>(out, part * kBlocks + block,
                                       &target(warp_row + lane.row, 16 * block + lane.column));
      }
      tma_store_fence();
      __syncwarp();
      if (thread % 32 == 0) {
        tma_store<kGroupRows, kOutColumns>(
            arguments.out, buffer + warp_row * kBoxColumns<kOutColumns>,
            {tile.row_begin + warp_row, tile.coord.head, tile.coord.batch, part * kOutColumns});
      }
    }
  }

  // Until this warp's last store has read shared memory.
  __device__ __forceinline__ void wait_for_store() const {
    if (thread % 32 == 0) tma_store_wait<0>();
    __syncwarp();
  }

  __device__ __forceinline__ GroupTile part_of(const ForwardTile& tile) const {
    GroupTile part{tile.coord, tile.row_begin + group * kGroupRows, {0, 0}, 0, 0};
    if (part.row_begin < visible.seqlen_q) {
      part.blocks = visible.key_blocks(part.row_begin, kGroupRows, kTileN);
    }
    if (part.any_key()) {
      part.leading = tile.blocks.end - part.blocks.end;
      part.trailing = part.blocks.begin - tile.blocks.begin;
    } else {
      part.leading = max(tile.blocks.end - tile.blocks.begin, 0);
    }
    return part;
  }

  // Tile after tile. The end of one runs under the first scores of the next, except where there is
  // no last product, or where skipping blocks needs the stage that its V is in.
  __device__ __forceinline__ void run() {
    GroupTurns::start(group);
    GroupTile ended;
    bool open = false;  // `ended` has still to be finished
    typename Traits::Schedule schedule(arguments.params);
    ForwardTile whole;
    while (schedule.next(whole)) {
      const GroupTile tile = part_of(whole);
      const int skipped = tile.leading + (open ? ended.trailing : 0);
      int block = tile.blocks.end - 1;
      if (Traits::kOwnOutBuffer && open && ended.any_key() && tile.any_key() &&
          skipped < Traits::kStages) {
        skip(skipped);
        step_across(tile, block, ended);
      } else {
        if (open) finish_tile(ended);
        skip(skipped);
        if (tile.any_key()) {
          step<true>(tile, block);
        } else {
          wait_for_q();
          if constexpr (Traits::kOwnOutBuffer) release_q();
        }
      }
      CUTE_NO_UNROLL
      while (--block >= tile.blocks.begin) step<false>(tile, block);
      ended = tile;
      open = true;
    }
    if (open) {
      finish_tile(ended);
      skip(ended.trailing);
    }
    wait_for_store();  // shared memory has to outlive it
  }
};

}  // namespace flash_attn2::sm90
