// Rotation, the KV cache, and attention of each row along its own path through a tree.
//
// A row with n visible positions reads 4 n D bytes of keys and values per KV head, shared by its group of query heads;
// a token of a chain is its own row. At a thousand positions that is a few percent of the weights' bytes.
//
// The order of every sum follows absolute positions in blocks of 16, wherever the tree stored the keys: drafting and
// decoding token by token agree bit for bit. Positions of the last block that do not belong to the row have weight zero.

#pragma once

#include "model.h"

namespace {

inline void put_key(bf16 *lane, int head_size, int position, int d, bf16 v) {
  lane[(size_t(position / LANES) * head_size / 2 + d / 2) * 2 * LANES + (position % LANES) * 2 + d % 2] = v;
}
inline void put_value(bf16 *lane, int head_size, int position, int d, bf16 v) {
  lane[(size_t(position / 2) * head_size + d) * 2 + position % 2] = v;
}
void copy_position(bf16 *to_keys, bf16 *to_values, int to, const bf16 *keys, const bf16 *values, int from, int d_all) {
  const bf16 *k = keys + size_t(from / LANES) * d_all * LANES + (from % LANES) * 2;
  bf16 *tk = to_keys + size_t(to / LANES) * d_all * LANES + (to % LANES) * 2;
  for (int p = 0; p < d_all / 2; ++p) std::memcpy(tk + p * 2 * LANES, k + p * 2 * LANES, 4);
  const bf16 *v = values + size_t(from / 2) * d_all * 2 + from % 2;
  bf16 *tv = to_values + size_t(to / 2) * d_all * 2 + to % 2;
  for (int d = 0; d < d_all; ++d) tv[2 * d] = v[2 * d];
}

// Applies `work(keys, values)` to a slot's lanes of every layer and KV head.
template <class Work>
void each_lane(Model &m, int slot, Work work) {
  for (int layer = 0; layer < m.c.layers; ++layer)
    for (int h = 0; h < m.c.kv_heads; ++h) {
      const size_t lane = m.lane(layer, slot, h);
      work(m.keys + lane, m.values + lane);
    }
}

// Rotates one head in place (halves paired, as Hugging Face lays them out) after its optional norm.
void rotate(const Model &m, float *x, const bf16 *norm, int position) {
  const int d = m.c.head_size, half = d / 2;
  if (norm) {
    float total = 0.0f;
    for (int i = 0; i < d; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / float(d) + m.c.epsilon);
    for (int i = 0; i < d; ++i) x[i] = to_float(to_bf16(x[i] * scale)) * to_float(norm[i]);
  }
  const float *c = m.cosine + size_t(position) * half, *s = m.sine + size_t(position) * half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * c[i] - b * s[i];
    x[i + half] = b * c[i] + a * s[i];
  }
}

// Bias, norm and rotation of one row's heads; keys and values go to the cache.
void split_heads(Model &m, int layer, const RedrafterRow &row, float *qkv, int heads) {
  const Layer &l = m.layers[layer];
  const int d = m.c.head_size, position = row.base + row.depth, to = row.base + row.node;
  for (int h = 0; h < heads; ++h) {
    float *x = qkv + size_t(h) * d;
    if (l.qkv_bias)
      for (int i = 0; i < d; ++i) x[i] += l.qkv_bias[size_t(h) * d + i];
    if (h < m.c.heads) {
      rotate(m, x, l.q_norm, position);
    } else if (h < m.c.heads + m.c.kv_heads) {
      rotate(m, x, l.k_norm, position);
      bf16 *lane = m.keys + m.lane(layer, row.slot, h - m.c.heads);
      for (int i = 0; i < d; ++i) put_key(lane, d, to, i, to_bf16(x[i]));
    } else {
      bf16 *lane = m.values + m.lane(layer, row.slot, h - m.c.heads - m.c.kv_heads);
      for (int i = 0; i < d; ++i) put_value(lane, d, to, i, to_bf16(x[i]));
    }
  }
}

// Softmax numerators of `length` scores as bf16, zeros up to `stride`; returns their sum.
float softmax_numerators(float *scores, int length, int stride, float scale, bf16 *weights) {
  float top = -INFINITY;
  for (int p = 0; p < length; ++p) top = std::max(top, scores[p] *= scale);
  for (int p = 0; p < length; ++p) scores[p] = to_float(to_bf16(exp_approx(scores[p] - top)));
  for (int p = length; p < stride; ++p) scores[p] = 0.0f;
  float lanes[LANES] = {}, total = 0.0f;
  for (int p = 0; p < stride; p += LANES)
    for (int j = 0; j < LANES; ++j) lanes[j] += scores[p + j];
  for (float lane : lanes) total += lane;
  for (int p = 0; p < stride; ++p) weights[p] = to_bf16(scores[p]);
  return total;
}

