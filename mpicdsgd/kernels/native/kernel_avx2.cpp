// The loops for x86-64 with AVX2 and F16C: vectors of eight floats, streaming stores.
// Compiled with -mavx2 -mf16c and called only where the CPU has both.
#include <immintrin.h>

#include "kernel.h"

namespace mpicdsgd {
namespace {

typedef float Vec __attribute__((vector_size(32)));
typedef unsigned UVec __attribute__((vector_size(32)));

}  // namespace

template <> struct Lanes<Vec> { using U = UVec; };

namespace {

constexpr bool STREAMS = true;

// Eight lanes of 16 bits, from the low halves of eight lanes of 32.
inline __m128i narrow(UVec h) {
  const __m256i packed = _mm256_packus_epi32((__m256i)h, (__m256i)h);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

template <int WIRE> inline __m128i to_wire(Vec x) {
  if constexpr (WIRE == BFLOAT16) return narrow(to_bfloat16(x));
  const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  const __m128i size = _mm_and_si128(h, _mm_set1_epi16(0x7fff));
  const __m128i nan = _mm_cmpgt_epi16(size, _mm_set1_epi16(0x7c00));
  return _mm_blendv_epi8(h, _mm_set1_epi16(0x7e00), nan);
}

template <int WIRE, class F> inline F load_wire(const typename Stored<WIRE>::type* from) {
  if constexpr (WIRE == FLOAT32) {
    F x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  } else if constexpr (sizeof(F) == sizeof(float)) {
    return WIRE == BFLOAT16 ? from_bfloat16<F>(*from) : from_float16<F>(*from);
  } else {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (WIRE == BFLOAT16) return from_bfloat16<F>((UVec)_mm256_cvtepu16_epi32(h));
    return (F)_mm256_cvtph_ps(h);
  }
}

template <int WIRE, class F> inline void store_wire(typename Stored<WIRE>::type* to, F x) {
  if constexpr (WIRE == FLOAT32) {
    __builtin_memcpy(to, &x, sizeof x);
  } else if constexpr (sizeof(F) == sizeof(float)) {
    *to = static_cast<unsigned short>(WIRE == BFLOAT16 ? to_bfloat16(x) : to_float16(x));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_wire<WIRE>(x));
  }
}

template <int WIRE> inline void store_past_cache(typename Stored<WIRE>::type* to, Vec x) {
  if constexpr (WIRE == FLOAT32) {
    _mm256_stream_ps(to, (__m256)x);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_wire<WIRE>(x));
  }
}

}  // namespace
}  // namespace mpicdsgd

#include "loop.h"

namespace mpicdsgd {

const Isa avx2{"avx2", choose, [] { _mm_sfence(); }};

}  // namespace mpicdsgd
