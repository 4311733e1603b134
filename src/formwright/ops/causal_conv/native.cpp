// Short causal convolution in float32, forward and backward. Nothing is kept between the two passes: the backward pass
// computes the sums before the activation again. Work is handed out by tokens, whole rows or parts of them; gradients
// of taps and bias are left per SPAN tokens, so that they do not depend on the number of threads.
#include "../native/calls.hpp"

#include <algorithm>

namespace {

constexpr int64_t SPAN = 128;

struct Call {
  fw::Tokens x, grad_y;
  const float *weight, *bias, *initial, *grad_final;  // (taps, C), (C) or null, (rows, taps - 1, C), alike or null
  float *y, *final;                                   // (tokens, C), (rows, taps - 1, C)
  float *grad_x, *grad_taps, *grad_initial;           // (tokens, C), zeros (spans, taps + 1, C): bias last, like initial
  const int64_t *starts, *lengths;                    // (rows): first token, tokens
  int64_t rows, tokens, channels, taps;
  int silu;

  // Token of a row; those below 0 are the initial window's.
  const float* seen(int64_t row, int64_t token) const {
    return token < 0 ? initial + (row * (taps - 1) + taps - 1 + token) * channels : x.at(starts[row] + token);
  }
  float* grad_seen(int64_t row, int64_t token) const {
    return token < 0 ? grad_initial + (row * (taps - 1) + taps - 1 + token) * channels
                     : grad_x + (starts[row] + token) * channels;
  }
};

#define FW_KERNEL "../causal_conv/kernel.hpp"
#include "../native/levels.hpp"

// run(row, first, last) for the rows' tokens among those from `from` to `to` of all; `first` and `last` count in the row.
template <typename Run>
void within(const Call& call, int64_t from, int64_t to, const Run& run) {
  int64_t row = std::upper_bound(call.starts, call.starts + call.rows, from) - call.starts - 1;
  for (; row < call.rows && call.starts[row] < to; ++row) {
    const int64_t first = std::max<int64_t>(from - call.starts[row], 0);
    const int64_t last = std::min(to - call.starts[row], call.lengths[row]);
    if (first < last) run(row, first, last);
  }
}

}  // namespace

// Tokens that share one gradient of taps and bias.
FW_API int64_t fw_causal_conv_span() { return SPAN; }

FW_API void fw_causal_conv(const Call* given, int threads) {
  const Call& call = *given;
  const auto run = FW_AT_LEVEL(forward_any);
  fw::parallel(call.tokens, std::max<int64_t>(32768 / (call.channels + 1), 8), threads, [&](int64_t from, int64_t to) {
    within(call, from, to, [&](int64_t row, int64_t first, int64_t last) { run(call, row, first, last); });
  });
  const int64_t kept = call.taps - 1;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t j = 0; j < kept; ++j)
      std::copy_n(call.seen(row, call.lengths[row] + j - kept), call.channels,
                  call.final + (row * kept + j) * call.channels);
}

FW_API void fw_causal_conv_backward(const Call* given, int threads) {
  const Call& call = *given;
  const auto run = FW_AT_LEVEL(backward_any);
  fw::parallel((call.tokens + SPAN - 1) / SPAN, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t span = begin; span < end; ++span) {
      float* grads = call.grad_taps + span * (call.taps + 1) * call.channels;
      within(call, span * SPAN, std::min((span + 1) * SPAN, call.tokens),
             [&](int64_t row, int64_t first, int64_t last) { run(call, row, first, last, grads); });
    }
  });
  if (call.grad_final == nullptr) return;
  const int64_t kept = call.taps - 1;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t j = 0; j < kept; ++j) {
      const float* from = call.grad_final + (row * kept + j) * call.channels;
      float* to = call.grad_seen(row, call.lengths[row] + j - kept);
      for (int64_t c = 0; c < call.channels; ++c) to[c] += from[c];
    }
}
