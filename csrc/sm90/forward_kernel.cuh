// Forward pass on wgmma and TMA. A persistent thread block is one producer warpgroup, of which one
// thread a team loads, and one or two teams of consumer warpgroups, each with 64 query rows of its
// team's tile. The threads of a team meet in barriers.h only, the teams not at all.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward_consumer.cuh"
#include "forward_producer.cuh"

namespace flash_attn2::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ __align__(1024) unsigned char raw_smem[];
  auto* const teams = reinterpret_cast<typename Traits::TeamStorage*>(raw_smem);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&arguments.q, &arguments.k, &arguments.v}) {
      cute::prefetch_tma_descriptor(map);
    }
    for (int team = 0; team < Traits::kTeams; ++team) teams[team].barriers.init();
  }
  __syncthreads();
  sync_cluster<Traits::kCluster>();

  const int group = cutlass::canonical_warp_group_idx();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegs>();
    const int team = Traits::kTeams == 1 ? 0 : threadIdx.x / 32;
    if (threadIdx.x >= Traits::kTeams * 32 || threadIdx.x % 32 > 0) return;
    ForwardProducer<Traits>{arguments, teams[team], team}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegs>();
    const int team = Traits::kTeams == 1 ? 0 : (group - 1) / Traits::kGroups;
    ForwardConsumer<Traits>(arguments, teams[team], team, group - 1 - team * Traits::kGroups).run();
  }
  sync_cluster<Traits::kCluster>();  // shared memory has to outlive what the others send
}

}  // namespace flash_attn2::sm90
