// The calls of the libraries' functions: dsmini_linear takes a LinearCall, and so on. This is their one description: Python
// reads it (structs.py) and packs a call by the names of its fields. So a member is a number of eight bytes, a Span or a
// struct of such members, one declaration a line, before any function. All numbers are FP32 but those of weights and caches.

#pragma once

#include "matrix.h"

constexpr int64_t MOST_TOKENS = 32, MOST_WIDTH = 1024, MOST_EXPERTS = 512, MOST_STACK = 1 << 16, MOST_SIDE = 1 << 16;
constexpr int64_t MOST_STREAMS = 16, MOST_STEP_STREAMS = 8;

// A rounding of tiles. x [batch, rows, columns] has strides in elements; out and scales are contiguous. For dequantize x
// holds codes and its strides are bytes.
struct TilesCall {
  int64_t operation, threads, in_type, out_type, format, powers_of_two;
  int64_t batch, rows, columns, tile_rows, tile_columns;
  Span<const char> x;
  int64_t batch_stride, row_stride;
  Span<char> out, scales;
  Span<const int64_t> ends;  // of groups of rows
  int64_t groups;
  double amax_min;
  Parallel* parallel;  // GOMP_parallel, or null for one thread
};

// y[n, rows] = x[n, columns] w^T; x and y are contiguous, FP32 or BF16.
struct LinearCall {
  int64_t threads, n, bf16;
  Span<const char> x;
  Span<char> y;
  Matrix w;
};

// The places of the topk <= t keys with the largest scores of an indexer for each query, and -1 where it sees fewer. q and
// k are both FP32 or both BF16. All is contiguous but for the batches of k, which are `k_stride` bytes apart.
struct TopkKeysCall {
  int64_t threads, b, s, t, heads, width, topk, bf16;
  Span<const char> q;  // [b, s, heads, width]
  Span<const char> k;  // [b, t, width]
  int64_t k_stride;
  Span<const float> weights;  // [b, s, heads]
  Span<const uint8_t> mask;   // [mask_batch, s, t], 1 for keys that a query does not see; mask_batch is b or 1
  int64_t mask_batch;
  Span<int64_t> topk_indices;  // [b, s, topk]
};

// softmax(scale q . rows[topk_indices]) rows[topk_indices], of the first `latent` numbers of a row, for each query and all
// its heads. An index of -1 is none; without any the result is NaN. Types and strides as of TopkKeysCall.
struct TopkAttentionCall {
  int64_t threads, b, s, t, heads, width, latent, k, bf16;
  Span<const char> q;     // [b, s, heads, width]
  Span<const char> rows;  // [b, t, width]
  int64_t rows_stride;
  Span<const int64_t> topk_indices;  // [b, s, k]
  Span<char> out;                    // [b, s, heads, latent]
  double scale;
};

enum KeyType : int64_t { KEYS_FP32, KEYS_BF16, KEYS_FP8, KEYS_FP4, KEY_TYPES };

// Rows of a cache, `count` of each sequence, in a type of key_rows.h. `batch` and `row` are the bytes from one to the next.
struct KeyRows {
  Span<char> data;
  int64_t type, count, batch, row;
  int64_t codes, tile;  // numbers with codes, and how many of them share a scale; both 0 for FP32 and BF16
};

// softmax([scale q . rows ; sink]) rows, without the sink's part, over the rows of a window and some entries, for each query
// and all its heads. A row is key and value. q and out are FP32 or BF16; all but rows is contiguous.
struct EntryAttentionCall {
  int64_t threads, b, s, heads, width, bf16;
  Span<const char> q;  // [b, s, heads, width]
  KeyRows near, entries;
  Span<const uint8_t> masked;  // [masked_batch, s, near.count], 1 for rows that a query does not see; masked_batch is b or 1
  int64_t masked_batch;
  Span<const uint8_t> hidden;  // the same of entries
  int64_t hidden_batch;
  Span<const int64_t> chosen;  // [b, s, k] places of entries, -1 for none, in place of `hidden`; null: all that are not hidden
  int64_t k;
  Span<const float> sink;  // [heads]
  Span<char> out;          // [b, s, heads, width]
  double scale;
};

