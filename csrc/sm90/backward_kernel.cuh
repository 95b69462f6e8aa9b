// Backward pass on wgmma and TMA (FlashAttention-2, section 3, algorithm 2; parallel over key
// blocks).
//
// A tile is kTileN keys of one KV head, for which the query blocks of every query head of the group
// stream by. One warpgroup loads, two compute; they meet in backward_barriers.h only.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward_columns.cuh"
#include "backward_head.cuh"
#include "backward_head_dq.cuh"
#include "backward_head_loads.cuh"
#include "backward_keys.cuh"
#include "backward_producer.cuh"

namespace flash_attn2::sm90 {

// A thread block waits only for tiles of lower index, which are begun first, or, where dQ is summed
// in a fixed order, of its own group, for all of which there is room (core/turn_order.h).
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(1024) unsigned char raw_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(raw_smem);
  const BackwardParams& params = arguments.params;
  const bool ordered = params.dq_turn != nullptr;
  // Threads that wait for work beside the consumers: who makes dQ and loads the rest, or who keeps
  // turns and converts, or who only converts.
  const int others = Traits::kWholeHeads ? kWarpGroupThreads + 2 : ordered ? 34 : 96;
  let_next_kernel_start();
  if (threadIdx.x == 0) smem.barriers.init(others);
  if (!Traits::kPersistent && threadIdx.x == 32) {
    smem.work[0] = BackwardWork<Traits>(params, blockIdx.x / Traits::kCluster);
  }
  __syncthreads();
  arrive_at_cluster<Traits::kCluster>();  // the loading thread waits later
  const int group = cutlass::canonical_warp_group_idx();
  if (Traits::kWholeHeads && group > kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kDqRegisters>();
    if constexpr (Traits::kWholeHeads) sum_dq_of_heads<Traits>(arguments, smem);
  } else if (group > 0) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    wait_for_cluster<Traits::kCluster>();
    if constexpr (Traits::kWholeHeads) {
      run_head_consumer<Traits>(arguments, smem, group - 1);
    } else if constexpr (Traits::kSplit == ConsumerSplit::kKeys) {
      run_keys_consumer<Traits>(arguments, smem, group - 1);
    } else {
      ColumnsConsumer<Traits>(arguments, smem, 0, group - 1).run();
    }
  } else {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x > 0) wait_for_cluster<Traits::kCluster>();
    if constexpr (Traits::kWholeHeads) {
      load_heads<Traits>(arguments, smem);
    } else if (threadIdx.x < 32) {
      if (threadIdx.x == 0) run_producer<Traits>(arguments, smem);
    } else if (threadIdx.x < 96 && ordered) {
      if (threadIdx.x == 32) keep_turns<Traits, true>(arguments, smem);
      if (threadIdx.x == 64) keep_turns<Traits, false>(arguments, smem);
    } else if constexpr (Traits::kDqRing) {
      run_converter<Traits>(arguments, smem);
    } else if constexpr (Traits::kCluster > 1) {
      if (threadIdx.x == 96) {
        wait_for_previous_kernel();  // which zeroes the counters
        count_delta_ahead(params, smem, smem.work[0]);
        send_ds<Traits>(smem);
      }
    }
  }
  sync_cluster<Traits::kCluster>();  // shared memory has to outlive what the other sends
}

}  // namespace flash_attn2::sm90
