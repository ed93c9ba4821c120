// The fused update on a GPU: update.h's arithmetic, a block of threads for each tile of a segment.
//
// nvcc compiles it ahead where the package is built (CMakeLists.txt), else NVRTC at first use
// (gpu/kernels.py). The flags of update.h apply: --fmad=false, no fast-math, no -ftz=true.
//
// A pass is bound by memory, so all that counts is to have enough bytes on their way. Every thread
// therefore issues all reads of its four elements, 16 bytes each in float32, before it uses any:
// (degree + 4) x 16 bytes, 48 KiB a multiprocessor at degree 0. (An H100's 3.35 TB/s at a latency of
// 0.8 us want 20 KiB: an estimate.) The 16-bit wires are read 8 bytes at a time: four elements a
// thread keep the registers few, and a warp's 256 bytes are whole cache lines all the same.
#include "update.h"

namespace mpicdsgd {

constexpr int THREADS = 256;    // of a block; gpu/update.py has them, and the tiles' size, too
constexpr int BLOCKS = 3;       // of them on a multiprocessor, which leaves a thread 80 registers; not
                                // told, ptxas takes 32, and lets one read wait for the other
constexpr int MOST = 8;         // degrees up to here have a kernel of their own
constexpr int GENERAL = -1;     // the kernel for all others
constexpr int GROUP = 4;        // of its neighbours at a time
constexpr int PACK = 4;         // elements of a thread at a time
constexpr int SUMS = 4;         // that a pass measures: disagreement, gradient, moved, penalty

// What a block works on: part of a segment. begin counts elements of the flat buffers.
struct Tile {
  long long begin;
  int length, segment;
};

// The one argument of the update, by value; Arguments in gpu/update.py. Its pointers are the
// device's, and null where native.update takes None.
struct Arguments {
  float* out;
  const float* z;
  const float* at;
  float* v;
  float* y;
  void* p;
  const void* q;
  const Segment* segments;
  const Tile* tiles;
  const void* near[MOST];            // the neighbours' published copies, up to MOST of them
  const void* const* neighbours;     // GENERAL: all of them, and their weights
  const float* weights;
  const float* scale;                // the gradients are divided by it first
  const float* overflow;             // not 0: the gradients count as absent
  double* partial;                   // each tile's shares of the SUMS, side by side
  unsigned* flags;                   // of the host; [0]: not finite, [1]: overflow
  float weight[MOST];
  int degree;
  int aligned;                       // 1: all buffers but the gradients begin where packs may
};

// The argument of add_partials.
struct Partials {
  const double* partial;
  long long count;                   // of tiles
  double* result;                    // of the host
};

template <class T> struct Pack;
template <> struct Pack<float> { using type = float4; };
template <> struct Pack<unsigned short> { using type = ushort4; };

template <int W, class T> __device__ __forceinline__ void load(T (&to)[W], const T* from) {
  __builtin_assume(__isGlobal(from));   // the compiler cannot know, of addresses read from tables
  if constexpr (W == 1) {
    to[0] = *from;
  } else {
    const typename Pack<T>::type x = *reinterpret_cast<const typename Pack<T>::type*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
}

template <int W, class T> __device__ __forceinline__ void store(T* to, const T (&from)[W]) {
  if constexpr (W == 1) {
    *to = from[0];
  } else {
    typename Pack<T>::type x;
    x.x = from[0], x.y = from[1], x.z = from[2], x.w = from[3];
    *reinterpret_cast<typename Pack<T>::type*>(to) = x;
  }
}

template <int WIRE> __device__ __forceinline__ float from_wire(typename Stored<WIRE>::type x) {
  if constexpr (WIRE == BFLOAT16) return from_bfloat16<float>(x);
  if constexpr (WIRE == FLOAT16) return from_float16<float>(x);
  return x;
}

template <int WIRE> __device__ __forceinline__ typename Stored<WIRE>::type to_wire(float x) {
  if constexpr (WIRE == BFLOAT16) return (unsigned short)to_bfloat16(x);
  if constexpr (WIRE == FLOAT16) return (unsigned short)to_float16(x);
  return x;
}

// What a thread has seen of its elements.
struct Seen {
  bool bad;
  double apart, gradient, moved, penalty;
};

// COUNT neighbours' terms of a pack.
template <int WIRE, int COUNT, bool MEASURE, int W, class T>
__device__ __forceinline__ void mix(float (&acc)[W], const float (&own)[W],
                                    const T (&near)[COUNT > 0 ? COUNT : 1][W], const float* weight,
                                    float (&sum)[W]) {
#pragma unroll
  for (int l = 0; l < COUNT; ++l)
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float p = from_wire<WIRE>(near[l][w]);
      if constexpr (MEASURE) sum[w] += apart(weight[l], p, own[w]);
      acc[w] = mixed(acc[w], weight[l], p, own[w]);
    }
}

// Elements [i, i + W) of the flat buffers; grad is shifted so that its element i belongs to them.
// All reads of an element come before its first write: buffers may be the same memory (out and z,
// p and q, y and at).
template <int WIRE, int DEGREE, bool MEASURE, int W>
__device__ __forceinline__ void step(const Arguments& a, const Segment& s, const float* grad,
                                     float inv_scale, long long i, Seen& seen) {
  using T = typename Stored<WIRE>::type;
  constexpr int AT_ONCE = DEGREE == GENERAL ? GROUP : DEGREE;
  float acc[W], own[W], g[W] = {}, x[W] = {}, new_v[W] = {}, sum[W] = {}, before[W] = {};
  T near[AT_ONCE > 0 ? AT_ONCE : 1][W], mine[W] = {};

  load(acc, a.z + i);
  if constexpr (DEGREE != GENERAL)
#pragma unroll
    for (int l = 0; l < DEGREE; ++l) load(near[l], static_cast<const T*>(a.near[l]) + i);
  if (s.own) load(mine, static_cast<const T*>(a.q) + i);
  if (grad) load(g, grad + i);
  if (a.v && (grad || a.y)) load(new_v, a.v + i);
  if ((grad || MEASURE) && s.decay != 0.0f) load(x, a.at + i);
  if constexpr (MEASURE) load(before, a.out + i);

#pragma unroll
  for (int w = 0; w < W; ++w)
    own[w] = s.own ? from_wire<WIRE>(mine[w]) : rounded_to_wire<WIRE>(acc[w]);
  if constexpr (DEGREE != GENERAL) {
    mix<WIRE, DEGREE, MEASURE>(acc, own, near, a.weight, sum);
  } else {
    int l = 0;
    for (; l + GROUP <= a.degree; l += GROUP) {
#pragma unroll
      for (int k = 0; k < GROUP; ++k)
        load(near[k], static_cast<const T*>(a.neighbours[l + k]) + i);
      mix<WIRE, GROUP, MEASURE>(acc, own, near, a.weights + l, sum);
    }
    for (; l < a.degree; ++l) {
      T one[1][W];
      load(one[0], static_cast<const T*>(a.neighbours[l]) + i);
      mix<WIRE, 1, MEASURE>(acc, own, one, a.weights + l, sum);
    }
  }
  if constexpr (MEASURE)
    for (int w = 0; w < W; ++w) {
      seen.apart += double(sum[w]);
      seen.penalty += double(penalty(s, x[w]));
    }

  if (grad) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float unscaled_g = unscaled(g[w], inv_scale);
      if constexpr (MEASURE) {
        seen.gradient += squared(double(decayed(s, unscaled_g, x[w])));
      }
      const float scaled = scaled_gradient(s, unscaled_g, x[w]);
      if (a.v) {
        new_v[w] = new_velocity(s, new_v[w], scaled);
        acc[w] = with_velocity(s, acc[w], new_v[w]);
      }
      acc[w] = with_gradient(s, acc[w], scaled);
    }
    if (a.v) store(a.v + i, new_v);
  }
  if constexpr (MEASURE)
    for (int w = 0; w < W; ++w) seen.moved += squared(double(acc[w] - before[w]));
  store(a.out + i, acc);
  T published[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    published[w] = to_wire<WIRE>(acc[w]);
    seen.bad |= not_finite(from_wire<WIRE>(published[w])) != 0;   // what overflows there is lost
  }
  if (a.p) store(static_cast<T*>(a.p) + i, published);
  if (a.y) {
    if (a.v)
#pragma unroll
      for (int w = 0; w < W; ++w) acc[w] = looked_ahead(s, acc[w], new_v[w]);
    store(a.y + i, acc);
  }
}

