// What a kernel is told: plain structs, filled by csrc/ops, read by every kernel family.
// No torch and no CUDA type appears here, so the plan and its tests build with a host compiler.
#pragma once

#include <cstdint>

namespace flash_attn2 {

// One (batch, seqlen, heads, head_dim) tensor. head_dim is contiguous; the other strides are
// counted in elements and taken as the caller has them (64-bit: products may pass 2^31).
struct TensorView {
  void* ptr = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// Sizes of one attention problem. Query head h reads KV head h / (heads_q / heads_k).
struct AttentionShape {
  int batch = 0;
  int seqlen_q = 0;
  int seqlen_k = 0;
  int heads_q = 0;
  int heads_k = 0;
  int head_dim = 0;    // of Q and K; the caller's, <= the kernel's bucket
  int head_dim_v = 0;  // of V and the output, likewise
};

// Query i stands at key position p = i + seqlen_k - seqlen_q and sees the keys j with
// p - left <= j <= p + right; a negative bound is no bound. Causal is right = 0.
struct Window {
  int left = -1;
  int right = -1;
};

struct ForwardParams {
  AttentionShape shape;
  Window window;
  TensorView q, k, v, out;
  float* lse = nullptr;  // (batch, heads_q, seqlen_q), contiguous
  float softmax_scale = 1.f;
  int heads_per_group = 1;  // see core/schedule.h: heads whose K/V share the L2 cache
  // Of a persistent grid, see sm90/schedule.cuh: the heads of the last group, whether each other
  // one of the groups before it and each other round goes backwards.
  int tail_heads = 1;
  bool groups_turn = false, rounds_turn = true;
};

struct BackwardParams {
  AttentionShape shape;  // heads_k: head_parts for each head of K and V
  Window window;
  TensorView q, k, v, out, dout, dq, dk, dv;
  const float* lse = nullptr;   // (batch, heads_q, seqlen_q), contiguous
  const float* dlse = nullptr;  // the same shape, or null where the LSE has no gradient
  float softmax_scale = 1.f;

  // Workspace, in this order, in one allocation that carve_workspace (plan/plan.h) divides:
  // seqlen_q_rounded is seqlen_q rounded up to tile_m, head_dim_rounded is the kernel's bucket of
  // Q.
  float* lse_log2 = nullptr;   // (batch, heads_q, seqlen_q_rounded): LSE * log2(e), +inf on padding
  float* delta = nullptr;      // (batch, heads_q, seqlen_q_rounded): D = rowsum(dO * O) - dLSE
  float* dq_accum = nullptr;   // (dq_slots, heads_q / heads_k, seqlen_q_rounded, head_dim_rounded),
                               // tile order
  int* delta_ready = nullptr;  // (batch, heads_k), likewise the next two; see sm90/delta_ahead.cuh
  int* dq_added = nullptr;     // see sm90/dq_accumulator.cuh
  int* dq_converted = nullptr;
  int* dq_turn = nullptr;  // (batch, heads_q, seqlen_q_rounded / tile_m, dq_parts); null: unordered
                           // adds
  int* ticket = nullptr;   // counts column blocks that were handed out: sm80, when dq_turn is
                           // used; sm90, of a persistent grid
  int* counters = nullptr;   // where delta_ready to ticket lie, and how many ints that is; the
  int64_t counter_ints = 0;  // pre-process zeroes them
  void* dk_parts = nullptr;  // (batch, seqlen_k, heads_k, head_dim), dtype of dk; null: no parts
  void* dv_parts = nullptr;  // (batch, seqlen_k, heads_k, head_dim_v), likewise

  int head_parts = 1;  // of a group of query heads, each with its own dK and dV, see plan/plan.cpp
  int dq_parts = 1;    // of a query tile's dQ, each with turns of its own: the thread blocks of a
                       // cluster have one each
  int delta_lead = 0;  // KV heads whose D the pre-process makes; thread blocks make those of the KV
                       // head that comes so many after their own
  int dq_slots = 1;    // KV heads that have a place in dq_accum, which they take in turn
  int dq_lag = 0;  // a thread block converts dQ of the KV head that comes this many before its own

  // See core/schedule.h.
  int tail_heads = 0;        // KV heads at the end that go side by side,
  int heads_together = 1;    // so many at a time
  int heads_in_reverse = 0;  // of the others, the last key block first; 0: one by one

  int turn_group = 1;  // key blocks that run, and take turns, side by side: see core/turn_order.h
};

}  // namespace flash_attn2
