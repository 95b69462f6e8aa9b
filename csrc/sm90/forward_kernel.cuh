// Forward pass on wgmma and TMA. A persistent thread block is one producer warpgroup, of which one
// thread loads, and two or three consumer warpgroups, each with 64 query rows of a tile. They meet
// in barriers.h only.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward_consumer.cuh"
#include "forward_producer.cuh"

namespace flash_attn2::sm90 {

// Waits for all threads of the cluster that have not ended.
template <int kCluster>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (kCluster > 1) {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ __align__(1024) unsigned char raw_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(raw_smem);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&arguments.q, &arguments.k, &arguments.v}) {
      cute::prefetch_tma_descriptor(map);
    }
    smem.barriers.init();
  }
  __syncthreads();
  sync_cluster<Traits::kCluster>();

  const int group = cutlass::canonical_warp_group_idx();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegs>();
    if (threadIdx.x > 0) return;
    ForwardProducer<Traits>{arguments, smem}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegs>();
    ForwardConsumer<Traits>(arguments, smem, group - 1).run();
  }
  sync_cluster<Traits::kCluster>();  // shared memory has to outlive what the others send
}

}  // namespace flash_attn2::sm90