// The block's sum on thread 0, in an order that is always the same.
__device__ __forceinline__ double add_up(double x) {
  __shared__ double of_warp[THREADS / 32];
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_down_sync(0xffffffffu, x, apart);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < THREADS / 32; ++warp) x += of_warp[warp];
  __syncthreads();   // the next sum may be written
  return x;
}

template <int WIRE, int DEGREE, bool MEASURE>
__device__ __forceinline__ void update(const Arguments& a) {
  const Tile tile = a.tiles[blockIdx.x];
  const Segment s = a.segments[tile.segment];
  const bool overflow = a.overflow && *a.overflow != 0.0f;
  if (overflow && blockIdx.x == 0 && threadIdx.x == 0) a.flags[1] = 1;
  const float inv_scale = a.scale ? 1.0f / *a.scale : 1.0f;   // g * 1.0f is g, to the bit
  const float* grad = reinterpret_cast<const float*>(overflow ? 0 : s.grad);
  // Segments mostly begin where packs do, in an arena always, and so do gradients that are no views.
  const auto first = reinterpret_cast<unsigned long long>(grad) + 4 * (tile.begin - s.offset);
  const bool packs = a.aligned && tile.begin % PACK == 0 && (!grad || first % 16 == 0);
  if (grad) grad -= s.offset;

  Seen seen{};
  const int packed = packs ? tile.length / PACK * PACK : 0;
  for (int i = PACK * int(threadIdx.x); i < packed; i += PACK * THREADS)
    step<WIRE, DEGREE, MEASURE, PACK>(a, s, grad, inv_scale, tile.begin + i, seen);
  for (int i = packed + int(threadIdx.x); i < tile.length; i += THREADS)
    step<WIRE, DEGREE, MEASURE, 1>(a, s, grad, inv_scale, tile.begin + i, seen);

  if (seen.bad) a.flags[0] = 1;   // the same from whichever thread, and mostly from none
  if constexpr (MEASURE) {
    const double sums[SUMS] = {add_up(seen.apart), add_up(seen.gradient), add_up(seen.moved),
                               add_up(seen.penalty)};
    if (threadIdx.x == 0)
      for (int sum = 0; sum < SUMS; ++sum)
        a.partial[SUMS * (long long)blockIdx.x + sum] = sums[sum];
  }
}

}  // namespace mpicdsgd

