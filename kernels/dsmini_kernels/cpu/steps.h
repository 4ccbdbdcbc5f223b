// The calls of products, of the parts of a decoding step, and of Muon, as they come from Python, which packs them field by field
// (steps.py). `*_bytes` is the memory from each pointer on. All numbers are FP32 but those of weights and caches.

#pragma once

#include "matrix.h"
#include "team.h"

constexpr int64_t MOST_TOKENS = 32, MOST_EXPERTS = 512, MOST_STACK = 1 << 16, MOST_SIDE = 1 << 16;

// y[n, rows] = x[n, columns] w^T; x and y are contiguous, FP32 or BF16.
struct LinearCall {
  int64_t threads;
  int64_t n, bf16;
  const char* x;
  int64_t x_bytes;
  char* y;
  int64_t y_bytes;
  Matrix w;
};

// The places of the topk <= t keys with the largest scores of an indexer for each query, and -1 where it sees fewer. q and
// k are both FP32 or both BF16. All is contiguous but for the batches of k, which are `k_stride` bytes apart.
struct PicksCall {
  int64_t threads;
  int64_t b, s, t, heads, width, topk, bf16;
  const char* q;  // [b, s, heads, width]
  int64_t q_bytes;
  const char* k;  // [b, t, width]
  int64_t k_bytes, k_stride;
  const float* weights;  // [b, s, heads]
  int64_t weights_bytes;
  const uint8_t* hidden;  // [hidden_batch, s, t]; hidden_batch is b or 1
  int64_t hidden_bytes, hidden_batch;
  int64_t* picks;  // [b, s, topk]
  int64_t picks_bytes;
};

// softmax(scale q . rows[picks]) rows[picks], of the first `latent` numbers of a row, for each query and all its heads. A
// pick of -1 is none; without any the result is NaN. Types and strides as of PicksCall.
struct PickedCall {
  int64_t threads;
  int64_t b, s, t, heads, width, latent, k, bf16;
  const char* q;  // [b, s, heads, width]
  int64_t q_bytes;
  const char* rows;  // [b, t, width]
  int64_t rows_bytes, rows_stride;
  const int64_t* picks;  // [b, s, k]
  int64_t picks_bytes;
  char* out;  // [b, s, heads, latent]
  int64_t out_bytes;
  double scale;
};

// y[n] = [norm(first[n]) | norm(second[n])], or the first alone where second is null. All of it contiguous.
struct NormsCall {
  int64_t threads;
  int64_t n, dim;
  const float *first, *second;
  int64_t first_bytes, second_bytes;
  const float *first_norm, *second_norm;
  int64_t first_norm_bytes, second_norm_bytes;
  float* y;
  int64_t y_bytes;
  double first_eps, second_eps;
};

// RMSNorm of rows [n, dim] in training, in FP32 or BF16. Forward writes y and inverse, backward reads inverse and dy, and
// writes the gradient of x to y, and dw. The rows of x are x_stride bytes apart, all else is contiguous.
struct TrainedNormCall {
  int64_t threads;
  int64_t n, dim, bf16, backward;
  const char* x;
  int64_t x_bytes, x_stride;
  const float* weight;
  int64_t weight_bytes;
  float* inverse;  // [n]
  int64_t inverse_bytes;
  char* y;
  int64_t y_bytes;
  const char* dy;
  int64_t dy_bytes;
  float* dw;
  int64_t dw_bytes;
  double eps;
};

// The indexer of an attention: topk 0 where there is none. Its queries read what wq_b reads.
struct Indexer {
  int64_t heads, width, topk, halves;  // halves: RoPE pairs the halves of the first numbers, not neighbours
  const float *norm, *bias;
  int64_t norm_bytes, bias_bytes;
  char* cache;  // rows of `row` bytes, with the places of the attention's
  int64_t cache_bytes, type, row;
  Matrix wq, wk, weights;
};

// x + MLA(norm(x)) for s tokens of each of b sequences, absorbed: dsmini/inference/fused has the equations.
struct AttentionCall {
  int64_t threads;
  int64_t b, s, dim, heads, nope, rope, latent, value, q_rank;  // q_rank 0: wq_b reads the normed x
  const float* x;
  int64_t x_bytes;
  float* y;
  int64_t y_bytes;
  const float *attn_norm, *q_norm, *kv_norm;
  int64_t attn_norm_bytes, q_norm_bytes, kv_norm_bytes;
  const float *cos, *sin;  // [tables, s, rope / 2], of every sequence or of all
  int64_t table_bytes, tables;
  char* cache;  // rows of `cache_row` bytes; a sequence has room for `room`
  int64_t cache_bytes, cache_type, cache_row, room;
  const int64_t* starts;  // [b]: position of the first new token
  int64_t starts_bytes;
  Matrix wq_a, wq_b, wkv_a, wkv_b, wo;
  Indexer index;
  double scale, attn_eps, q_eps, kv_eps, index_eps;
};

