// The delta rule in float32, one document and one head at a time, in chunks of 32 tokens.
//
// The state of a head and all matrices of a chunk stay in the second-level cache; memory is read and written once. In a
// chunk, with KK = K K^T below its diagonal and P = Q K^T with it, errors come from a triangular solve and writes from
// them:
//
//     E = V - K S - KK X,    X = diag(b) E,    O = Q S + P X,    S <- S + K^T X
//
// The backward pass goes through the chunks in reverse, with what the forward pass kept: E, and S before every chunk.
// Heads are padded to 16 floats and chunks to 4 rows, both with zeros, so products have no ragged edges.
#include "../native/common.hpp"

namespace {

constexpr int64_t CHUNK = 32, WIDEST = 256;

struct Call {
  const float *q, *k, *v, *beta, *state;  // (T, heads, keys) or (T, heads, values), (T, heads), (documents, heads, ...)
  float *out, *last;
  float *errors, *states;  // (T, heads, values) and (chunks, heads, keys, values), or null where nothing is kept
  const float *d_out, *d_last;
  float *d_q, *d_k, *d_v, *d_beta, *d_state;
  const int64_t* borders;  // (documents + 1)
  int64_t documents, heads, keys, values;
  float scale;
};

#define FW_KERNEL "../delta_rule/kernel.hpp"
#include "../native/levels.hpp"

using Pass = void (*)(const Call&, int64_t, int64_t);

void run(const Call& call, int threads, Pass pass) {
  fw::parallel(call.documents * call.heads, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) pass(call, at / call.heads, at % call.heads);
  });
}

}  // namespace

// q, k, v, beta and state -> out and last, and where they are wanted errors and states.
FW_API void fw_delta_rule(const Call* call, int threads) {
  run(*call, threads, FW_AT_LEVEL(forward));
}

// The same inputs with errors and states, d_out and d_last -> the gradients of the inputs.
FW_API void fw_delta_rule_backward(const Call* call, int threads) {
  run(*call, threads, FW_AT_LEVEL(backward));
}
