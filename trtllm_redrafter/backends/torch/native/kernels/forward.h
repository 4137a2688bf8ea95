// One decoding step of the base model: rows of tokens -> hidden states, largest logits, logits.
//
// A step reads every weight once, whatever its number of rows: 2 bytes per parameter without the embedding, 269 MB for
// a 135M model. That read is the floor; through separate operators most of the time goes to dispatch and to waking the
// second thread (about 120 matrix products a step). Here one call runs all layers.
//
// Residuals stay float32 between layers; what is the next product's input is rounded to bfloat16.

#pragma once

#include "attention.h"

namespace {

void rms_norm(const float *x, const bf16 *weight, int n, float epsilon, bf16 *out) {
  float sums[LANES] = {};
  for (int i = 0; i < n; i += LANES)
    for (int j = 0; j < LANES && i + j < n; ++j) sums[j] += x[i + j] * x[i + j];
  float total = 0.0f;
  for (float s : sums) total += s;
  const float scale = 1.0f / std::sqrt(total / float(n) + epsilon);
  for (int i = 0; i < n; ++i) out[i] = to_bf16(to_float(to_bf16(x[i] * scale)) * to_float(weight[i]));
}

void norm_rows(Model &m, const bf16 *weight, int count, int member, bf16 *out) {
  const int h = m.c.hidden;
  m.team.phase(member, count, [&](int i) {
    rms_norm(m.residual.data() + size_t(i) * h, weight, h, m.c.epsilon, out + size_t(i) * h);
  });
}

// residual += x W^T + bias
void add_product(Model &m, const bf16 *x, int x_stride, int count, const Packed &w, const float *bias, int member) {
  const int stride = m.wide_stride(), n = pieces(m.team, w.blocks());
  m.team.phase(member, n, [&](int piece) {
    const Range blocks = blocks_of(w.blocks(), piece, n);
    product(x, x_stride, count, w, blocks, m.wide.data(), stride);
    const int from = blocks.begin * LANES, to = std::min(blocks.end * LANES, w.n);
    for (int i = 0; i < count; ++i) {
      float *r = m.residual.data() + size_t(i) * m.c.hidden;
      const float *y = m.wide.data() + size_t(i) * stride;
      for (int j = from; j < to; ++j) r[j] += y[j] + (bias ? bias[j] : 0.0f);
    }
  });
}

// SiLU(x A^T) * (x B^T) for one block of columns of both.
void gated_block(Model &m, const Layer &l, int count, int block) {
  const int h = m.c.hidden, mixed = m.mixed_stride();
  float gate[LANES * 8], up[LANES * 8];
  for (int i = 0; i < count; i += 8) {
    const int n = std::min(8, count - i);
    const bf16 *x = m.normed.data() + size_t(i) * h;
    tiles<1>(x, h, n, l.gate.block(block), size_t(h) * LANES, h, gate, LANES);
    tiles<1>(x, h, n, l.up.block(block), size_t(h) * LANES, h, up, LANES);
    for (int r = 0; r < n; ++r) {
      bf16 *out = m.mixed.data() + size_t(i + r) * mixed + block * LANES;
      for (int j = 0; j < LANES; ++j) out[j] = to_bf16(silu(gate[r * LANES + j]) * up[r * LANES + j]);
    }
  }
}

constexpr int LAYER_PHASES = 8;

void run_layer(Model &m, int layer, int member) {
  const RedrafterStep &s = m.step;
  const Layer &l = m.layers[layer];
  Team &team = m.team;
  const int stride = m.wide_stride(), mixed = m.mixed_stride(), h = m.c.hidden;
  norm_rows(m, l.input_norm, s.count, member, m.normed.data());
  const int n = pieces(team, l.qkv.blocks());
  team.phase(member, n, [&](int piece) {
    product(m.normed.data(), h, s.count, l.qkv, blocks_of(l.qkv.blocks(), piece, n), m.wide.data(), stride);
  });
  const int heads = m.c.heads + 2 * m.c.kv_heads;
  team.phase(member, s.count, [&](int i) { split_heads(m, layer, s.rows[i], m.wide.data() + size_t(i) * stride, heads); });
  team.phase(member, s.count * m.c.kv_heads, [&](int unit) {
    const int i = unit / m.c.kv_heads, path = s.rows[i].path;
    attend(m, layer, s.rows[i], path < 0 ? nullptr : s.paths + size_t(path) * s.path_width, unit % m.c.kv_heads,
           m.wide.data() + size_t(i) * stride, m.mixed.data() + size_t(i) * mixed, member);
  });
  add_product(m, m.mixed.data(), mixed, s.count, l.dense, l.dense_bias, member);
  norm_rows(m, l.post_norm, s.count, member, m.normed.data());
  const int blocks = l.gate.blocks(), parts = pieces(team, blocks);
  team.phase(member, parts, [&](int piece) {
    const Range mine = share(blocks, piece, parts);
    for (int b = mine.begin; b < mine.end; ++b) gated_block(m, l, s.count, b);
  });
  add_product(m, m.mixed.data(), mixed, s.count, l.down, nullptr, member);
}

// The largest of up to 32 neighbouring logits. `!(x <= best)` is true for NaN, too.
inline void scan(const float *x, int count, int first, Best &best) {
  bool any = false;
  for (int j = 0; j < count; ++j) any |= !(x[j] <= best.value);
  if (any)
    for (int j = 0; j < count; ++j) best.offer(x[j], first + j);
}

void head_block_pair(Model &m, int b, int end, Best *best) {
  const RedrafterStep &s = m.step;
  const int h = m.c.hidden, vocab = m.c.vocab;
  const int wide = std::min(2, end - b), from = b * LANES, to = std::min(from + wide * LANES, vocab);
  for (int i = 0; i < s.logit_count; i += 8) {
    const int n = std::min(8, s.logit_count - i);
    const bf16 *x = m.normed.data() + size_t(i) * h;
    float out[8 * 2 * LANES];
    if (wide == 2)
      tiles<2>(x, h, n, m.head.block(b), size_t(h) * LANES, h, out, 2 * LANES);
    else
      tiles<1>(x, h, n, m.head.block(b), size_t(h) * LANES, h, out, 2 * LANES);
    for (int r = 0; r < n; ++r) {
      const float *row = out + size_t(r) * 2 * LANES;
      if (s.logits) std::memcpy(s.logits + size_t(i + r) * vocab + from, row, size_t(to - from) * 4);
      scan(row, to - from, from, best[i + r]);
    }
  }
}

void run_head(Model &m, int member) {
  const RedrafterStep &s = m.step;
  const int count = head_pieces(m), blocks = m.head.blocks();
  m.team.phase(member, count, [&](int piece) {
    const Range mine = blocks_of(blocks, piece, count);
    Best *best = m.best.data() + size_t(piece) * m.c.max_rows;
    std::fill_n(best, s.logit_count, Best{});
    for (int b = mine.begin; b < mine.end; b += 2) head_block_pair(m, b, mine.end, best);
  });
  m.team.phase(member, 1, [&](int) {
    for (int i = 0; i < s.logit_count; ++i) {  // pieces hold rising token ranges: the lowest of equals stays
      Best all;
      for (int piece = 0; piece < count; ++piece) {
        const Best &part = m.best[size_t(piece) * m.c.max_rows + i];
        all.offer(part.value, part.token);
      }
      s.best[i] = std::isfinite(all.value) ? all.token : -1;
    }
  });
}

inline int step_phases(const Model &m) { return LAYER_PHASES * m.c.layers + 5; }

void run_step(void *arg, int member) {
  Model &m = *static_cast<Model *>(arg);
  const RedrafterStep &s = m.step;
  const int h = m.c.hidden;
  m.team.phase(member, s.count, [&](int i) {
    const bf16 *embedded = m.embedding + size_t(s.rows[i].token) * h;
    for (int j = 0; j < h; ++j) m.residual[size_t(i) * h + j] = to_float(embedded[j]);
  });
  for (int layer = 0; layer < m.c.layers; ++layer) run_layer(m, layer, member);
  norm_rows(m, m.final_norm, s.count, member, s.hidden);
  m.team.phase(member, s.logit_count, [&](int i) {
    std::memcpy(m.normed.data() + size_t(i) * h, s.hidden + size_t(s.logit_rows[i]) * h, size_t(h) * sizeof(bf16));
  });
  run_head(m, member);
}

}  // namespace
