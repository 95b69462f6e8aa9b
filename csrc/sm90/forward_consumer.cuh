// A consumer warpgroup of the sm90 forward: 64 query rows of every tile (steps F2 to F7).
#pragma once

#include "forward_traits.cuh"
#include "mask.cuh"
#include "softmax.cuh"

namespace flash_attn2::sm90 {

// One thread's accumulators of a 64-row wgmma, ((2, 2, N / 8), 1, 1), seen as (rows, columns).
template <class Acc>
__device__ __forceinline__ auto rows_columns(Acc& acc) {
  const auto layout = acc.layout();
  return make_tensor(acc.data(), make_layout(get<0, 1>(layout),
                                             make_layout(get<0, 0>(layout), get<0, 2>(layout))));
}

// The layout of S's accumulators, ((2, 2, N / 8), 1, 1), as the A operand of the next product,
// ((2, 2, 2), 1, N / 16): P stays where S was computed.
template <class Layout>
__device__ __forceinline__ constexpr auto operand_a_layout(Layout layout) {
  const auto split = logical_divide(get<0, 2>(layout), _2{});
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0>(split)),
                     get<1>(layout), get<1>(split));
}

template <class Traits>
struct ForwardConsumer {
  using Element = typename Traits::Element;
  using MmaS = typename Traits::MmaS;
  using MmaO = typename Traits::MmaO;
  static constexpr int kTileN = Traits::kTileN, kGroupRows = Traits::kGroupRows;
  using AccS = decltype(partition_fragment_C(MmaS{}, cute::Shape<_64, Int<kTileN>>{}));
  using AccO = decltype(partition_fragment_C(MmaO{}, cute::Shape<_64, Int<Traits::kHeadDimV>>{}));
  using AccOutPart = decltype(partition_fragment_C(typename Traits::MmaOutPart{},
                                                   cute::Shape<_64, Int<Traits::kOutColumns>>{}));
  using P = decltype(make_tensor<Element>(operand_a_layout(typename AccS::layout_type{})));
  static constexpr int kRows = 2;  // of a tile, held by one thread
  using GroupTurns = typename Traits::GroupTurns;

  const ForwardArguments& arguments;
  typename Traits::TeamStorage& smem;
  const int group, thread;  // group: inside the team; thread: inside the group
  const VisibleKeys visible;
  const float scale_log2;
  Ring<Traits::kStages> ring;  // of the block whose scores are next; V's may be one use behind
  uint32_t q_parity = 0;
  bool k_there = false, v_there = false;  // known of the next block of K, of the last one of V
  bool out_pending = false;               // a stage of V's ring is to be given back
  bool any_sign;                          // see RowSoftmax::any_sign
  AccO acc_out;
  P probabilities;
  RowSoftmax<kRows> softmax;
  typename Traits::Schedule schedule;
  ForwardTile next_tile;  // if there are `more`
  bool more;

  __device__ __forceinline__ ForwardConsumer(const ForwardArguments& arguments,
                                             typename Traits::TeamStorage& smem, int team,
                                             int group)
      : arguments(arguments),
        smem(smem),
        group(group),
        thread(threadIdx.x % kWarpGroupThreads),
        visible(arguments.params.shape, arguments.params.window),
        scale_log2(arguments.params.softmax_scale * kLog2e),
        schedule(arguments.params, arguments.divisors, team) {}

  // Every warp tells the producer that it no longer reads the buffer.
  __device__ __forceinline__ void release(Barrier& empty) const {
    if (thread % 32 == 0) empty.arrive();
  }

  // The same, to every producer that fills the buffer.
  __device__ __forceinline__ void release_block(Barrier& empty) const {
    if constexpr (Traits::kCluster == 1) {
      release(empty);
    } else if (thread % 32 < Traits::kCluster) {
      empty.arrive(thread % 32);
    }
  }

