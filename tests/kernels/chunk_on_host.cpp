// One warp of the decode kernel over half a page: behind it come the kernels' sources and `Chosen`, the variant.
// half: a half page in fragment order; rotated, raw: queries [COLS, D]; masked: the tokens from `shown` on, and the first `hidden`.
// scores [COLS, 64] in units of log 2, before masks; out [COLS, D] in the rotated basis.
extern "C" void run(const unsigned char* half, const float* rotated, const float* raw, float scale, int hidden, int shown, Levels key, Levels value,
                    float* scores, float* out) {
  using C = Chosen;
  shared_memory.assign(1 << 20, 0xA5);
  unsigned char* const sm = shared_memory.data() + C::AT_Q;
  std::memcpy(shared_memory.data(), half, C::Reg::K_HALF);
  std::memcpy(shared_memory.data() + C::SLOT, half + C::Reg::K_HALF, C::Reg::V_HALF);
  static float column[4 * C::COLS + 4];
  static Args args;
  args.key = key, args.value = value;
  auto lane_of = [=](int lane) {
    threadIdx = {static_cast<unsigned>(lane), 0, 0};
    for (int c = 0; c < C::COLS; c++) {
      float turned[C::EPL], own[C::EPL];
      std::memcpy(turned, rotated + c * C::D + lane * C::EPL, sizeof turned);
      std::memcpy(own, raw + c * C::D + lane * C::EPL, sizeof own);
      int sum, unused;
      const float top = quantize<C, ORDER_OF<C::KF>>(sm, turned, c, lane, sum);
      const float top_raw = C::MEAN ? quantize<C, PLAIN>(sm + C::Q_BYTES, own, c, lane, unused) : top;
      const float unit = unit_of(C::KF);
      if (lane == 0) {
        column[4 * c] = top / 32600.f * 1.4426950408889634f * scale * unit;
        reinterpret_cast<int*>(column)[4 * c + 1] = sum;
        column[4 * c + 2] = top_raw / (top * unit);
      }
    }
    __syncthreads();
    State<C> state;
    state.reset();
    for (int n = 0; n < C::NG; n++) {
      state.cs[n] = column[4 * (4 * n + (lane & 3))];
      state.zq[n] = reinterpret_cast<const int*>(column)[4 * (4 * n + (lane & 3)) + 1];
    }
    int none[2 * (MAX_BATCH + 2)] = {};
    const Plan plan(reinterpret_cast<unsigned char*>(none), args);
    auto ring = [] { Ring<C> r{}; return r; };  // its slots hold the half page, and nothing is asked for
    Ring<C> first = ring(), again = ring();
    float x[C::NG][8];
    chunk_scores<C>(x, state, first, args.key, C::AT_Q, column, 0, lane);
    for (int n = 0; n < C::NG; n++)
      for (int i = 0; i < 8; i++) scores[(4 * n + (lane & 3)) * 64 + 8 * i + (lane >> 2)] = x[n][i] * state.cs[n];
    chunk<C>(state, again, plan, C::AT_Q, column, hidden, shown, 0, lane);
    for (int n = 0; n < C::NG; n++) {
      for (int d = 4; d < 32; d *= 2) {
        state.l[n] += __shfl_xor_sync(~0u, state.l[n], d);
        state.zs[n] += __shfl_xor_sync(~0u, state.zs[n], d);
      }
      float* const row = out + (4 * n + (lane & 3)) * C::D + (lane >> 2) * (C::D / 8);
      for (int i = 0; i < 2 * C::MT; i++) row[i] = (state.O[n][i] - zero_of(C::VF) * state.zs[n]) * unit_of(C::VF) / state.l[n];
    }
  };
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 32; lane++) lanes.emplace_back(lane_of, lane);
  for (auto& lane : lanes) lane.join();
}
