// STREAM's triad, a = b + s c, with ordinary and with streaming stores. kernel.py compiles it with
// -march=native: what this machine's memory gives to the plainest loop.
#include <immintrin.h>

extern "C" void triad(float* a, const float* b, const float* c, float s, long n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (long i = 0; i < n; ++i) a[i] = b[i] + s * c[i];
}

// Here a must be 32-byte aligned and n a multiple of 8.
extern "C" void triad_streaming(float* a, const float* b, const float* c, float s, long n,
                                int threads) {
  const __m256 factor = _mm256_set1_ps(s);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n / 8; ++i) {
    const __m256 product = _mm256_mul_ps(factor, _mm256_loadu_ps(c + 8 * i));
    _mm256_stream_ps(a + 8 * i, _mm256_add_ps(_mm256_loadu_ps(b + 8 * i), product));
  }
}
