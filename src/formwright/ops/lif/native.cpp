// Leaky integrate-and-fire neurons over time, forwards and backwards, in float32.
//
// Neurons lie side by side in memory and steps behind one another, so the inner loop runs over neurons, whose voltages
// stay in the first-level cache. Work is split into rows times blocks of neurons.
#include "../native/common.hpp"

namespace {

struct Call {
  const int64_t* lengths;  // (rows) or null: all steps
  // Backwards the same six hold, in this order, what is given and found: the gradient of the currents (written), that
  // of the start (written), the charged voltages, the gradients of the spikes and of the last voltages.
  float *current, *start, *charged, *spikes, *last;
  int64_t rows, steps, channels;
  float rate, threshold;
};

constexpr int64_t BLOCK = 256;
constexpr float SLOPE = 4.0f;

#define FW_KERNEL "../lif/kernel.hpp"
#include "../native/levels.hpp"

using Kernel = void (*)(const Call& call, int64_t row, int64_t first, int64_t count);

void run(const Call& call, Kernel kernel, int threads) {
  const int64_t blocks = (call.channels + BLOCK - 1) / BLOCK;
  const int64_t grain = 1 + 16384 / (1 + call.steps * (call.channels < BLOCK ? call.channels : BLOCK));
  fw::parallel(call.rows * blocks, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t channel = at % blocks * BLOCK, left = call.channels - channel;
      kernel(call, at / blocks, channel, left < BLOCK ? left : BLOCK);
    }
  });
}

}  // namespace

// current (rows, steps, channels), start (rows, channels) -> spikes, last and, unless null, charged.
FW_API void fw_lif(const Call* call, int threads) { run(*call, FW_AT_LEVEL(forwards), threads); }

// charged and the gradients of spikes and last -> those of current and start.
FW_API void fw_lif_backward(const Call* call, int threads) { run(*call, FW_AT_LEVEL(backwards), threads); }
