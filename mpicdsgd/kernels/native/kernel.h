// The face between the binding (host.cpp) and the loops, which are compiled once per instruction set.
#pragma once

#include "update.h"

namespace mpicdsgd {

// One pass over the flat buffers. Checked by host.cpp; nothing behind it checks again.
struct Pass {
  float* out;
  const float* z;
  const float* at;
  float* v;               // or null
  float* y;               // or null
  void* p;                // or null; type by the wire
  const void* q;          // or null: then no segment has own = 1
  const void* const* neighbours;
  const float* weights;
  int degree;
  bool stream;            // write p past the caches
};

// What a pass that measures adds up of its elements.
struct Sums {
  double apart, gradient;   // sum_l w_l |p_l - q_|^2 and |h|^2
  double moved, penalty;    // |out - out before|^2 and decay |at|^2
};

// In the order in which the caller gets them.
constexpr double Sums::*SUMS[] = {&Sums::apart, &Sums::gradient, &Sums::moved, &Sums::penalty};

// Updates elements [begin, end) of the flat buffers, all within the segment; true if finite. Adds
// to the sums if it measures.
using Sweep = bool (*)(const Pass&, const Segment&, long long begin, long long end, Sums&);

struct Isa {
  const char* name;
  Sweep (*sweep)(int wire, int degree, bool measure);
  void (*fence)();        // after a thread's last streaming store
};

extern const Isa generic;
#if defined(MPICDSGD_AVX2)
extern const Isa avx2;
#endif

}  // namespace mpicdsgd
