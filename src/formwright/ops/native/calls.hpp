// What Python hands over: plain structs, the same as those that native.py of each op declares.
#pragma once

#include "common.hpp"

namespace fw {

// Tokens of a tensor whose last axis is contiguous.
struct Tokens {
  const float* data;
  int64_t stride;
  const float* at(int64_t token) const { return data + token * stride; }
};

struct Weight {
  int64_t out, in;
  const void* packed;
  const float* scale;     // (out)
  const float* bias;      // (out) or null
  int64_t outliers;       // columns kept in float
  const int64_t* columns; // (outliers) which
  const float* kept;      // (outliers, out) their weights
};

// LayerNorm over rows.
struct Norm {
  const float* gain;   // (width), null for none
  const float* shift;  // (width) or null
  float eps;
};

struct Tail {
  const float* residual;  // (rows, out) or null
  Norm norm;
};

struct Attention {
  const float *q, *k, *v;  // row strides below; heads side by side
  float* y;
  int64_t q_row, kv_row, y_row;
  const int64_t* offsets;  // (documents + 1)
  int64_t documents, heads, groups, width;
  float scale;
  int causal;
  int rounded;  // products may take bfloat16 factors
};

}  // namespace fw

// LayerNorm of x (rows, width) in place; nothing where the norm is none.
FW_API void fw_layer_norm(const fw::Norm* norm, float* x, int64_t rows, int64_t width);
FW_API void fw_attention_packed(const fw::Attention* call, int threads);
