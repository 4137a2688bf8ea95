// What Python and C++ pass each other; interface.py has the same structures for ctypes.
//
// Every function returns null, or a message that says what is wrong with its arguments; then nothing has been computed.
// Tensors are passed with their number of elements, which must be what the sizes ask for: an array that is too short is
// refused, not read past its end. `data` null and `count` 0: there is no such tensor.

#pragma once

#include <cstdint>

#include "lanes.h"

extern "C" {

struct RedrafterTensor {
  const void *data;
  int64_t count;
};

struct RedrafterConfig {
  int32_t hidden, heads, kv_heads, head_size, intermediate, layers, vocab, max_slots, max_seq, max_rows, threads;
  float epsilon;
};

// Matrices packed, norms bfloat16, biases float32. May be absent: q_norm and k_norm (both), the biases.
struct RedrafterLayer {
  RedrafterTensor qkv, dense, gate, up, down, input_norm, post_norm, q_norm, k_norm, qkv_bias, dense_bias;
};

// Embedding [vocab, hidden] bfloat16, head packed, cosine and sine [max_seq, head_size / 2] float32.
struct RedrafterEnds {
  RedrafterTensor embedding, final_norm, head, cosine, sine;
};

// One row of a step. Its key and value go to cache position `base + node`; it attends the request's positions below
// `base`, then the nodes path[0..depth] (its own last) of row `path` of the step's paths; -1: path[j] == j.
struct RedrafterRow {
  int32_t token, slot, base, depth, node, path;
};

struct RedrafterStep {
  const RedrafterRow *rows;   // [count]
  const int32_t *paths;       // [path_count, path_width]
  const int32_t *logit_rows;  // [logit_count] which rows get logits
  bf16 *hidden;               // [count, hidden], after the final norm
  float *logits;              // [logit_count, vocab], or null when only the largest is wanted
  int64_t *best;              // [logit_count] token of the largest logit, the lowest of equals; -1: it is not finite
  int32_t count, path_count, path_width, logit_count;
};

// Keep the nodes path[0..count) of `slot`, rising, path[j] >= j, as positions base, base + 1, ...
struct RedrafterCommit {
  const int32_t *path;
  int32_t slot, base, count;
};

// H = hidden, E = exit_dim. Matrices packed, biases float32. May be absent: the RNN (all three; without it a state is the
// sum of embeddings), the input projection (both; without it E = 2 H), the factor [H, E] before a head [head_rows, H],
// and token_of_column, int64 [head_rows] (without it column i is token i).
struct RedrafterDrafter {
  int32_t hidden, width, layers, max_rows, head_rows;
  RedrafterTensor rnn_u, rnn_bias, rnn_w, input_proj, input_bias, factor, head, token_of_column;
};

struct RedrafterBlock {
  RedrafterTensor weight, bias;
};

// Beams of falling score for `batch` sequences. Where a sequence's numbers are not finite, its paths are NaN and its
// tokens repeat the first.
struct RedrafterSearch {
  const bf16 *context;   // [batch, hidden]
  const int64_t *first;  // [batch]
  int64_t *tokens;       // [batch, beams, length + 1]
  float *paths;          // [batch, beams, length + 1]
  int32_t batch, beams, length;
};
}
