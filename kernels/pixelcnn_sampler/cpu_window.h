// How many positions of a row to evaluate at once, learnt while rows are drawn: about time, never about codes.
#pragma once

#include <cstdint>

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int WINDOWS = 8;
constexpr int64_t window_sizes[WINDOWS] = {1, 2, 3, 4, 6, 8, 12, 16};

// Seconds of a pass for each size, and how often a guessed code turned out right.
struct Habits {
    double seconds[WINDOWS];
    int64_t measured[WINDOWS];
    double right, guessed;
    int64_t passes;

    // The size whose pass settles the most codes a second, of those not above `most`. Sizes that were measured less
    // than twice come first; now and then a neighbour of the best one is measured again.
    int choose(int64_t most) const {
        const double agreement = (right + 0.5) / (guessed + 1);
        double best = 0, settled = 0, chance = 1;
        int chosen = 0;
        int64_t positions = 0;
        for (int i = 0; i < WINDOWS && (i == 0 || window_sizes[i] <= most); ++i) {
            for (; positions < window_sizes[i]; ++positions, chance *= agreement) settled += chance;
            if (measured[i] < 2) return i;
            if (settled / seconds[i] > best) {
                best = settled / seconds[i];
                chosen = i;
            }
        }
        const int neighbour = chosen + (passes / 64 % 2 ? 1 : -1);
        const bool there = neighbour >= 0 && neighbour < WINDOWS && window_sizes[neighbour] <= most;
        return passes % 64 == 63 && there ? neighbour : chosen;
    }

    void took(int i, double time) {
        ++passes;
        // the first time pays for cold memory; later, what took far too long was interrupted
        if (measured[i]++ < 2)
            seconds[i] = measured[i] == 1 || time < seconds[i] ? time : seconds[i];
        else if (time < 4 * seconds[i])
            seconds[i] += (time - seconds[i]) / 8;
        else
            seconds[i] *= 1.05;
    }

    void guess(bool was_right) {
        right = right * 0.99 + was_right;
        guessed = guessed * 0.99 + 1;
    }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
