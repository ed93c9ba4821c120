// Enough of CUDA for g++ to compile kernel.cu for the host. Tests only.
//
// The threads of a block are fibers on one host thread, which runs them one after the other, each
// until it ends or waits at a barrier: see shim.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __builtin_assume(...)
#define __shared__ static thread_local   // one block at a time on a host thread

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
inline thread_local bool misaligned = false;
inline thread_local long long wide = 0;   // accesses to four elements at a time

// Where a GPU would stop with "misaligned address". The asm hides from the compiler what it may
// conclude from the type.
inline bool may_access(const void* address, std::size_t size) {
  auto a = reinterpret_cast<std::uintptr_t>(address);
  asm volatile("" : "+r"(a));
  if (a % size == 0) return true;
  misaligned = true;
  return false;
}

void block_barrier();
void warp_barrier();
double* lane(unsigned index);   // what a lane of the calling thread's warp shows the others
}  // namespace shim

template <class T> struct alignas(4 * sizeof(T)) FourOf {
  T x{}, y{}, z{}, w{};
  FourOf() = default;
  FourOf(const FourOf& from) { *this = from; }
  FourOf& operator=(const FourOf& from) {
    ++shim::wide;
    if (shim::may_access(this, sizeof *this) && shim::may_access(&from, sizeof *this))
      x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};
using float4 = FourOf<float>;
using ushort4 = FourOf<unsigned short>;

inline void __syncthreads() { shim::block_barrier(); }

inline double __shfl_down_sync(unsigned, double x, unsigned delta) {
  const unsigned own = threadIdx.x % 32;
  *shim::lane(own) = x;
  shim::warp_barrier();
  const double got = own + delta < 32 ? *shim::lane(own + delta) : x;
  shim::warp_barrier();
  return got;
}
