// Backward pass on wgmma and TMA (FlashAttention-2, section 3, algorithm 2; parallel over key
// blocks).
//
// A thread block owns kTileN keys of one KV head, for which the query blocks of every query head of
// the group stream by. One warpgroup loads, two compute; they meet in backward_barriers.h only.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward_columns.cuh"
#include "backward_keys.cuh"
#include "backward_producer.cuh"

namespace flash_attn2::sm90 {

// A cluster waits only for ones of lower index, which the GPU starts first, or, where dQ is
// summed in a fixed order, of its own group, for all of which there is room (core/turn_order.h).
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(1024) unsigned char raw_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(raw_smem);
  const BackwardParams& params = arguments.params;
  const bool ordered = params.dq_turn != nullptr;
  let_next_kernel_start();
  if (threadIdx.x == 0) smem.barriers.init();
  __syncthreads();
  arrive_at_cluster<Traits::kCluster>();  // the loading thread waits later
  const unsigned index = blockIdx.x / Traits::kCluster;
  const int group = cutlass::canonical_warp_group_idx();
  // The work is made after setmaxnreg, so that it takes registers of the new share.
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x > 0) wait_for_cluster<Traits::kCluster>();
    if (threadIdx.x == 0) {
      BackwardProducer<Traits>{arguments, smem, BackwardWork<Traits>(params, index)}.run();
    } else if (ordered && threadIdx.x == 32) {
      BackwardProducer<Traits>{arguments, smem, BackwardWork<Traits>(params, index)}.take_turns();
    } else if (ordered && threadIdx.x == 64) {
      BackwardProducer<Traits>{arguments, smem, BackwardWork<Traits>(params, index)}.pass_turns();
    } else if constexpr (Traits::kDqRing) {
      if (threadIdx.x >= DqConverter<Traits>::first_thread(params)) {
        DqConverter<Traits>(arguments, smem, index).run();
      }
    } else if constexpr (Traits::kCluster > 1) {
      if (threadIdx.x == 96) {
        BackwardProducer<Traits>{arguments, smem, BackwardWork<Traits>(params, index)}.send_ds();
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    wait_for_cluster<Traits::kCluster>();
    const BackwardWork<Traits> work(params, index);
    if constexpr (Traits::kSplit == ConsumerSplit::kKeys) {
      KeysConsumer<Traits>(arguments, smem, work, group - 1).run();
    } else {
      ColumnsConsumer<Traits>(arguments, smem, work, group - 1).run();
    }
  }
  sync_cluster<Traits::kCluster>();  // shared memory has to outlive what the other sends
}

}  // namespace flash_attn2::sm90
