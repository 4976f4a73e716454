#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Independent chains of fused multiply-adds, enough to hide their latency and few enough to stay in registers: what the
   vector units can do when nothing has to be loaded. peak.py compiles this for the machine at hand and times it. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { CHAINS = 12 };
typedef float lanes __attribute__((vector_size(4 * WIDTH)));

/* Does `steps` steps of 2 CHAINS WIDTH operations; returns how many operations one step has. The result goes to `sink`,
   so that no compiler can leave the work out. */
int fma_steps(long steps, float *sink) {
    lanes chain[CHAINS], scale, shift, sum;
    for (int lane = 0; lane < WIDTH; lane++) {
        scale[lane] = 0.999f;
        shift[lane] = 0.001f;
        sum[lane] = 0.0f;
        for (int i = 0; i < CHAINS; i++) chain[i][lane] = (float)i;
    }
    for (long step = 0; step < steps; step++)
        for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * scale + shift;
    for (int i = 0; i < CHAINS; i++) sum += chain[i];
    *sink = sum[0] + sum[WIDTH - 1];
    return 2 * CHAINS * WIDTH;
}

/* The same for products of int16 summed in int32, by which codes can be screened; returns 0 where this file knows no
   instruction for them. Each step takes what the last one left, so that nothing can be left out. */
int madd_steps(long steps, float *sink) {
    *sink = 0;
#if defined(__AVX512BW__)
#define STEP(chain) (ints)_mm512_madd_epi16((__m512i)(chain), (__m512i)factor) + factor
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define STEP(chain) (ints)_mm256_madd_epi16((__m256i)(chain), (__m256i)factor) + factor
#endif
#if defined(STEP)
    typedef int ints __attribute__((vector_size(4 * WIDTH)));
    ints chain[CHAINS], factor;
    for (int lane = 0; lane < WIDTH; lane++) {
        factor[lane] = 3 << 16 | 3;
        for (int i = 0; i < CHAINS; i++) chain[i][lane] = i;
    }
    for (long step = 0; step < steps; step++)
        for (int i = 0; i < CHAINS; i++) {
            ints next = STEP(chain[i]);
            __asm__("" : "+v"(next)); /* or else the compiler keeps more values at once than there are registers */
            chain[i] = next;
        }
    for (int i = 0; i < CHAINS; i++) *sink += (float)chain[i][0];
    return 4 * CHAINS * WIDTH;
#else
    (void)steps;
    return 0;
#endif
}

/* Reads `bytes` bytes, a multiple of 512, from a place aligned to 64; the sum goes to `sink`. Eight sums, so that adding
   never waits for an addition. */
void read_all(const float *from, long bytes, float *sink) {
    enum { SUMS = 8, STEP = SUMS * WIDTH };
    const lanes *at = (const lanes *)from;
    lanes sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = at[i];
    for (long n = 1; n < bytes / (4 * STEP); n++)
        for (int i = 0; i < SUMS; i++) sum[i] += at[n * SUMS + i];
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    *sink = sum[0][0] + sum[0][WIDTH - 1];
}
