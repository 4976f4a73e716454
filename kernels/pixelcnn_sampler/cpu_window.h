// How many positions of a row to evaluate at once, learnt from row to row. It decides about time, never about codes.
#pragma once

#include <cstdint>

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int WINDOWS = 8;
constexpr int64_t WINDOW_SIZES[WINDOWS] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr double HOPELESS = 1.25;        // so much slower than the best, and no larger size is tried
constexpr int64_t LOOK_AROUND = 16;      // rows after which a neighbour of the best size has another turn
constexpr double INTERRUPTED = 2, NEW = 0.25;  // a row's time counts up to this much of what was usual; its weight

// Seconds that a settled code takes with windows of each size. Whole rows are timed: guesses get better from pass to
// pass, so a pass alone says little.
struct Habits {
    double seconds[WINDOWS];  // 0: not tried yet
    int64_t rows;

    int choose(int64_t most) const {
        int best = 0;
        for (int i = 0; i < WINDOWS && WINDOW_SIZES[i] <= most; ++i) {
            if (seconds[i] == 0) return i;
            if (seconds[i] < seconds[best]) best = i;
            if (seconds[i] > HOPELESS * seconds[best]) break;
        }
        const int neighbour = best + (rows / LOOK_AROUND % 2 ? 1 : -1);
        const bool there = neighbour >= 0 && neighbour < WINDOWS && WINDOW_SIZES[neighbour] <= most;
        return rows % LOOK_AROUND == LOOK_AROUND - 1 && there ? neighbour : best;
    }

    void took(int i, double time) {
        ++rows;
        if (seconds[i] == 0) seconds[i] = time;
        const double limit = INTERRUPTED * seconds[i];
        seconds[i] += NEW * ((time < limit ? time : limit) - seconds[i]);
    }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
