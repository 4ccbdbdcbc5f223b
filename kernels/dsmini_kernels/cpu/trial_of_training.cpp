// The trial of the library for training.

#include "trial.h"

#include <math.h>

extern "C" int64_t dsmini_trained_experts(const TrainedExpertsCall*, int64_t);
extern "C" int64_t dsmini_trained_norm(const TrainedNormCall*, int64_t);
extern "C" int64_t dsmini_muon(const MuonCall*, int64_t);

namespace {

void try_trained_experts(Trial& trial, int64_t bf16, int64_t backward, double limit) {
  const int64_t n = 143, size = bf16 ? 2 : 4;
  Memory memory;
  TrainedExpertsCall c{};
  c.threads = 1, c.n = n, c.dim = 45, c.inter = 37, c.experts = 4, c.k = 2, c.bf16 = bf16, c.backward = backward;
  c.limit = limit;
  const int64_t rows = n * c.dim * size, kept = n * c.k * c.inter * size, matrix = c.experts * c.inter * c.dim * 4;
  c.x = memory.bytes(rows), c.y = memory.bytes(limit < INFINITY ? n * c.dim * 4 : rows), c.dy = memory.bytes(rows), c.dx = memory.bytes(rows);
  c.indices = memory.chosen(n * c.k, c.experts), c.weights = memory.bytes(n * c.k * 4);
  c.gate = memory.bytes(kept), c.up = memory.bytes(kept), c.dweights = memory.bytes(n * c.k * 4);
  c.dw1 = memory.bytes(matrix), c.dw2 = memory.bytes(matrix), c.dw3 = memory.bytes(matrix);
  c.w1 = memory.matrix(c.inter, c.dim, WEIGHT_FP32, c.experts), c.w3 = memory.matrix(c.inter, c.dim, WEIGHT_FP32, c.experts);
  c.w2 = memory.matrix(c.dim, c.inter, WEIGHT_FP32, c.experts);
  trial.run("trained_experts", dsmini_trained_experts, c);
}

void try_trained_norm(Trial& trial, int64_t bf16, int64_t backward) {
  const int64_t n = 35, dim = 37, size = bf16 ? 2 : 4;
  Memory memory;
  TrainedNormCall c{};
  c.threads = 1, c.n = n, c.dim = dim, c.bf16 = bf16, c.backward = backward, c.x_stride = dim * size + 6, c.eps = 1e-6;
  c.x = memory.bytes(n * c.x_stride - 6), c.weight = memory.bytes(dim * 4), c.inverse = memory.bytes(n * 4);
  c.y = memory.bytes(n * dim * size), c.dy = memory.bytes(backward * n * dim * size), c.dw = memory.bytes(backward * dim * 4);
  trial.run("trained_norm", dsmini_trained_norm, c);
}

void try_muon(Trial& trial, int64_t bf16, int64_t rational) {
  constexpr int64_t SHAPES[][3] = {{3, 37, 70}, {1, 70, 37}, {2, 1, 1}}, PIECES = 3, STEPS = 2;
  Memory memory;
  const Lent pieces = memory.bytes(PIECES * sizeof(MuonPiece)), coefficients = memory.bytes(STEPS * 24);
  for (int64_t i = 0; i < PIECES; ++i) {
    const auto& [count, rows, columns] = SHAPES[i];
    Lent numbers[3];
    for (Lent& lent : numbers) {
      lent = memory.bytes(count * rows * columns * 4);
      memset(static_cast<char*>(lent.data) + 1, 0x3D, 2);  // not all are zero
    }
    static_cast<MuonPiece*>(pieces.data)[i] = {numbers[0], numbers[1], numbers[2], count, rows, columns, count > 1};
  }
  for (int64_t i = 0; i < STEPS; ++i) {
    double* step = static_cast<double*>(coefficients.data) + 3 * i;
    step[0] = 1.5, step[1] = -0.5;
  }
  MuonCall c{};
  c.threads = 1, c.bf16 = bf16, c.rational = rational, c.pieces = PIECES, c.steps = STEPS;
  c.piece = pieces, c.coefficients = coefficients, c.lr = 0.1, c.momentum = 0.9, c.decay = 0.1;
  trial.run("muon", dsmini_muon, c);
}

}  // namespace

const char* dsmini_try() {
  Trial trial;
  for (const int64_t bf16 : {0, 1})
    for (const int64_t flag : {0, 1})
      try_trained_experts(trial, bf16, flag, INFINITY), try_trained_experts(trial, bf16, flag, 0.5), try_trained_norm(trial, bf16, flag), try_muon(trial, bf16, flag);
  return trial.failed;
}