// x + Attention(norm(x)) for s tokens of each of b sequences: MHA, GQA or MQA. `group` query heads share a key head.
struct GroupedCall {
  int64_t threads;
  int64_t b, s, dim, key_heads, group, width, value;  // width: numbers of a query or key of one head
  const float* x;
  int64_t x_bytes;
  float* y;
  int64_t y_bytes;
  const float* norm;
  int64_t norm_bytes;
  const float *cos, *sin;  // [tables, s, width / 2], of every sequence or of all
  int64_t table_bytes, tables;
  char* cache;  // rows [keys of all heads | values of all heads], FP32 or BF16; a sequence has room for `room`
  int64_t cache_bytes, cache_type, cache_row, room;
  const int64_t* starts;  // [b]: position of the first new token
  int64_t starts_bytes;
  Matrix wq, wk, wv, wo;
  double scale, eps;
};

enum Score : int64_t { SIGMOID, SOFTMAX, SCORES };

// x + FFN(norm(x)) for n tokens: the dense or shared experts (w1, w2, w3; none if inter is 0), and where `experts` is
// not 0 the routed ones. Routing comes back in indices, weights [n, k], scores [n, experts] and counts [experts].
struct FeedForwardCall {
  int64_t threads;
  int64_t n, dim, inter, experts, expert_inter, k, groups, kept_groups, score, normed;
  const float* x;
  int64_t x_bytes;
  float* y;
  int64_t y_bytes;
  const float *norm, *gate, *bias;  // bias may be null
  int64_t norm_bytes, gate_bytes, bias_bytes;
  int64_t* indices;
  float *weights, *scores;
  int64_t* counts;
  int64_t indices_bytes, weights_bytes, scores_bytes, counts_bytes;
  Matrix w1, w2, w3, e1, e2, e3;  // e1 and e3: [experts * expert_inter, dim]; e2: [experts * dim, expert_inter]
  double eps, route_scale;
};

// y[n] = the sum over a token's k experts of weight * w2 (silu(w1 x) * (w3 x)). x and y are FP32 or BF16, contiguous.
struct ExpertsCall {
  int64_t threads;
  int64_t n, dim, inter, experts, k, bf16;
  const char* x;
  int64_t x_bytes;
  char* y;
  int64_t y_bytes;
  const int64_t* indices;  // [n, k]
  int64_t indices_bytes;
  const float* weights;  // [n, k]
  int64_t weights_bytes;
  Matrix w1, w2, w3;  // w1 and w3: [experts * inter, dim]; w2: [experts * dim, inter]
};

// The same for training. Forward writes y, gate and up; backward reads dy, gate and up, and writes all gradients. x, y,
// dy, dx, gate and up are FP32 or BF16; gate and up are [n k, inter], sorted by expert. Everything is contiguous.
struct TrainedCall {
  int64_t threads;
  int64_t n, dim, inter, experts, k, bf16, backward;
  const char* x;
  int64_t x_bytes;
  char* y;
  int64_t y_bytes;
  const char* dy;
  int64_t dy_bytes;
  const int64_t* indices;  // [n, k]
  int64_t indices_bytes;
  const float* weights;  // [n, k]
  int64_t weights_bytes;
  char *gate, *up;
  int64_t gate_bytes, up_bytes;
  char* dx;
  int64_t dx_bytes;
  float *dweights, *dw1, *dw2, *dw3;
  int64_t dweights_bytes, dw1_bytes, dw2_bytes, dw3_bytes;
  Matrix w1, w2, w3;  // FP32
};

// Rows of heads, [b, h, rows, numbers]. Strides are in bytes.
struct Heads {
  char* data;
  int64_t bytes, batch, head, row;
  INLINE char* of(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
  INLINE bool fit(int64_t b, int64_t h, int64_t rows, int64_t row_bytes) const {
    int64_t end = row_bytes, step;
    const int64_t counts[] = {b, h, rows}, strides[] = {batch, head, row};
    for (int i = 0; i < 3; ++i)
      if (strides[i] < 0 || __builtin_mul_overflow(counts[i] - 1, strides[i], &step) || __builtin_add_overflow(end, step, &end))
        return false;
    return data != nullptr && end <= bytes;
  }
};

// y = softmax(scale q k^T) v of each head; `h / groups` heads share keys and values. All are FP32 or all BF16. With
// `causal` the last query sees all keys, and each before it one less. Backward is in FP32, with a group for each head. It
// reads y, lse and dy, and writes the other gradients.
struct HeadsCall {
  int64_t threads;
  int64_t b, h, groups, s, t, d, v, bf16, backward, causal;
  Heads q, k, v_rows, y, dy, dq, dk, dv;
  float* lse;  // [b, h, s]; null: not wanted
  int64_t lse_bytes;
  const uint8_t* mask;  // [mask_batch, s, t], 1 for keys that a query does not see; null: it sees all
  int64_t mask_bytes, mask_batch;
  double scale;
};

// `count` matrices [rows, columns] that lie one after the other: parameters, gradients, momenta.
struct MuonPiece {
  float* p;
  int64_t p_bytes;
  const float* g;
  int64_t g_bytes;
  float* m;
  int64_t m_bytes;
  int64_t count, rows, columns, stacked;  // of a stack those without gradient only decay
};

// A step of Muon. X is divided by its Frobenius norm. An iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X, with FP32
// sums of FP32 or BF16 numbers, or if `rational` X <- (a + b X X^T) (1 + c X X^T)^-1 X in FP32.
struct MuonCall {
  int64_t threads;
  int64_t bf16, rational, pieces, steps;
  const MuonPiece* piece;
  int64_t piece_bytes;
  const double* coefficients;  // [steps, 3]
  int64_t coefficients_bytes;
  double lr, momentum, decay;
};
