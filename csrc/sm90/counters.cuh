// Counters in global memory by which thread blocks of a kernel wait for each other.
#pragma once

namespace flash_attn2::sm90 {

// With relaxed loads: after each acquire the SM drops its L1 cache. For a thread that neither reads
// what was counted nor lets others read it.
__device__ __forceinline__ void poll_count(const int* counter, int least) {
  int count;
  do {
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  } while (count < least);
}
// Acquires at once, as mostly there is nothing to wait for.
__device__ __forceinline__ void wait_for_count(const int* counter, int least) {
  for (;;) {
    int count;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    if (count >= least) return;
    poll_count(counter, least);
  }
}

// Between accesses to global memory by bulk copies and by other instructions.
__device__ __forceinline__ void fence_bulk_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
// tma_store_wait, but for the writes, not only the reads.
__device__ __forceinline__ void wait_for_bulk_writes() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace flash_attn2::sm90