// y[n] = norm(x[n]). All of it contiguous.
struct NormsCall {
  int64_t threads, n, dim;
  Span<const float> x, weight;
  Span<float> y;
  double eps;
};

// RMSNorm of rows [n, dim] in training, in FP32 or BF16. Forward writes y and inverse, backward reads inverse and dy, and
// writes the gradient of x to y, and dw. The rows of x are x_stride bytes apart, all else is contiguous.
struct TrainedNormCall {
  int64_t threads, n, dim, bf16, backward;
  Span<const char> x;
  int64_t x_stride;
  Span<const float> weight;
  Span<float> inverse;  // [n]
  Span<char> y;
  Span<const char> dy;
  Span<float> dw;
  double eps;
};

// Sums of residual streams by weights of each of n tokens: y_k = sum_j mix_jk x_j, + post_k output where there is an output of
// a sublayer. Backward reads dy and writes the other gradients. Rows are FP32 or BF16, all is contiguous.
struct StreamsCall {
  int64_t threads, n, streams, outputs, dim, bf16, backward;
  Span<const char> x;       // [n, streams, dim]
  Span<const char> output;  // [n, dim]; null: none, and no post
  Span<const float> mix;    // [n, streams, outputs]
  Span<const float> post;   // [n, outputs]
  Span<char> y;             // [n, outputs, dim]
  Span<const char> dy;
  Span<char> dx, doutput;
  Span<float> dmix, dpost;
};

// Sinkhorn's matrices of n tokens, from logits [n, n_streams, n_streams]. Backward reads dy and writes the gradient of the
// logits to y.
struct SinkhornCall {
  int64_t threads, n, n_streams, iterations, backward;
  Span<const float> logits, dy;
  Span<float> y;
  double eps;
};

// The attention of a decoding step is x + attention(norm(x)) for s tokens of each of b sequences. This changes from step to
// step and from layer to layer, for all kinds of attention.
struct AttentionStep {
  int64_t threads, b, s, dim;
  Span<const float> x;
  Span<float> y;
  Span<const float> cos, sin;  // [cos_sin_batch, s, pairs], of every sequence or of all
  int64_t cos_sin_batch;
  Span<char> cache;  // rows of `cache_row` bytes; a sequence has room for `room`
  int64_t cache_type, cache_row, room;
  Span<char> index_cache;  // the indexer's, with the places of the attention's
  int64_t index_cache_type, index_cache_row;
  Span<const int64_t> starts;  // [b]: position of the first new token
};

// The indexer of an attention: topk 0 where there is none. Its queries read what wq_b reads.
struct Indexer {
  int64_t heads, width, topk, halves;  // halves: RoPE pairs the halves of the first numbers, not neighbours
  Span<const float> norm, bias;
  Matrix wq, wk, weights;
  double eps;
};

// What stays of MLA, absorbed: dsmini/inference/fused.py has the equations.
struct MlaWeights {
  int64_t heads, nope, rope, latent, value, q_rank;  // q_rank 0: wq_b reads the normed x
  Span<const float> norm, q_norm, kv_norm;
  Matrix wq_a, wq_b, wkv_a, wkv_b, wo;
  double scale, eps, q_eps, kv_eps;
  Indexer index;
};
struct AttentionCall : AttentionStep, MlaWeights {};

// What stays of MHA, GQA or MQA. `group` query heads share a key head. A row of the cache has the keys of all heads, then
// their values, in FP32 or BF16.
struct GroupedWeights {
  int64_t key_heads, group, width, value;  // width: numbers of a query or key of one head
  Span<const float> norm;
  Matrix wq, wk, wv, wo;
  double scale, eps;
};
struct GroupedAttentionCall : AttentionStep, GroupedWeights {};