// What `attend` looks at for one row, in blocks of 16 positions: the first ones in place, those behind gathered.
struct Reach {
  int length, blocks, in_place;
  explicit Reach(const RedrafterRow &row)
      : length(row.base + row.depth + 1),
        blocks((length + LANES - 1) / LANES),
        in_place(row.path < 0 ? blocks : row.base / LANES) {}
  int gathered() const { return blocks - in_place; }
  int stride() const { return blocks * LANES; }
  size_t scratch(int group, int d) const { return (size_t(2 * gathered()) * LANES + group) * d + stride(); }
};

// Buffers of every thread for the rows of a step. Throws std::bad_alloc.
void reserve_attention(Model &m, const RedrafterStep &step) {
  const int group = m.c.heads / m.c.kv_heads;
  size_t scratch = 0, scores = 0;
  for (int i = 0; i < step.count; ++i) {
    const Reach reach(step.rows[i]);
    scratch = std::max(scratch, reach.scratch(group, m.c.head_size));
    scores = std::max(scores, size_t(group) * reach.stride());
  }
  for (auto &buffer : m.scratch)
    if (buffer.size() < scratch) buffer.resize(scratch);
  for (auto &buffer : m.scores)
    if (buffer.size() < scores) buffer.resize(scores);
}

// Queries of one KV head over one row's path. `path` is null where every ancestor lies where its depth says.
void attend(Model &m, int layer, const RedrafterRow &row, const int32_t *path, int kv_head, const float *qkv, bf16 *out,
            int member) {
  const int d = m.c.head_size, group = m.c.heads / m.c.kv_heads;
  const Reach reach(row);
  const int length = reach.length, blocks = reach.blocks, shared = reach.in_place, tail = reach.gathered();
  const int stride = reach.stride();
  const bf16 *keys = m.keys + m.lane(layer, row.slot, kv_head);
  const bf16 *values = m.values + m.lane(layer, row.slot, kv_head);
  bf16 *tail_keys = m.scratch[member].data(), *tail_values = tail_keys + size_t(tail) * LANES * d;
  bf16 *query = tail_values + size_t(tail) * LANES * d, *weights = query + size_t(group) * d;
  if (tail) {
    std::memset(tail_keys, 0, size_t(2 * tail) * LANES * d * sizeof(bf16));
    for (int p = shared * LANES; p < length; ++p)
      copy_position(tail_keys, tail_values, p - shared * LANES, keys, values,
                    p < row.base ? p : row.base + path[p - row.base], d);
  }
  const float scale = 1.0f / std::sqrt(float(d));
  const float *q = qkv + size_t(kv_head) * group * d;
  for (int i = 0; i < group * d; ++i) query[i] = to_bf16(q[i]);

  float *all = m.scores[member].data();
  for (int b = 0; b < blocks; ++b) {
    const bf16 *block = b < shared ? keys + size_t(b) * d * LANES : tail_keys + size_t(b - shared) * d * LANES;
    tiles<1>(query, d, group, block, 0, d, all + b * LANES, stride);
  }
  for (int g = 0; g < group; ++g) {
    const float total = softmax_numerators(all + size_t(g) * stride, length, stride, scale, weights);
    bf16 *o = out + size_t(kv_head * group + g) * d;
    constexpr int WIDTH = 8;  // value columns in flight, in blocks of 16
    for (int first = 0; first < d; first += WIDTH * LANES) {
      const int width = std::min(WIDTH, (d - first) / LANES);
      Vec acc[WIDTH];
      for (int w = 0; w < width; ++w) acc[w] = zero();
      for (int p = 0; p < stride; p += 2) {
        uint32_t pair;
        std::memcpy(&pair, weights + p, 4);
        const bf16 *v = (p < shared * LANES ? values + size_t(p) * d : tail_values + size_t(p - shared * LANES) * d) +
                        2 * first;
        for (int w = 0; w < width; ++w) dot_pair(acc[w], v + w * 2 * LANES, pair);
      }
      float result[WIDTH * LANES];
      for (int w = 0; w < width; ++w) store(result + w * LANES, acc[w]);
      for (int i = 0; i < width * LANES; ++i) o[first + i] = to_bf16(result[i] / total);
    }
  }
}

}  // namespace
