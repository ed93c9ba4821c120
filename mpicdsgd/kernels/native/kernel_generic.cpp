// The loops for any CPU: vectors of four floats, which the compiler maps to what the CPU has.
#include "kernel.h"

namespace mpicdsgd {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef unsigned UVec __attribute__((vector_size(16)));

}  // namespace

template <> struct Lanes<Vec> { using U = UVec; };

namespace {

constexpr bool STREAMS = false;

template <int WIRE, class F> inline F load_wire(const typename Stored<WIRE>::type* from) {
  F x;
  if constexpr (WIRE == FLOAT32) {
    __builtin_memcpy(&x, from, sizeof x);
  } else {
    typename Lanes<F>::U h;
    if constexpr (sizeof(F) == sizeof(float)) {
      h = *from;
    } else {
      for (int lane = 0; lane < int(sizeof(F) / sizeof(float)); ++lane) h[lane] = from[lane];
    }
    x = WIRE == BFLOAT16 ? from_bfloat16<F>(h) : from_float16<F>(h);
  }
  return x;
}

template <int WIRE, class F> inline void store_wire(typename Stored<WIRE>::type* to, F x) {
  if constexpr (WIRE == FLOAT32) {
    __builtin_memcpy(to, &x, sizeof x);
  } else {
    const typename Lanes<F>::U h = WIRE == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    if constexpr (sizeof(F) == sizeof(float)) {
      *to = static_cast<unsigned short>(h);
    } else {
      for (int lane = 0; lane < int(sizeof(F) / sizeof(float)); ++lane)
        to[lane] = static_cast<unsigned short>(h[lane]);
    }
  }
}

template <int WIRE, class F> inline void store_past_cache(typename Stored<WIRE>::type* to, F x) {
  store_wire<WIRE>(to, x);
}

}  // namespace
}  // namespace mpicdsgd

#include "loop.h"

namespace mpicdsgd {

const Isa generic{"generic", choose, [] {}};

}  // namespace mpicdsgd
