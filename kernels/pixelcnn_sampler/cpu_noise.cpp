// Rows of noise; compiled once per instruction set level (see common/simd.h).
#include "pixelcnn_sampler/cpu.h"
#include "pixelcnn_sampler/cpu_draw.h"

namespace fastvid::FASTVID_LEVEL {

void gumbel_row(const NoiseCall& call) {
    for (int64_t b = 0; b < call.B; ++b)
        for (int64_t x = 0; x < call.W; ++x) {
            const Place place = {(uint64_t)call.seed, (uint32_t)call.samples[b], (uint32_t)call.stream,
                                 (uint32_t)call.t,    (uint32_t)call.y,          (uint32_t)x};
            gumbel(place, call.K, call.noise + (b * call.W + x) * call.K);
        }
}

}  // namespace fastvid::FASTVID_LEVEL