  // F2 to F5 for one key block, with F6 of the block before it under way: S = Q K^T and O += P V
  // are issued together, and the softmax of S runs while P V is computed. kFirst: no block comes
  // before it, and in a chain acc_s holds S already. `last`: no step of this tile comes after it.
  template <bool kFirst>
  __device__ __forceinline__ void step(AccS& acc_s, int row_begin, int block,
                                       const BlockRange& whole, bool last) {
    const Ring<Traits::kStages> before{ring.use - 1};
    constexpr bool kHasScores = kFirst && Traits::kChain;
    if constexpr (!kHasScores) {
      if (kFirst || (Traits::kVote && !k_there)) wait_for_k();
      GroupTurns::wait(group);
      issue_scores(acc_s);
      if constexpr (!kFirst) issue_output(before);
      GroupTurns::pass(group);
      if constexpr (kFirst) leave_out();
    }
    auto scores = rows_columns(acc_s);
    float factor[kRows], row_sum[kRows];
    bool rescale;
    const auto take_maxima = [&](auto max_of) {
      rescale = softmax.update_max(0, max_of(scores, 0));
      if constexpr (Traits::kVote) {
        row_sum[0] = softmax.exponentiate(0, scores, scale_log2);
        asm volatile("" : "+f"(row_sum[0]));  // else the compiler moves them behind the wait
      }
      rescale |= softmax.update_max(1, max_of(scores, 1));
    };
    const auto max_of_floats = [](const auto& scores, int i) { return row_max(scores, i); };
    const auto max_of_bits = [](const auto& scores, int i) { return row_max_of_bits(scores, i); };
    // The branch comes before the wait, for nothing hides what comes after it. All warps of the
    // group take the same, as they have to wait at one instruction.
    if (block >= whole.end || block < whole.begin) {
      finish_gemm<kFirst ? 0 : 1>(acc_s);
      const int row = recompute(row_begin + thread_row()), key = block * kTileN + thread % 4 * 2;
      hide_columns(acc_s, [&](int j) {
        return BlockRange{visible.first(row + 8 * j) - key, visible.end(row + 8 * j) - key};
      });
      if constexpr (Traits::kMaxOfBits) take_maxima(max_of_floats);
    } else {
      finish_gemm<kFirst ? 0 : 1>(acc_s);
      if constexpr (Traits::kMaxOfBits) {
        if constexpr (kFirst) {
          take_maxima(max_of_floats);
        } else {
          take_maxima(max_of_bits);
          if (any_sign) {  // behind the wait, as warps of a group may differ here
            CUTE_UNROLL
            for (int i = 0; i < kRows; ++i) softmax.raise_max(i, max_of_floats(scores, i));
          }
        }
      }
    }
    if constexpr (!Traits::kMaxOfBits) take_maxima(max_of_floats);
    if constexpr (!kHasScores) leave_scores(last);
    rescale = !Traits::kVote || __any_sync(0xffffffffu, rescale);
    if constexpr (!Traits::kAskLate) look_ahead();
    // Where it is one, this branch also keeps ptxas from waiting for P V before the maxima.
    if (rescale) softmax.rescale(factor, scale_log2);
    if constexpr (!kFirst) {
      finish_output(before);
      auto out = rows_columns(acc_out);
      if (rescale) scale_rows(out, factor);
    }
    if constexpr (!Traits::kVote) row_sum[0] = softmax.exponentiate(0, scores, scale_log2);
    if constexpr (Traits::kAskLate) look_ahead();
    if constexpr (Traits::kMaxOfBits) any_sign = softmax.any_sign();
    row_sum[1] = softmax.exponentiate(1, scores, scale_log2);
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) softmax.add(i, row_sum[i]);
    round_to(acc_s, probabilities);
    ++ring.use;
    // Here and not at the head of the next step: the answer is still in a predicate. With a vote
    // ptxas would then put all exponentials before it.
    if (!Traits::kVote && !last && !k_there) wait_for_k();
  }

  __device__ __forceinline__ void wait_for_k() const {
    smem.barriers.k_full[ring.stage()].wait(ring.parity());
  }

  // Leaves the block of K, and with the last scores of the tile Q. The arrivals also keep ptxas
  // from waiting for P V before what stands in front of them.
  __device__ __forceinline__ void leave_scores(bool last) {
    release_block(smem.barriers.k_empty[ring.stage()]);
    if constexpr (Traits::kLeaveQEarly) {
      if (last) release(smem.barriers.q_empty[group]);
    }
  }

  // Asks for what the next step starts with, while there is time to wait for the answer.
  __device__ __forceinline__ void look_ahead() {
    const Ring<Traits::kStages> next{ring.use + 1};
    k_there = smem.barriers.k_full[next.stage()].test_wait(next.parity());
    v_there = smem.barriers.v_full[ring.stage()].test_wait(ring.parity());
  }

  // Starts S = Q K^T.
  __device__ __forceinline__ void issue_scores(AccS& acc_s) {
    MmaS mma;
    const auto slice = mma.get_thread_slice(thread);
    const auto q = make_tensor(make_smem_ptr(smem.q[group]), typename Traits::LayoutQ{});
    const auto k = make_tensor(make_smem_ptr(smem.k[0]), typename Traits::LayoutK{});
    auto fragment_q = slice.make_fragment_A(slice.partition_A(q));
    const auto fragment_k = slice.make_fragment_B(slice.partition_B(k));
    start_gemm<MmaS, Accumulate::kNo>(fragment_q, fragment_k(_, _, _, ring.stage()), acc_s);
  }

  // Starts O += P V (F6).
  __device__ __forceinline__ void issue_output(const Ring<Traits::kStages>& at) {
    MmaO mma;
    const auto slice = mma.get_thread_slice(thread);
    const auto v = make_tensor(make_smem_ptr(smem.v[0]), typename Traits::LayoutV{});
    const auto fragment_v = slice.make_fragment_B(slice.partition_B(v));
    if (!v_there) smem.barriers.v_full[at.stage()].wait(at.parity());
    start_gemm<MmaO, Accumulate::kYes>(probabilities, fragment_v(_, _, _, at.stage()), acc_out);
  }

  __device__ __forceinline__ void finish_output(const Ring<Traits::kStages>& at) {
    finish_gemm<0>(acc_out);
    release_block(smem.barriers.v_empty[at.stage()]);
  }

  // Key blocks of the tile that no row of this group sees.
  __device__ __forceinline__ void skip(int blocks) {
    CUTE_NO_UNROLL
    for (; blocks > 0; --blocks) {
      wait_for_k();
      release_block(smem.barriers.k_empty[ring.stage()]);
      GroupTurns::wait(group);
      GroupTurns::pass(group);
      smem.barriers.v_full[ring.stage()].wait(ring.parity());
      release_block(smem.barriers.v_empty[ring.stage()]);
      ++ring.use;
    }
  }

  // The first row of the group's tile that this thread holds; the other one is 8 below.
  __device__ __forceinline__ int thread_row() const {
    return thread / 32 * Traits::kWarpRows + thread % 32 / 4;
  }

  // F2 to F6 for the key blocks that this group sees, last block first; acc_s: in a chain, S of it.
  __device__ __forceinline__ void attend(AccS& acc_s, int row_begin, const BlockRange& blocks) {
    const BlockRange whole = visible.whole_key_blocks(row_begin, kGroupRows, kTileN);
    int block = blocks.end - 1;
    bool last = block == blocks.begin;
    step<true>(acc_s, row_begin, block, whole, last);
    CUTE_NO_UNROLL
    while (!last) {
      --block;
      last = block == blocks.begin;
      AccS scores;
      step<false>(scores, row_begin, block, whole, last);
    }
    if constexpr (!Traits::kLeaveQEarly) release(smem.barriers.q_empty[group]);
    const Ring<Traits::kStages> before{ring.use - 1};
    issue_output(before);
    if constexpr (Traits::kTwoConsumers) advance();
    finish_output(before);
  }

  // F7: out = O / l and L = m + log l. Every warp stores its 16 rows by itself.
  __device__ __forceinline__ void write_output(const TileCoord& coord, int row_begin) {
    float inverse_sum[kRows], lse[kRows];
    softmax.finish(inverse_sum, lse, scale_log2);
    auto out = rows_columns(acc_out);
    scale_rows(out, inverse_sum);

    const AttentionShape& shape = arguments.params.shape;
    float* lse_head =
        arguments.params.lse + (int64_t(coord.batch) * shape.heads_q + coord.head) * shape.seqlen_q;
    if (thread % 4 == 0) {  // one thread of each quad
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = row_begin + thread_row() + 8 * i;
        if (row >= 0 && row < shape.seqlen_q) lse_head[row] = lse[i];
      }
    }

    const Ring<Traits::kStages> at = out_use();
    if constexpr (!Traits::kOwnOutBuffer) {
      smem.barriers.v_empty[at.stage()].wait(at.parity() ^ 1);
      out_pending = true;
    }
    const auto values = rounded<Element>(acc_out);
    const int lane = thread % 32, warp_row = thread / 32 * Traits::kWarpRows;
    Element* const tile = smem.out_tile(group, at.stage());
    auto smem_out = as_position_independent_swizzle_tensor(
        make_tensor(make_smem_ptr(tile), typename Traits::LayoutOut{}));
    using CopyAtom = Copy_Atom<SM90_U32x4_STSM_N, Element>;
    const auto copy_out =
        make_tiled_copy_C(CopyAtom{}, typename Traits::MmaOutPart{}).get_thread_slice(thread);
    CUTE_UNROLL
    for (int i = 0; i < Traits::kOutParts; ++i) {
      if constexpr (Traits::kOwnOutBuffer) wait_for_store();
      const auto part =
          make_tensor(values.data() + i * size(AccOutPart{}), typename AccOutPart::layout_type{});
      copy(CopyAtom{}, copy_out.retile_S(part), copy_out.partition_D(smem_out));
      tma_store_fence();
      __syncwarp();
      if (lane == 0 && row_begin + warp_row >= 0) {
        tma_store<kGroupRows, Traits::kOutColumns>(
            arguments.out, tile + warp_row * kBoxColumns<Traits::kOutColumns>,
            {row_begin + warp_row, coord.head, coord.batch, i * Traits::kOutColumns});
      }
    }
  }

  // Where there is no buffer for the output, each of the two groups takes a stage of V for it after
  // the last block of a tile: group 0 that of the last block but one, group 1 that of the last,
  // which the other group leaves first.
  __device__ __forceinline__ Ring<Traits::kStages> out_use() const {
    return Ring<Traits::kStages>{ring.use + group};
  }

  // Gives that stage back, if the group has one; before its next block.
  __device__ __forceinline__ void leave_out() {
    if constexpr (!Traits::kOwnOutBuffer) {
      if (out_pending) {
        wait_for_store();
        release_block(smem.barriers.out_empty[out_use().stage()]);
        out_pending = false;
      }
    }
  }

  // Until this warp's last store has read shared memory.
  __device__ __forceinline__ void wait_for_store() const {
    if (thread % 32 == 0) tma_store_wait<0>();
    __syncwarp();
  }

  // Finds the next tile; nothing hides the divisions between two tiles. Two consumers do it under
  // the last products of a tile, where they would only wait; with more it is no gain.
  __device__ __forceinline__ void advance() { more = schedule.next(next_tile); }

  // Key blocks of a tile that some row of this group sees.
  __device__ __forceinline__ BlockRange group_blocks(int row_begin) const {
    const BlockRange blocks = visible.key_blocks(row_begin, kGroupRows, kTileN);
    return {blocks.begin, row_begin > -kGroupRows ? blocks.end : blocks.begin};
  }
  __device__ __forceinline__ int first_row(const ForwardTile& tile) const {
    return tile.row_begin + Traits::group_row(group);
  }

  __device__ __forceinline__ void wait_for_q() {
    smem.barriers.q_full[group].wait(q_parity);
    q_parity ^= 1;
  }

  // Up to the first block that the group sees; in a chain, up to the turn for its scores.
  __device__ __forceinline__ void open(const ForwardTile& tile, const BlockRange& blocks) {
    wait_for_q();
    if (blocks.end != tile.blocks.end) leave_out();
    skip(tile.blocks.end - blocks.end);
    if constexpr (Traits::kChain) {
      wait_for_k();
      GroupTurns::wait(group);
    }
  }

  // Tiles of which this group sees keys, up to the first of which it sees none: the first scores of
  // each run under the output of the one before.
  __device__ __forceinline__ void run_chain(ForwardTile tile, BlockRange blocks) {
    int row_begin = first_row(tile);
    AccS acc_s;
    open(tile, blocks);
    issue_scores(acc_s);
    GroupTurns::pass(group);
    finish_gemm<0>(acc_s);
    bool chained;
    CUTE_NO_UNROLL
    do {
      leave_scores(blocks.end - 1 == blocks.begin);
      clear(acc_out);
      softmax = RowSoftmax<kRows>();
      attend(acc_s, row_begin, blocks);
      skip(blocks.begin - tile.blocks.begin);
      const int next_row = first_row(next_tile);
      const BlockRange next_blocks = group_blocks(next_row);
      chained = more && next_blocks.begin < next_blocks.end;
      if (chained) open(next_tile, next_blocks);
      issue_scores(acc_s);  // in no branch: after the last tile of what is there, and not used
      if (chained) GroupTurns::pass(group);
      write_output(tile.coord, row_begin);
      finish_gemm<0>(acc_s);
      tile = next_tile;
      row_begin = next_row;
      blocks = next_blocks;
    } while (chained);
  }

  // A tile up to its output.
  __device__ __forceinline__ void run_tile(const ForwardTile& tile, const BlockRange& blocks) {
    clear(acc_out);
    softmax = RowSoftmax<kRows>();
    if (blocks.begin < blocks.end) {
      AccS acc_s;
      open(tile, blocks);
      attend(acc_s, first_row(tile), blocks);
      skip(blocks.begin - tile.blocks.begin);
    } else {
      wait_for_q();
      release(smem.barriers.q_empty[group]);
      leave_out();
      skip(tile.blocks.end - tile.blocks.begin);
      if constexpr (Traits::kTwoConsumers) advance();
    }
  }

  __device__ __forceinline__ void run() {
    GroupTurns::start(group);
    if constexpr (Traits::kTwoConsumers) advance();
    while (Traits::kTwoConsumers ? more : schedule.next(next_tile)) {
      const ForwardTile tile = next_tile;  // two consumers find the one after before its end
      const BlockRange blocks = group_blocks(first_row(tile));
      if constexpr (Traits::kChain) {
        if (blocks.begin < blocks.end) {
          run_chain(tile, blocks);
          continue;
        }
      }
      run_tile(tile, blocks);
      write_output(tile.coord, first_row(tile));
      // Beside one other group ptxas takes the warp for divided otherwise, and keeps nothing of the
      // next tiles in uniform registers.
      if constexpr (Traits::kTwoConsumers && !Traits::kChain) __syncwarp();
    }
    wait_for_store();  // shared memory has to outlive it
  }
};

}  // namespace flash_attn2::sm90
