// What becomes of the last product.
#pragma once

#include "axial_attention/cpu_projected_plan.h"
#include "common/panel.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Asks for what finish_panel will write: its sums take longer than memory.
inline void fetch_places(const Plan& plan, int64_t panel, const int64_t* places, int64_t positions) {
    const Positions& out = plan.call.out;
    const char* first = (const char*)out.data + panel * PANEL * out.strides[4] * bytes_of(out.type);
    for (int64_t p = 0; p < positions; ++p) __builtin_prefetch(first + places[p] * bytes_of(out.type), 1);
}

// A panel's sums, [positions][PANEL], go to out at the positions' places.
inline void finish_panel(const Plan& plan, int64_t panel, const int64_t* places, const float* sums,
                         int64_t positions) {
    const Positions& out = plan.call.out;
    const int64_t first = panel * PANEL, count = at_most(plan.call.Cout - first, PANEL), step = out.strides[4];
    const float* bias = plan.bias + first;
    const bool add = plan.call.add;
    if (out.type == FLOAT32 && step == 1 && count == PANEL) {
        const Floats left = load<Floats>(bias), right = load<Floats>(bias + LANES), none = repeat(0.0f);
        for (int64_t p = 0; p < positions; ++p, sums += PANEL) {
            float* to = (float*)out.data + places[p] + first;
            store(to, load<Floats>(sums) + left + (add ? load<Floats>(to) : none));
            store(to + LANES, load<Floats>(sums + LANES) + right + (add ? load<Floats>(to + LANES) : none));
        }
        return;
    }
    for (int64_t p = 0; p < positions; ++p, sums += PANEL)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = places[p] + (first + i) * step;
            const float value = sums[i] + bias[i] + (add ? element(out.data, out.type, at) : 0.0f);
            write_row(&value, 1, (char*)out.data + at * bytes_of(out.type), 1, out.type);
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
