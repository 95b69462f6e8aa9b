// Programmatic dependent launch: the kernels of one pass start while the one before them ends.
// On GPUs before sm_90 kernels start one after the other, and these do nothing.
#pragma once

namespace flash_attn2 {

// The kernel launched after this one with Start::kWithPrevious may start as soon as every thread
// block of this one has come here or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and its writes are visible. A kernel launched with
// Start::kWithPrevious has to come here in every thread block before it ends, even where it reads
// nothing, because the kernel after it takes its end for the end of all before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flash_attn2
