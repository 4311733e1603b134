// Columns of a weight that active units multiply, added up; written once for every instruction set.

constexpr int64_t SIDE = 12;  // vectors of outputs held in registers while units go by

// y[c] = bias[c] + sum over units u of h[u] weight[u][c], for `first` <= c < `last`.
template <int64_t N>
static FW_INLINE void add_up(const Product& call, const int64_t* units, int64_t count, const float* h, float* y,
                             int64_t c, int64_t width) {
  Lanes sums[N] = {};
  for (int64_t n = 0; n < N && call.bias != nullptr; ++n) sums[n] = load(call.bias + c + n * WIDTH, width - n * WIDTH);
  for (int64_t j = 0; j < count; ++j) {
    const float* row = call.weight + units[j] * call.out + c;
    const Lanes value = all(h[units[j]]);
    for (int64_t n = 0; n < N; ++n) sums[n] = fma(load(row + n * WIDTH, width - n * WIDTH), value, sums[n]);
  }
  for (int64_t n = 0; n < N; ++n) store(y + c + n * WIDTH, sums[n], width - n * WIDTH);
}

static void active_product(const Product& call, const int64_t* units, int64_t count, const float* h, float* y,
                           int64_t first, int64_t last) {
  int64_t c = first;
  for (; c + SIDE * WIDTH <= last; c += SIDE * WIDTH)
    add_up<SIDE>(call, units, count, h, y, c, SIDE * WIDTH);
  for (; c < last; c += WIDTH) add_up<1>(call, units, count, h, y, c, last - c < WIDTH ? last - c : WIDTH);
}
