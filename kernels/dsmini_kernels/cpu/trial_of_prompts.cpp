// The trial of the library for prompts.

#include "trial_of_experts.h"

extern "C" int64_t dsmini_heads_attention(const HeadsAttentionCall*, int64_t);

namespace {

void try_heads_attention(Trial& trial, int64_t bf16, int64_t backward, int64_t masked) {
  const int64_t size = bf16 ? 2 : 4;
  Memory memory;
  HeadsAttentionCall c{};
  c.threads = 1, c.b = 2, c.h = c.groups = 2, c.s = 131, c.t = 150, c.d = 37, c.v = 21, c.bf16 = bf16, c.backward = backward;
  c.causal = !masked, c.mask_batch = masked, c.scale = 0.1;
  const auto heads = [&](int64_t rows, int64_t width) -> Heads {
    return {memory.bytes(c.b * c.h * rows * width * size), c.h * rows * width * size, width * size, c.h * width * size};
  };
  c.q = heads(c.s, c.d), c.k = heads(c.t, c.d), c.v_rows = heads(c.t, c.v), c.y = heads(c.s, c.v);
  if (backward) c.dy = heads(c.s, c.v), c.dq = heads(c.s, c.d), c.dk = heads(c.t, c.d), c.dv = heads(c.t, c.v);
  c.lse = memory.bytes(c.b * c.h * c.s * 4), c.mask = memory.bytes(masked * c.s * c.t);
  trial.run("heads_attention", dsmini_heads_attention, c);
}

}  // namespace

const char* dsmini_try() {
  Trial trial;
  try_all_experts(trial);
  for (const int64_t bf16 : {0, 1})
    for (const int64_t masked : {0, 1}) try_heads_attention(trial, bf16, 0, masked);
  for (const int64_t masked : {0, 1}) try_heads_attention(trial, 0, 1, masked);
  return trial.failed;
}
