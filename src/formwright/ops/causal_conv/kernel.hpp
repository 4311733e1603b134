// The convolution of some tokens of one row, forward and backward; included once for every instruction set.
//
// A lane is a channel. Work goes through tiles of TILE tokens and all channels: 16 channels at a time run down a tile
// with their window in registers, so that memory is read and written along TILE tokens side by side, once.

constexpr int64_t TILE = 8;

template <int TAPS>
static FW_INLINE void taps_of(const Call& call, int64_t channel, int64_t count, Lanes* to) {
  for (int j = 0; j < TAPS; ++j) to[j] = load(call.weight + j * call.channels + channel, count);
}

// The tokens before `token`, oldest first, at the front of the window.
template <int TAPS>
static FW_INLINE void window_of(const Call& call, int64_t row, int64_t token, int64_t channel, int64_t count,
                                Lanes* to) {
  for (int j = 0; j < TAPS - 1; ++j) to[j] = load(call.seen(row, token + j + 1 - TAPS) + channel, count);
}

// Everything one token older.
template <int COUNT>
static FW_INLINE void shift(Lanes* window) {
#pragma GCC unroll 8
  for (int j = 0; j + 1 < COUNT; ++j) window[j] = window[j + 1];
}

template <int TAPS>
static FW_INLINE Lanes weighed(const Lanes* window, const Lanes* taps, Lanes sum) {
#pragma GCC unroll 8
  for (int j = 0; j < TAPS; ++j) sum = fma(window[j], taps[j], sum);
  return sum;
}

template <int TAPS>
static void forward_span(const Call& call, int64_t row, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; token += TILE) {
    const int64_t tokens = last - token < TILE ? last - token : TILE, at = call.starts[row] + token;
    for (int64_t channel = 0; channel < call.channels; channel += WIDTH) {
      const int64_t count = lanes_of(call, channel);
      Lanes taps[TAPS], window[TAPS];
      taps_of<TAPS>(call, channel, count, taps);
      window_of<TAPS>(call, row, token, channel, count, window);
      const Lanes bias = call.bias == nullptr ? Lanes{} : load(call.bias + channel, count);
      for (int64_t t = 0; t < tokens; ++t) {
        window[TAPS - 1] = load(call.x.at(at + t) + channel, count);
        Lanes y = weighed<TAPS>(window, taps, bias);
        if (call.silu) y *= sigmoid(y);
        store(call.y + (at + t) * call.channels + channel, y, count);
        shift<TAPS>(window);
      }
    }
  }
}

// What a group of channels carries from tile to tile: the gradients that reached the sums of the last tokens, and the
// gradients of its taps and bias so far.
template <int TAPS>
struct Carried {
  Lanes reached[TAPS - 1], taps[TAPS], bias;
};

// Gradients of tokens first .. last - 1 and of what these add to taps and bias. The TAPS - 1 tokens that follow read
// them too, and are gone through once more for that; what the first tokens read before `first` is another span's, or
// the initial window.
template <int TAPS>
static void backward_span(const Call& call, int64_t row, int64_t first, int64_t last, float* grads) {
  using Own = Carried<TAPS>;
  const int64_t groups = (call.channels + WIDTH - 1) / WIDTH, start = call.starts[row], length = call.lengths[row];
  const int64_t end = last + TAPS - 1;
  Own* carried = static_cast<Own*>(fw::scratch(0, static_cast<size_t>(groups) * sizeof(Own)));
  for (int64_t g = 0; g < groups; ++g) carried[g] = Own{};
  for (int64_t token = first; token < end; token += TILE) {
    const int64_t stop = token + TILE < end ? token + TILE : end;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t channel = g * WIDTH, count = lanes_of(call, channel);
      Lanes taps[TAPS], window[TAPS] = {}, reached[TAPS];
      taps_of<TAPS>(call, channel, count, taps);
      const Lanes bias = call.bias == nullptr ? Lanes{} : load(call.bias + channel, count);
      Own own = carried[g];
      for (int j = 0; j < TAPS - 1; ++j) reached[j] = own.reached[j];
      if (token < length) window_of<TAPS>(call, row, token, channel, count, window);
      for (int64_t t = token; t < stop; ++t) {
        Lanes grad{};
        if (t < length) {
          window[TAPS - 1] = load(call.x.at(start + t) + channel, count);
          grad = load(call.grad_y.at(start + t) + channel, count);
          if (call.silu) {
            const Lanes sum = weighed<TAPS>(window, taps, bias), s = sigmoid(sum);
            grad *= s * fma(sum, 1.0f - s, all(1.0f));
          }
          if (t < last) {
#pragma GCC unroll 8
            for (int j = 0; j < TAPS; ++j) own.taps[j] = fma(grad, window[j], own.taps[j]);
            own.bias += grad;
          }
          shift<TAPS>(window);
        }
        reached[TAPS - 1] = grad;
        const int64_t oldest = t + 1 - TAPS;
        if (oldest >= first || first == 0) {
          Lanes sum{};
#pragma GCC unroll 8
          for (int j = 0; j < TAPS; ++j) sum = fma(reached[j], taps[TAPS - 1 - j], sum);
          store(call.grad_seen(row, oldest) + channel, sum, count);
        }
        shift<TAPS>(reached);
      }
      for (int j = 0; j < TAPS - 1; ++j) own.reached[j] = reached[j];
      carried[g] = own;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t channel = g * WIDTH, count = lanes_of(call, channel);
    for (int j = 0; j <= TAPS; ++j) {
      float* to = grads + j * call.channels + channel;
      store(to, load(to, count) + (j < TAPS ? carried[g].taps[j] : carried[g].bias), count);
    }
  }
}

// The number of taps as a constant.
static void forward_any(const Call& call, int64_t row, int64_t first, int64_t last) {
  switch (call.taps) {
#define FW_TAPS(COUNT) \
  case COUNT:          \
    return forward_span<COUNT>(call, row, first, last);
    FW_TAPS(2) FW_TAPS(3) FW_TAPS(4) FW_TAPS(5) FW_TAPS(6) FW_TAPS(7) FW_TAPS(8)
#undef FW_TAPS
  }
}

static void backward_any(const Call& call, int64_t row, int64_t first, int64_t last, float* grads) {
  switch (call.taps) {
#define FW_TAPS(COUNT) \
  case COUNT:          \
    return backward_span<COUNT>(call, row, first, last, grads);
    FW_TAPS(2) FW_TAPS(3) FW_TAPS(4) FW_TAPS(5) FW_TAPS(6) FW_TAPS(7) FW_TAPS(8)
#undef FW_TAPS
  }
}