// Makes a row of each whole block of tokens: matrices and norms of V4's compressor. `numbers` is the row's width, 0 for none.
struct CompressorWeights {
  int64_t numbers;
  Matrix wkv, wgate;        // [series * numbers, dim], FP32
  Span<const float> bias;   // [ratio, series * numbers]
  Span<const float> weight;  // of the norm
  double epsilon;
};

// What a layer or its indexer stores of blocks: the rows that its compressor made, and the raw rows of the latest tokens.
struct BlockRows {
  KeyRows made;     // count: places of each sequence
  Span<float> raw;  // [b, raw_places, 2 * series * numbers]; a token's place is its position modulo raw_places
  int64_t raw_places;
};

// V4's attention in a decoding step. `counts` of a sequence's s columns are tokens, the others padding, which is not stored.
struct CompressedStep {
  int64_t threads, b, s, dim, bf16, added;  // bf16: attention may round to it; added: y has x added to it
  Span<const float> x;
  Span<float> y;
  Span<const float> cos, sin;  // [positions, pairs], of all positions from 0 on
  int64_t positions;
  Span<const int64_t> starts, counts;  // [b]
  KeyRows latest;                      // of the window: a token's place is its position modulo latest.count
  BlockRows entries, keys;             // keys: of the indexer
};
struct CompressedWeights {
  int64_t heads, width, rope, q_rank, groups, rank, window, ratio, series;
  int64_t tile, key_tile;  // numbers of rows and of the indexer's that share a scale where they are rounded to FP8 and FP4; or 0
  Span<const float> norm, q_norm, kv_norm, sink;
  Matrix wq_a, wq_b, wkv, wo_a, wo_b;  // wo_a: [groups * rank, heads / groups * width]
  double scale, eps, q_eps, kv_eps, head_eps;
  CompressorWeights compressor, key_compressor;
  int64_t index_heads, topk;
  Matrix index_wq, index_weights;
};
struct CompressedAttentionCall : CompressedStep, CompressedWeights {};

enum Score : int64_t { SIGMOID, SOFTMAX, SQRT_SOFTPLUS, SCORES };

// x + FFN(norm(x)) for n tokens: the dense or shared experts (w1, w2, w3; none if inter is 0), and where `experts` is
// not 0 the routed ones. Routing comes back in indices, weights [n, k], scores [n, experts] and counts [experts].
struct FeedForwardStep {
  int64_t threads, n, dim, added;  // added: y has x added to it
  Span<const float> x;
  Span<float> y;
  Span<const int64_t> tokens;  // [n] ids, for a table
  Span<int64_t> indices;
  Span<float> weights, scores;
  Span<int64_t> counts;
};
struct FeedForwardWeights {
  int64_t inter, experts, expert_inter, k, groups, kept_groups, score, normed, vocabulary;
  Span<const float> norm, gate, bias;  // bias may be null
  Span<const int32_t> table;           // [vocabulary, k] experts of each token id, in place of the largest scores; or null
  Matrix w1, w2, w3;
  Matrix e1, e2, e3;  // e1 and e3: [experts * expert_inter, dim]; e2: [experts * dim, expert_inter]
  double eps, route_scale, limit;  // limit: the largest gate and magnitude in SwiGLU, or infinity
};
struct FeedForwardCall : FeedForwardStep, FeedForwardWeights {};

// What a layer reads of the residual streams of n tokens, and the weights by which its output is written to them; or, with
// `write`, the new streams in the place of the old ones. Without iterations of Sinkhorn the streams are not mixed.
struct StreamStepCall {
  int64_t threads, n, dim, streams, iterations, write;
  Span<float> x;                      // [n, streams, dim]
  Span<float> y;                      // [n, dim]: what the layer reads, or its output
  Span<float> post, comb;             // [n, streams], [n, streams, streams]: share of the old stream (first) in the new one
  Span<const float> fn, base, scale;  // rows for what is read, for post, and for comb
  double eps, post_eps, norm_eps;
};

