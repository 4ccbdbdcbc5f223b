// The trial of experts, which two libraries have.

#pragma once

#include "trial.h"

extern "C" int64_t dsmini_experts(const ExpertsCall*, int64_t);

namespace {

void try_experts(Trial& trial, int64_t n, int64_t type, int64_t bf16) {
  const int64_t size = bf16 ? 2 : 4;
  Memory memory;
  ExpertsCall c{};
  c.threads = 1, c.n = n, c.dim = 45, c.inter = 37, c.experts = 3, c.k = 2, c.bf16 = bf16;
  c.x = memory.bytes(n * c.dim * size), c.y = memory.bytes(n * c.dim * size);
  c.indices = memory.chosen(n * c.k, c.experts), c.weights = memory.bytes(n * c.k * 4);
  c.w1 = memory.matrix(c.inter, c.dim, type, c.experts), c.w3 = memory.matrix(c.inter, c.dim, type, c.experts);
  c.w2 = memory.matrix(c.dim, c.inter, type, c.experts);
  trial.run("experts", dsmini_experts, c);
}

void try_all_experts(Trial& trial) {
  for (const int64_t bf16 : {0, 1})
    for (int64_t type = 0; type < WEIGHT_TYPES; ++type) try_experts(trial, 1, type, bf16), try_experts(trial, 40, type, bf16);
}

}  // namespace