#define MPICDSGD_KERNEL(NAME, WIRE, DEGREE, MEASURE)                                           \
  extern "C" __global__ void __launch_bounds__(mpicdsgd::THREADS, mpicdsgd::BLOCKS)            \
      update_##NAME(const __grid_constant__ mpicdsgd::Arguments a) {                           \
    mpicdsgd::update<mpicdsgd::WIRE, DEGREE, MEASURE>(a);                                      \
  }
#define MPICDSGD_KERNELS(NAME, WIRE)                                                           \
  MPICDSGD_KERNEL(NAME##_0, WIRE, 0, false)                                                    \
  MPICDSGD_KERNEL(NAME##_1, WIRE, 1, false)                                                    \
  MPICDSGD_KERNEL(NAME##_2, WIRE, 2, false)                                                    \
  MPICDSGD_KERNEL(NAME##_3, WIRE, 3, false)                                                    \
  MPICDSGD_KERNEL(NAME##_4, WIRE, 4, false)                                                    \
  MPICDSGD_KERNEL(NAME##_5, WIRE, 5, false)                                                    \
  MPICDSGD_KERNEL(NAME##_6, WIRE, 6, false)                                                    \
  MPICDSGD_KERNEL(NAME##_7, WIRE, 7, false)                                                    \
  MPICDSGD_KERNEL(NAME##_8, WIRE, 8, false)                                                    \
  MPICDSGD_KERNEL(NAME##_n, WIRE, mpicdsgd::GENERAL, false)                                    \
  /* For who measures, one for all degrees. */                                                 \
  MPICDSGD_KERNEL(NAME##_n_m, WIRE, mpicdsgd::GENERAL, true)

MPICDSGD_KERNELS(float32, FLOAT32)
MPICDSGD_KERNELS(bfloat16, BFLOAT16)
MPICDSGD_KERNELS(float16, FLOAT16)

// A block for each of the SUMS adds up what the tiles left.
extern "C" __global__ void __launch_bounds__(mpicdsgd::THREADS)
    add_partials(const __grid_constant__ mpicdsgd::Partials a) {
  double sum = 0.0;
  for (long long i = threadIdx.x; i < a.count; i += mpicdsgd::THREADS) sum += a.partial[mpicdsgd::SUMS * i + blockIdx.x];
  sum = mpicdsgd::add_up(sum);
  if (threadIdx.x == 0) a.result[blockIdx.x] = sum;
}