// A step of many blocks is a series of calls, each after a header.
enum StepKind : int64_t { ATTENTION, GROUPED_ATTENTION, FEED_FORWARD, COMPRESSED_ATTENTION, STREAM_STEP };
struct StepHeader {
  int64_t kind, bytes;  // of the call
};

// y[n] = the sum over a token's k experts of weight * w2 (silu(w1 x) * (w3 x)). x and y are FP32 or BF16, contiguous.
struct ExpertsCall {
  int64_t threads, n, dim, inter, experts, k, bf16;
  Span<const char> x;
  Span<char> y;
  Span<const int64_t> indices;  // [n, k]
  Span<const float> weights;    // [n, k]
  Matrix w1, w2, w3;            // w1 and w3: [experts * inter, dim]; w2: [experts * dim, inter]
};

// The same for training. Forward writes y, gate and up; backward reads dy, gate and up, and writes all gradients. x, y,
// dy, dx, gate and up are FP32 or BF16; gate and up are [n k, inter], sorted by expert. Everything is contiguous. With a limit,
// silu and w3 x are of numbers of at most that size, and y is FP32.
struct TrainedExpertsCall {
  int64_t threads, n, dim, inter, experts, k, bf16, backward;
  Span<const char> x;
  Span<char> y;
  Span<const char> dy;
  Span<const int64_t> indices;  // [n, k]
  Span<const float> weights;    // [n, k]
  Span<char> gate, up, dx;
  Span<float> dweights, dw1, dw2, dw3;
  Matrix w1, w2, w3;  // FP32
  double limit;       // infinite where there is none
};

// Rows of heads, [b, h, rows, numbers]. Strides are in bytes.
struct Heads {
  Span<char> data;
  int64_t batch, head, row;
  INLINE char* of(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
  INLINE bool fit(int64_t b, int64_t h, int64_t rows, int64_t row_bytes) const {
    int64_t end = row_bytes, step;
    const int64_t counts[] = {b, h, rows}, strides[] = {batch, head, row};
    for (int i = 0; i < 3; ++i)
      if (strides[i] < 0 || __builtin_mul_overflow(counts[i] - 1, strides[i], &step) || __builtin_add_overflow(end, step, &end))
        return false;
    return data != nullptr && end <= data.bytes;
  }
};

// y = softmax(scale q k^T) v of each head; `h / groups` heads share keys and values. All are FP32 or all BF16. With
// `causal` the last query sees all keys, and each before it one less. Backward is in FP32, with a group for each head. It
// reads y, lse and dy, and writes the other gradients.
struct HeadsAttentionCall {
  int64_t threads, b, h, groups, s, t, d, v, bf16, backward, causal;
  Heads q, k, v_rows, y, dy, dq, dk, dv;
  Span<float> lse;           // [b, h, s]; null: not wanted
  Span<const uint8_t> mask;  // [mask_batch, s, t], 1 for keys that a query does not see; null: it sees all
  int64_t mask_batch;
  double scale;
};

// `count` matrices [rows, columns] that lie one after the other: parameters, gradients, momenta.
struct MuonPiece {
  Span<float> p;
  Span<const float> g;
  Span<float> m;
  int64_t count, rows, columns, stacked;  // of a stack those without gradient only decay
};

// A step of Muon. X is divided by its Frobenius norm. An iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X, with FP32
// sums of FP32 or BF16 numbers, or if `rational` X <- (a + b X X^T) (1 + c X X^T)^-1 X in FP32.
struct MuonCall {
  int64_t threads, bf16, rational, pieces, steps;
  Span<const MuonPiece> piece;
  Span<const double> coefficients;  // [steps, 3]
  double lr, momentum, decay;
};
