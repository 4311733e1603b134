// A product that reads only the columns whose factor is not zero: a few tokens, most of whose hidden units are silent.
#include "../native/calls.hpp"

namespace {

// The same struct as in native.py.
struct Product {
  const float* h;       // (tokens, in)
  const float* weight;  // (in, out): a unit's column lies together
  const float* bias;    // (out) or null
  float* y;             // (tokens, out)
  int64_t tokens, in, out;
  float tolerance;
};

#define FW_KERNEL "../active_product/kernel.hpp"
#include "../native/levels.hpp"

}  // namespace

// The number of factors that were read, over all tokens.
FW_API int64_t fw_active_product(const Product* call, int threads) {
  auto* units = static_cast<int64_t*>(fw::scratch(0, static_cast<size_t>(call->in) * sizeof(int64_t)));
  int64_t read = 0;
  for (int64_t token = 0; token < call->tokens; ++token) {
    const float* h = call->h + token * call->in;
    int64_t count = 0;
    for (int64_t u = 0; u < call->in; ++u) {
      units[count] = u;
      count += !(std::fabs(h[u]) <= call->tolerance);  // NaN is read, so that it arrives
    }
    read += count;
    fw::parallel(call->out, 192, threads, [&](int64_t first, int64_t last) {
      FW_AT_LEVEL(active_product)(*call, units, count, h, call->y + token * call->out, first, last);
    });
  }
  return read;
}
