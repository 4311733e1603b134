// One token of neighbouring Mamba layers for a few rows in float32: four passes over the weights of each, shared among a
// team of threads that stays for all of them. Inputs are few, so time is that of reading the weights once.
#include "../native/common.hpp"

namespace {

struct Layer {
  const float* norm;                                        // gain (width) of the norm before, or null
  const float *in_weight, *in_bias;                         // (2 inner, width), (2 inner) or null
  const float *taps_of, *conv_bias;                         // (inner, taps), (inner) or null
  const float *x_weight, *dt_weight, *dt_bias, *A_log, *D;  // (rank + 2 states, inner), (inner, rank), (inner, states)
  const float *out_weight, *out_bias;                       // (width, inner), (width) or null
  int64_t width, inner, states, taps, rank;
  float eps;
  int joins;  // whether the stream is added

  int64_t chosen() const { return rank + 2 * states; }
};

struct State {
  const float *window, *h;      // (rows, taps - 1, inner), (rows, inner, states)
  float *next_window, *next_h;  // like them
};

// What the passes of a layer read and write besides its weights.
struct Call {
  const Layer& layer;
  const State& state;
  const Layer* next;  // the layer behind, or null
  const float* read;  // (rows, width): the stream, normalised where there is a norm
  float *stream, *mixed, *values, *chosen;  // of the rows: width, 2 inner, inner, rank + 2 states
  int64_t rows;
};

#define FW_KERNEL "../mamba_step/kernel.hpp"
#include "../native/levels.hpp"

using Normalise = void (*)(const Layer& layer, const float* from, int64_t rows, float* to);
using Pass = void (*)(const Call& call, int64_t first, int64_t last);

struct Passes {
  Normalise normalise;
  Pass enter, select, scan, leave;
};

Passes passes() {
  return {FW_AT_LEVEL(normalise), FW_AT_LEVEL(enter), FW_AT_LEVEL(select), FW_AT_LEVEL(scan), FW_AT_LEVEL(leave)};
}

int64_t room_of(const Layer& layer) { return layer.width + 3 * layer.inner + layer.chosen(); }

}  // namespace

// x (rows, width) through `count` layers -> y (rows, width).
FW_API void fw_mamba_step(const Layer* const* layers, const State* states, int64_t count, const float* x, int64_t rows,
                          float* y, int threads) {
  const Passes run = passes();
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = room_of(*layers[i]) > most ? room_of(*layers[i]) : most;
  float* const room = static_cast<float*>(fw::scratch(0, rows * most * sizeof(float)));
  std::memcpy(y, x, rows * layers[0]->width * sizeof(float));
  fw::together(threads, [&] {
    for (int64_t i = 0; i < count; ++i) {
      const Layer& layer = *layers[i];
      float *read = room, *mixed = read + rows * layer.width, *values = mixed + 2 * rows * layer.inner;
      if (layer.norm != nullptr) run.normalise(layer, y, rows, read);
      const Call call = {layer, states[i], i + 1 < count ? layers[i + 1] : nullptr, layer.norm == nullptr ? y : read,
                         y,     mixed,     values, values + rows * layer.inner, rows};
      const auto each = [&](int64_t outputs, int64_t grain, Pass pass) {
        fw::parallel(outputs, grain, threads, [&](int64_t first, int64_t last) { pass(call, first, last); });
      };
      each(2 * layer.inner, 32, run.enter);
      each(layer.chosen(), 8, run.select);
      each(layer.inner, 32, run.scan);
      each(layer.width, 16, run.leave);
    }
  });
}
