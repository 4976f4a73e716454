// The order of the phases. Between two of them lies one dependency between CTAs, carried by the packets alone.
#pragma once

#include "pixelcnn_sampler/cuda_layers.h"

namespace fastvid::sampler {

// A phase of layer l at column x, and how to go on to the next one.
struct Step {
    Phase phase = TAPS;
    int l = 0, x = 0;

    FASTVID_BOTH void advance(const Row& row) {
        const bool last = l + 1 == row.L, attends = row.attention[l] >= 0;
        if ((phase == OUT && !attends) || phase == ATT_OUT) {
            phase = last ? HEAD1 : TAPS;
            l = last ? l : l + 1;
        } else if (phase == SETTLE) {
            phase = TAPS, l = 0, ++x;
        } else {
            phase = (Phase)(phase + 1);
        }
    }
};

// One phase of one CTA. False: something awaited did not come.
template <class W>
FASTVID_BOTH bool run_phase(W& w, const Step& step) {
    if (step.phase == ATTEND) return attend(w, w.row.attention[step.l], step.x);
    if (step.phase == SETTLE) return Settle<W>(w, step.x).run();
    Product<W> product(w, step.phase, step.l, step.x);
    return w.run(product);
}

}  // namespace fastvid::sampler
