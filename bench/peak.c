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
