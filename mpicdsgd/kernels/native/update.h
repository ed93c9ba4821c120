// The arithmetic of the fused update, element by element, in the one place where it stands.
//
// g++ compiles it for the host (F is float or a short vector of floats), nvcc and NVRTC for the GPU
// (F is float). Therefore no includes. reference.py is the same in NumPy, and all of them give the
// same bits: every operation is rounded once, in the order written here. Compile it without
// contraction (-ffp-contract=off, --fmad=false), without fast-math and without flushing subnormals.
#pragma once

#if defined(__CUDACC__)
#define MPICDSGD_FN __host__ __device__ static inline
#else
#define MPICDSGD_FN static inline
#endif

namespace mpicdsgd {

// A run of elements with one gradient and one set of coefficients; SEGMENT in __init__.py.
struct Segment {
  long long offset, length;       // elements of the flat buffers
  unsigned long long grad;        // address of a contiguous float32 gradient, 0: none
  float alpha, decay, mu, c_v, c_g;
  int own;                        // 1: the own published copy stands in q; 0: it is Q(z)
};
static_assert(sizeof(Segment) == 48, "SEGMENT in __init__.py has 48 bytes");

enum Wire : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <int WIRE> struct Stored { using type = unsigned short; };
template <> struct Stored<FLOAT32> { using type = float; };

// The unsigned integers of the same shape as F.
template <class F> struct Lanes;
template <> struct Lanes<float> { using U = unsigned; };

template <class To, class From> MPICDSGD_FN To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  union { From from; To to; } u;
  u.from = x;
  return u.to;
}

// Conversions to and from the 16-bit wires; the 16 bits stand in the low half of each lane.
// To nearest, ties to even. Any NaN becomes the one positive quiet NaN.

template <class F> MPICDSGD_FN F from_bfloat16(typename Lanes<F>::U h) {
  return same_bits<F>(h << 16);
}

template <class F> MPICDSGD_FN typename Lanes<F>::U to_bfloat16(F x) {
  using U = typename Lanes<F>::U;
  const U b = same_bits<U>(x);
  const U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return (b & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : rounded;
}

template <class F> MPICDSGD_FN F from_float16(typename Lanes<F>::U h) {
  using U = typename Lanes<F>::U;
  // Seen as a float32 the shifted bits are the value times 2^-112, for subnormals too.
  const F scaled = same_bits<F>((h & 0x7fffu) << 13) * 0x1p112f;
  const U b = same_bits<U>(scaled);
  const U finite_or_not = b >= 0x47800000u ? b | 0x7f800000u : b;
  return same_bits<F>(finite_or_not | (h & 0x8000u) << 16);
}

template <class F> MPICDSGD_FN typename Lanes<F>::U to_float16(F x) {
  using U = typename Lanes<F>::U;
  const U b = same_bits<U>(x);
  const U size = b & 0x7fffffffu;
  const U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // One unit in the last place of 0.5f is float16's smallest subnormal: the addition rounds.
  const U subnormal = same_bits<U>(same_bits<F>(size) + 0.5f) - 0x3f000000u;
  U h = size < 0x38800000u ? subnormal : normal;
  h = size >= 0x47800000u ? U{} + 0x7c00u : h;
  h = h | ((b >> 16) & 0x8000u);
  return size > 0x7f800000u ? U{} + 0x7e00u : h;
}

// Q(x) as a float32: what a neighbour reads after x was published.
template <int WIRE, class F> MPICDSGD_FN F rounded_to_wire(F x) {
  if constexpr (WIRE == BFLOAT16) return from_bfloat16<F>(to_bfloat16(x));
  if constexpr (WIRE == FLOAT16) return from_float16<F>(to_float16(x));
  return x;
}

// One neighbour's term; q is the own published value, so that equal copies add nothing.
template <class F> MPICDSGD_FN F mixed(F acc, float weight, F p, F q) {
  return acc + weight * (p - q);
}

// One neighbour's share of the disagreement, which is a reduction: it agrees to a tolerance. The
// product is the one that `mixed` has, and costs nothing.
template <class F> MPICDSGD_FN F apart(float weight, F p, F q) {
  const F d = p - q;
  return d * (weight * d);
}

// The gradient of a loss that was scaled; as torch's GradScaler has it, inv_scale is 1.0f / scale.
template <class F> MPICDSGD_FN F unscaled(F g, float inv_scale) { return g * inv_scale; }

// h, the gradient that is applied. With decay == 0 `at` does not enter, and need not be given.
template <class F> MPICDSGD_FN F decayed(const Segment& s, F g, F at) {
  return s.decay != 0.0f ? g + s.decay * at : g;
}

template <class F> MPICDSGD_FN F scaled_gradient(const Segment& s, F g, F at) {
  return s.alpha * decayed(s, g, at);
}

template <class F> MPICDSGD_FN F new_velocity(const Segment& s, F v, F a) { return s.mu * v - a; }

template <class F> MPICDSGD_FN F with_velocity(const Segment& s, F acc, F v) {
  return acc + s.c_v * v;
}

template <class F> MPICDSGD_FN F with_gradient(const Segment& s, F acc, F a) {
  return acc - s.c_g * a;
}

// The look-ahead point y, where the next gradient is taken; without v it is acc itself.
template <class F> MPICDSGD_FN F looked_ahead(const Segment& s, F acc, F v) {
  return acc + s.mu * v;
}

// The shares of the other sums, likewise to a tolerance.
template <class F> MPICDSGD_FN F squared(F x) { return x * x; }
template <class F> MPICDSGD_FN F penalty(const Segment& s, F at) { return s.decay * (at * at); }

// Lanes that are not finite, as integers that are not zero.
template <class F> MPICDSGD_FN typename Lanes<F>::U not_finite(F x) {
  using U = typename Lanes<F>::U;
  // The exponent of all ones carries into the sign bit, any other does not.
  return ((same_bits<U>(x) & 0x7f800000u) + 0x00800000u) & 0x80000000u;
}

}  // namespace mpicdsgd
