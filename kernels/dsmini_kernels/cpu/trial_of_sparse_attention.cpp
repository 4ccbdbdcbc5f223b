// The trial of the library for sparse attention.

#include "trial.h"

extern "C" int64_t dsmini_topk_keys(const TopkKeysCall*, int64_t);
extern "C" int64_t dsmini_topk_attention(const TopkAttentionCall*, int64_t);
extern "C" int64_t dsmini_entry_attention(const EntryAttentionCall*, int64_t);
extern "C" int64_t dsmini_streams(const StreamsCall*, int64_t);
extern "C" int64_t dsmini_sinkhorn(const SinkhornCall*, int64_t);

namespace {

void try_topk_keys(Trial& trial, int64_t b, int64_t s, int64_t bf16, int64_t topk) {
  const int64_t size = bf16 ? 2 : 4;
  Memory memory;
  TopkKeysCall c{};
  c.threads = 1, c.b = b, c.s = s, c.t = 150, c.heads = 5, c.width = 18, c.topk = topk, c.bf16 = bf16, c.mask_batch = 1;
  c.q = memory.bytes(b * s * c.heads * c.width * size), c.k = memory.bytes(b * c.t * c.width * size);
  c.k_stride = c.t * c.width * size;
  c.weights = memory.bytes(b * s * c.heads * 4), c.mask = memory.bytes(s * c.t), c.topk_indices = memory.bytes(b * s * topk * 8);
  trial.run("topk_keys", dsmini_topk_keys, c);
}

void try_topk_attention(Trial& trial, int64_t b, int64_t s, int64_t bf16, int64_t heads, int64_t latent) {
  const int64_t size = bf16 ? 2 : 4;
  Memory memory;
  TopkAttentionCall c{};
  c.threads = 1, c.b = b, c.s = s, c.t = 150, c.heads = heads, c.width = latent + 6, c.latent = latent, c.k = 71, c.bf16 = bf16;
  c.scale = 0.1, c.rows_stride = c.t * c.width * size;
  c.q = memory.bytes(b * s * heads * c.width * size), c.rows = memory.bytes(b * c.rows_stride);
  const Lent indices = memory.bytes(b * s * c.k * 8);
  for (int64_t i = 0; i < b * s * c.k; ++i)
    static_cast<int64_t*>(indices.data)[i] = i % 9 == 4 ? -1 : (2 * i + i / c.k) % c.t;
  c.topk_indices = indices, c.out = memory.bytes(b * s * heads * latent * size);
  trial.run("topk_attention", dsmini_topk_attention, c);
}

// Rows of a cache of `room` rows, of which `count` count.
KeyRows key_rows(Memory& memory, int64_t b, int64_t count, int64_t room, int64_t type, int64_t width) {
  const int64_t codes = type == KEYS_FP8 ? width - 5 : type == KEYS_FP4 ? width : 0, tile = codes ? 22 : 0;
  const int64_t scales = codes ? divide_up(codes, tile) : 0;
  const int64_t rows[] = {4 * width, 2 * width, codes + scales + 2 * (width - codes) + 3, codes / 2 + scales};
  return {memory.bytes(b * room * rows[type]), type, count, room * rows[type], rows[type], codes, tile};
}

void try_entry_attention(Trial& trial, int64_t b, int64_t s, int64_t bf16, int64_t heads, int64_t width, int64_t type, int64_t k) {
  const int64_t size = bf16 ? 2 : 4;
  Memory memory;
  EntryAttentionCall c{};
  c.threads = 1, c.b = b, c.s = s, c.heads = heads, c.width = width, c.bf16 = bf16, c.scale = 0.1, c.k = k;
  c.q = memory.bytes(b * s * heads * width * size), c.out = memory.bytes(b * s * heads * width * size);
  c.near = key_rows(memory, b, 37, 37, bf16 ? KEYS_BF16 : KEYS_FP32, width), c.entries = key_rows(memory, b, 150, 151, type, width);
  c.masked = memory.bytes(s * 37), c.masked_batch = c.hidden_batch = 1;
  c.sink = memory.bytes(heads * 4);
  if (k) {
    const Lent chosen = memory.bytes(b * s * k * 8);
    for (int64_t i = 0; i < b * s * k; ++i) static_cast<int64_t*>(chosen.data)[i] = i % 9 == 4 ? -1 : (2 * i + i / k) % 150;
    c.chosen = chosen;
  } else {
    const Lent hidden = memory.bytes(b * s * 150);
    for (int64_t i = 0; i < b * s * 150; ++i) static_cast<uint8_t*>(hidden.data)[i] = i % 7 > 3 || i % 150 > 90;
    c.hidden = hidden, c.hidden_batch = b;
  }
  trial.run("entry_attention", dsmini_entry_attention, c);
}

void try_streams(Trial& trial, int64_t bf16, int64_t backward, int64_t outputs) {
  const int64_t n = 35, streams = 3, dim = 37, size = bf16 ? 2 : 4, output = outputs > 1;
  Memory memory;
  StreamsCall c{};
  c.threads = 1, c.n = n, c.streams = streams, c.outputs = outputs, c.dim = dim, c.bf16 = bf16, c.backward = backward;
  c.x = memory.bytes(n * streams * dim * size), c.output = memory.bytes(output * n * dim * size);
  c.mix = memory.bytes(n * streams * outputs * 4), c.post = memory.bytes(output * n * outputs * 4);
  c.y = memory.bytes(n * outputs * dim * size), c.dy = memory.bytes(backward * n * outputs * dim * size);
  c.dx = memory.bytes(backward * n * streams * dim * size), c.doutput = memory.bytes(backward * output * n * dim * size);
  c.dmix = memory.bytes(backward * n * streams * outputs * 4), c.dpost = memory.bytes(backward * output * n * outputs * 4);
  trial.run("streams", dsmini_streams, c);
}

void try_sinkhorn(Trial& trial, int64_t streams, int64_t backward) {
  const int64_t bytes = 35 * streams * streams * 4;
  Memory memory;
  SinkhornCall c{};
  c.threads = 1, c.n = 35, c.n_streams = streams, c.iterations = 5, c.backward = backward, c.eps = 1e-6;
  c.logits = memory.bytes(bytes), c.dy = memory.bytes(backward * bytes), c.y = memory.bytes(bytes);
  trial.run("sinkhorn", dsmini_sinkhorn, c);
}

}  // namespace

const char* dsmini_try() {
  Trial trial;
  for (const int64_t backward : {0, 1}) {
    for (const int64_t bf16 : {0, 1}) try_streams(trial, bf16, backward, 1), try_streams(trial, bf16, backward, 3);
    for (const int64_t streams : {1, 4, 7}) try_sinkhorn(trial, streams, backward);
  }
  constexpr int64_t TOKENS[][2] = {{1, 1}, {2, 3}}, WIDTHS[][2] = {{3, 37}, {19, 64}, {130, 32}};
  for (const int64_t bf16 : {0, 1}) {
    for (const int64_t topk : {7, 150}) try_topk_keys(trial, 1, 1, bf16, topk), try_topk_keys(trial, 2, 11, bf16, topk);
    for (const auto& [b, s] : TOKENS)
      for (const auto& [heads, latent] : WIDTHS) {
        try_topk_attention(trial, b, s, bf16, heads, latent);
        for (const int64_t type : {KEYS_FP32, KEYS_BF16, KEYS_FP8, KEYS_FP4})
          for (const int64_t k : {0, 71}) try_entry_attention(trial, b, s, bf16, heads, latent + (type == KEYS_FP4) * latent % 2, type, k);
      }
  }
  return trial.failed;
}
