// Some neurons of one row over time, forwards and backwards; included once for every instruction set.
//
// Written without intrinsics: the inner loops run over neurons, which the compiler turns into vectors.

// e^x for -87 <= x <= 0, relative error below 3e-7.
static FW_INLINE float exponential(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
  const float n = (x * 1.44269504f + shift) - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

static FW_INLINE int64_t steps_of(const Call& call, int64_t row) {
  return call.lengths == nullptr ? call.steps : call.lengths[row];
}

static void forwards(const Call& call, int64_t row, int64_t first, int64_t count) {
  const int64_t steps = steps_of(call, row), base = row * call.steps * call.channels + first;
  const float rate = call.rate, threshold = call.threshold;
  alignas(64) float voltage[BLOCK];
  std::memcpy(voltage, call.start + row * call.channels + first, count * sizeof(float));
  for (int64_t t = 0; t < call.steps; ++t) {
    const int64_t at = base + t * call.channels;
    float* spikes = call.spikes + at;
    float* charged = call.charged == nullptr ? nullptr : call.charged + at;
    if (t >= steps) {
      std::memset(spikes, 0, count * sizeof(float));
      if (charged != nullptr) std::memset(charged, 0, count * sizeof(float));
      continue;
    }
    const float* current = call.current + at;
    if (charged != nullptr)
      for (int64_t c = 0; c < count; ++c) charged[c] = voltage[c] + (current[c] - voltage[c]) * rate;
    for (int64_t c = 0; c < count; ++c) {
      const float reached = voltage[c] + (current[c] - voltage[c]) * rate;
      spikes[c] = reached >= threshold ? 1.0f : 0.0f;
      voltage[c] = reached >= threshold ? 0.0f : reached;
    }
  }
  std::memcpy(call.last + row * call.channels + first, voltage, count * sizeof(float));
}

static void backwards(const Call& call, int64_t row, int64_t first, int64_t count) {
  const int64_t steps = steps_of(call, row), base = row * call.steps * call.channels + first;
  const float rate = call.rate, threshold = call.threshold;
  alignas(64) float grad[BLOCK];
  std::memcpy(grad, call.last + row * call.channels + first, count * sizeof(float));
  for (int64_t t = call.steps - 1; t >= 0; --t) {
    const int64_t at = base + t * call.channels;
    float* written = call.current + at;
    if (t >= steps) {
      std::memset(written, 0, count * sizeof(float));
      continue;
    }
    const float *charged = call.charged + at, *spikes = call.spikes + at;
    for (int64_t c = 0; c < count; ++c) {
      const float distance = -SLOPE * std::fabs(charged[c] - threshold);
      const float e = exponential(distance < -87.0f ? -87.0f : distance);
      const float surrogate = SLOPE * e / ((1.0f + e) * (1.0f + e));
      const float total = (charged[c] >= threshold ? 0.0f : grad[c]) + spikes[c] * surrogate;
      written[c] = total * rate;
      grad[c] = total - total * rate;
    }
  }
  std::memcpy(call.start + row * call.channels + first, grad, count * sizeof(float));
}
