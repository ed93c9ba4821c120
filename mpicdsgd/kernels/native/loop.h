// The host's loop over a segment. Each kernel_*.cpp includes it after defining, for its instruction
// set, the vector type `Vec`, load_wire, store_wire, store_past_cache and STREAMS (if it has that).
// All is internal to that file: no AVX2 code may be picked by the linker for another CPU.
#pragma once

#include "kernel.h"

#define MPICDSGD_INLINE inline __attribute__((always_inline))

namespace mpicdsgd {
namespace {

// How memory likes to be read (measured, float32, one core): one stream at a time gives half of
// what four to sixteen give, and beyond the prefetchers lose track, the more so where all buffers
// begin alike in a page. So up to GROUP neighbours are read side by side, and of more than that
// near-equal groups one after the other, over a tile of the results so far. A tile is long enough
// to make restarting the streams cheap, and fits into a second-level cache: with 16 KB many
// neighbours reached two thirds of the triad, with 128 KB four fifths, and more gives no more.
// Prefetching by hand pays where the streams are many.
constexpr int GROUP = 12;
constexpr int LEAST_GROUP = (GROUP + 1) / 2;   // 13 neighbours are 6 and 7
constexpr int TILE = 32768;                    // elements
constexpr int AHEAD = 256;                     // bytes
constexpr int PACKS = 2;                       // vectors at a time
constexpr int FLUSH = 4096;                    // elements that are summed in float32

template <class F> constexpr int lanes() { return int(sizeof(F) / sizeof(float)); }

template <class F> MPICDSGD_INLINE F load(const float* from) {
  F x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class F> MPICDSGD_INLINE void store(float* to, F x) {
  __builtin_memcpy(to, &x, sizeof x);
}

template <class T> MPICDSGD_INLINE void prefetch(const T* from) {
  __builtin_prefetch(from + AHEAD / sizeof(T));
}

inline bool any(unsigned x) { return x != 0; }
inline bool any(Lanes<Vec>::U x) {
  unsigned seen = 0;
  for (int lane = 0; lane < lanes<Vec>(); ++lane) seen |= x[lane];
  return seen != 0;
}

// Sums of so few elements that float32 keeps their digits.
template <class F> struct Partial {
  F apart{}, gradient{}, moved{}, penalty{};
};

inline double total(float x) { return x; }
inline double total(Vec x) {
  double sum = 0.0;
  for (int lane = 0; lane < lanes<Vec>(); ++lane) sum += x[lane];
  return sum;
}

template <class F> inline void add(Sums& sums, const Partial<F>& partial) {
  sums.apart += total(partial.apart);
  sums.gradient += total(partial.gradient);
  sums.moved += total(partial.moved);
  sums.penalty += total(partial.penalty);
}

// The results so far of a tile, where the neighbours come in several groups.
struct Tile {
  alignas(64) float acc[TILE];
};

// COUNT neighbours' share in a segment. The FIRST phase begins with z, the LAST one finishes the
// update, between them the results so far stand in a tile; z and q are as they were until then. The members are copies, which the
// compiler may keep in registers: stores to the float buffers might alias the originals.
template <int WIRE, int COUNT, bool FIRST, bool LAST, bool MEASURE> class Phase {
  using T = typename Stored<WIRE>::type;

 public:
  Phase(const Pass& pass, const Segment& segment, int first, Tile* tile, long long base)
      : out(pass.out), v(pass.v), y(pass.y), z(pass.z), at(pass.at), p(static_cast<T*>(pass.p)),
        q(static_cast<const T*>(pass.q)), grad(reinterpret_cast<const float*>(segment.grad)),
        s(segment), tile(tile), base(base) {
    for (int l = 0; l < COUNT; ++l) {
      near[l] = static_cast<const T*>(pass.neighbours[first + l]);
      weight[l] = pass.weights[first + l];
    }
  }

  // Elements [i, end) of the flat buffers; true if what it wrote to out is finite, also rounded to the wire.
  template <bool STREAM> bool run(long long i, long long end, Sums& sums) const {
    constexpr int width = lanes<Vec>();
    unsigned bad = 0;
    Lanes<Vec>::U bads{};
    Partial<float> rest;
    if constexpr (STREAM) {   // only aligned vectors can be streamed
      constexpr auto bytes = width * sizeof(T);
      for (; i < end && reinterpret_cast<unsigned long long>(p + i) % bytes != 0; ++i)
        step<false, 1, float>(i, bad, rest);
    }
    while (i + PACKS * width <= end) {
      const long long until = MEASURE && end - i > FLUSH ? i + FLUSH : end;
      Partial<Vec> partial;
      for (; i + PACKS * width <= until; i += PACKS * width)
        step<STREAM, PACKS, Vec>(i, bads, partial);
      if constexpr (MEASURE) add(sums, partial);
    }
    for (; i < end; ++i) step<false, 1, float>(i, bad, rest);
    if constexpr (MEASURE) add(sums, rest);
    return !any(bads) && !any(bad);
  }

 private:
  // N packs of F. All reads of an element come before its first write, so that buffers may be the
  // same memory (out and z, p and q, y and at).
  template <bool STREAM, int N, class F>
  MPICDSGD_INLINE void step(long long i, typename Lanes<F>::U& bad, Partial<F>& sum) const {
    constexpr int W = lanes<F>();
    F acc[N], own[N];
    if constexpr (FIRST) prefetch(z + i);
    for (int n = 0; n < N; ++n) acc[n] = load<F>(z + i + n * W);
    if (s.own) {
      for (int n = 0; n < N; ++n) own[n] = load_wire<WIRE, F>(q + i + n * W);
    } else {
      for (int n = 0; n < N; ++n) own[n] = rounded_to_wire<WIRE>(acc[n]);
    }
    if constexpr (!FIRST)
      for (int n = 0; n < N; ++n) acc[n] = load<F>(tile->acc + (i - base) + n * W);
    for (int l = 0; l < COUNT; ++l) {
      prefetch(near[l] + i);
      for (int n = 0; n < N; ++n) {
        const F theirs = load_wire<WIRE, F>(near[l] + i + n * W);
        if constexpr (MEASURE) sum.apart += apart(weight[l], theirs, own[n]);
        acc[n] = mixed(acc[n], weight[l], theirs, own[n]);
      }
    }
    if constexpr (LAST) {
      finish<STREAM, N>(i, acc, bad, sum);
    } else {
      for (int n = 0; n < N; ++n) store(tile->acc + (i - base) + n * W, acc[n]);
    }
  }

  template <bool STREAM, int N, class F>
  MPICDSGD_INLINE void finish(long long i, F* acc, typename Lanes<F>::U& bad,
                              Partial<F>& sum) const {
    constexpr int W = lanes<F>();
    F new_v[N] = {}, x[N] = {};
    if (v && (grad || y)) {
      prefetch(v + i);
      for (int n = 0; n < N; ++n) new_v[n] = load<F>(v + i + n * W);
    }
    if (s.decay != 0.0f && (grad || MEASURE)) {
      for (int n = 0; n < N; ++n) {
        x[n] = load<F>(at + i + n * W);
        if constexpr (MEASURE) sum.penalty += penalty(s, x[n]);
      }
    }
    if (grad) {
      F a[N];
      prefetch(grad + (i - s.offset));
      for (int n = 0; n < N; ++n) {
        const F g = load<F>(grad + (i - s.offset) + n * W);
        if constexpr (MEASURE) sum.gradient += squared(decayed(s, g, x[n]));
        a[n] = scaled_gradient(s, g, x[n]);
      }
      if (v)
        for (int n = 0; n < N; ++n) {
          new_v[n] = new_velocity(s, new_v[n], a[n]);
          acc[n] = with_velocity(s, acc[n], new_v[n]);
        }
      for (int n = 0; n < N; ++n) acc[n] = with_gradient(s, acc[n], a[n]);
      if (v)
        for (int n = 0; n < N; ++n) store(v + i + n * W, new_v[n]);
    }
    for (int n = 0; n < N; ++n) {
      bad |= not_finite(rounded_to_wire<WIRE>(acc[n]));   // what overflows there is lost
      if constexpr (MEASURE) sum.moved += squared(acc[n] - load<F>(out + i + n * W));
      store(out + i + n * W, acc[n]);
    }
    if (y)
      for (int n = 0; n < N; ++n)
        store(y + i + n * W, v ? looked_ahead(s, acc[n], new_v[n]) : acc[n]);
    if (p) {
      for (int n = 0; n < N; ++n) {
        if constexpr (STREAM) {
          store_past_cache<WIRE>(p + i + n * W, acc[n]);
        } else {
          store_wire<WIRE>(p + i + n * W, acc[n]);
        }
      }
    }
  }

  float *out, *v, *y;
  const float *z, *at;
  T* p;
  const T* q;
  const float* grad;
  const Segment s;
  Tile* tile;
  long long base;   // element of the flat buffers where the tile begins
  const T* near[COUNT > 0 ? COUNT : 1];
  float weight[COUNT > 0 ? COUNT : 1];
};

template <int WIRE, int COUNT, bool FIRST, bool LAST, bool MEASURE>
bool run_phase(const Pass& pass, const Segment& s, int first, Tile* tile, long long begin,
               long long end, Sums& sums) {
  const Phase<WIRE, COUNT, FIRST, LAST, MEASURE> phase(pass, s, first, tile, begin);
  if (STREAMS && LAST && pass.stream) return phase.template run<STREAMS && LAST>(begin, end, sums);
  return phase.template run<false>(begin, end, sums);
}

// Degrees up to GROUP: all neighbours at once, no tile.
template <int WIRE, int DEGREE, bool MEASURE>
bool sweep(const Pass& pass, const Segment& s, long long begin, long long end, Sums& sums) {
  return run_phase<WIRE, DEGREE, true, true, MEASURE>(pass, s, 0, nullptr, begin, end, sums);
}

template <int WIRE, bool MEASURE>
bool sweep_in_groups(const Pass& pass, const Segment& s, long long begin, long long end,
                     Sums& sums) {
  using Run = bool (*)(const Pass&, const Segment&, int, Tile*, long long, long long, Sums&);
#define MPICDSGD_BY_COUNT(FIRST, LAST)                                               \
  {run_phase<WIRE, 6, FIRST, LAST, MEASURE>, run_phase<WIRE, 7, FIRST, LAST, MEASURE>,   \
   run_phase<WIRE, 8, FIRST, LAST, MEASURE>, run_phase<WIRE, 9, FIRST, LAST, MEASURE>,   \
   run_phase<WIRE, 10, FIRST, LAST, MEASURE>, run_phase<WIRE, 11, FIRST, LAST, MEASURE>, \
   run_phase<WIRE, 12, FIRST, LAST, MEASURE>}
  static constexpr Run first_phase[] = MPICDSGD_BY_COUNT(true, false);
  static constexpr Run middle_phase[] = MPICDSGD_BY_COUNT(false, false);
  static constexpr Run last_phase[] = MPICDSGD_BY_COUNT(false, true);
  static_assert(LEAST_GROUP == 6 && GROUP == 12, "the tables are for groups of 6 to 12");

  const int groups = (pass.degree + GROUP - 1) / GROUP;
  Tile tile;
  bool finite = true;
  for (long long i = begin; i < end; i += TILE) {
    const long long until = end - i < TILE ? end : i + TILE;
    for (int group = 0; group < groups; ++group) {
      const int l = int((long long)pass.degree * group / groups);
      const int count = int((long long)pass.degree * (group + 1) / groups) - l;
      const Run* table = group == 0 ? first_phase : group == groups - 1 ? last_phase : middle_phase;
      finite &= table[count - LEAST_GROUP](pass, s, l, &tile, i, until, sums);
    }
  }
  return finite;
}

template <int WIRE, bool MEASURE> Sweep by_degree(int degree) {
  static constexpr Sweep table[GROUP + 1] = {
      sweep<WIRE, 0, MEASURE>,  sweep<WIRE, 1, MEASURE>,  sweep<WIRE, 2, MEASURE>,
      sweep<WIRE, 3, MEASURE>,  sweep<WIRE, 4, MEASURE>,  sweep<WIRE, 5, MEASURE>,
      sweep<WIRE, 6, MEASURE>,  sweep<WIRE, 7, MEASURE>,  sweep<WIRE, 8, MEASURE>,
      sweep<WIRE, 9, MEASURE>,  sweep<WIRE, 10, MEASURE>, sweep<WIRE, 11, MEASURE>,
      sweep<WIRE, 12, MEASURE>};
  return degree <= GROUP ? table[degree] : sweep_in_groups<WIRE, MEASURE>;
}

template <bool MEASURE> Sweep by_wire(int wire, int degree) {
  if (wire == BFLOAT16) return by_degree<BFLOAT16, MEASURE>(degree);
  if (wire == FLOAT16) return by_degree<FLOAT16, MEASURE>(degree);
  return by_degree<FLOAT32, MEASURE>(degree);
}

Sweep choose(int wire, int degree, bool measure) {
  return measure ? by_wire<true>(wire, degree) : by_wire<false>(wire, degree);
}

}  // namespace
}  // namespace mpicdsgd
