// A base model's weights, its KV cache and the buffers of a step.
//
//   key cache     [S/16][D/2][16][2]   per layer, request slot and KV head
//   value cache   [S/2][D][2]          the same
//
// Both are products' packed operands: sixteen positions of a key block are lanes, and so are sixteen value columns.

#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "interface.h"
#include "product.h"

namespace {

struct Layer {
  Packed qkv, dense, gate, up, down;
  const bf16 *input_norm = nullptr, *post_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr;
  const float *qkv_bias = nullptr, *dense_bias = nullptr;
};

// The largest logit so far and its token; NaN counts as the largest.
struct Best {
  float value = -INFINITY;
  int token = 0;
  void offer(float v, int t) {
    if (v > value || v != v) {
      value = v;
      token = t;
    }
  }
};

struct Model {
  RedrafterConfig c;
  Team team;
  std::vector<Layer> layers;
  std::vector<char> layer_set;
  bool ends_set = false;
  const bf16 *embedding = nullptr, *final_norm = nullptr;
  const float *cosine = nullptr, *sine = nullptr;  // [max_seq, head_size / 2]
  Packed head;
  bf16 *keys = nullptr, *values = nullptr;
  RedrafterStep step{};                    // of the last call; a straggler may still look at it
  std::vector<float> residual, wide;       // [rows, hidden], [rows, widest output]
  std::vector<bf16> normed, mixed;         // [rows, hidden], [rows, max(heads * head_size, intermediate)]
  std::vector<Best> best;                  // [pieces of the head, rows]
  std::vector<std::vector<float>> scores;  // per thread: [group, positions]
  std::vector<std::vector<bf16>> scratch;  // per thread: gathered tail keys and values, queries, probabilities

  explicit Model(const RedrafterConfig &config)
      : c(config), team(config.threads), layers(config.layers), layer_set(config.layers) {}
  ~Model() {
    team.settle();
    std::free(keys);
    std::free(values);
  }
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;
  int qkv_width() const { return padded((c.heads + 2 * c.kv_heads) * c.head_size); }
  int wide_stride() const { return std::max(qkv_width(), padded(std::max(c.hidden, c.intermediate))); }
  int mixed_stride() const { return std::max(c.heads * c.head_size, padded(c.intermediate)); }
  size_t lane_size() const { return size_t(c.max_seq) * c.head_size; }
  size_t lane(int layer, int slot, int kv_head) const {
    return ((size_t(layer) * c.max_slots + slot) * c.kv_heads + kv_head) * lane_size();
  }
};

inline int head_pieces(const Model &m) { return std::min(16 * m.team.size(), std::max(1, m.head.blocks() / 2)); }

// Everything of a size that is known beforehand. Throws std::bad_alloc.
void reserve(Model &m) {
  const RedrafterConfig &c = m.c;
  const size_t cache = size_t(c.layers) * c.max_slots * c.kv_heads * m.lane_size(), rows = c.max_rows;
  // calloc: pages are touched only when used
  m.keys = static_cast<bf16 *>(std::calloc(cache + 64, sizeof(bf16)));
  m.values = static_cast<bf16 *>(std::calloc(cache + 64, sizeof(bf16)));
  if (!m.keys || !m.values) throw std::bad_alloc();
  m.residual.resize(rows * c.hidden);
  m.normed.resize(rows * c.hidden);
  m.wide.resize(rows * m.wide_stride());
  m.mixed.resize(rows * m.mixed_stride());
  m.head = {nullptr, c.vocab, c.hidden};
  m.best.resize(head_pieces(m) * rows);
  m.scores.resize(m.team.size());
  m.scratch.resize(m.team.size());
}

}  // namespace
