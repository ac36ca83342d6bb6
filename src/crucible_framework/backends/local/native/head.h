// Log-probs of targets under the head's matrix, and their gradient, in one walk over the logits, of which no more exist than a chunk's.
#pragma once
#include "chunks.h"

namespace {

constexpr int VOCABULARY = 1024;  // outputs whose probabilities, for a chunk of rows, stay in a core's own cache

// The sum of exp of a row's logits above the largest one so far.
template <class N> struct ExpSum {
    float top = -INFINITY;
    Vec sum = all(0.0f);
    // Takes 32 logits; gives exp of each above `top`.
    Raw<N> add(Vec a, Vec b) {
        const Vec most = larger(a, b);
        if (exceeds(most, top)) {
            const float higher = highest(most);
            sum *= exponential<N>(all(top - higher)), top = higher;
        }
        a = exponential<N>(a - top), b = exponential<N>(b - top), sum += a + b;
        return as<N>(a, b);
    }
    float log() const { return top + std::log(::sum(sum)); }
};

// log p of one target per row; with `dh` the gradient of each with respect to its h.
template <class N> void score_rows(const Call<N>& c, const int64_t* targets, float* scores, int from, int rows) {
    auto& s = scratch<N>();
    static thread_local Array<N> kept_exps;
    static thread_local Array<float> kept_tops, total;
    alignas(64) float block[BLOCK * BLOCK];
    const int blocks = (c.outputs / 32 + 15) / 16 * 16;
    const N* x = cut(c.h + (size_t)from * c.inputs, rows, c.inputs, room(s.x, (size_t)CHUNK<N> * c.inputs));
    N* exps = room(kept_exps, c.dh ? (size_t)CHUNK<N> * c.outputs : 0);
    float* tops = room(kept_tops, (size_t)CHUNK<N> * blocks);  // that the exps of a row's 32 logits are above, then what they are multiplied with
    ExpSum<N> sums[CHUNK<N>];
    float mine[CHUNK<N>];
    for (int n = 0; n < c.outputs; n += 32)
        for (int t = 0; t < rows; t += 32) {
            one_block<N>(frozen(x, t, rows, c.forward, n, c.inputs), 32, rows - t, block);
            for (int i = t; i < std::min(t + 32, rows); i++) {
                const float* found = block + (i - t) * 32;
                const int64_t target = targets[from + i] - n;
                if (target >= 0 && target < 32) mine[i] = found[target];
                const auto above = sums[i].add(load(found), load(found + 16));
                if (c.dh) set(exps + place(i, n, c.outputs), above);
                tops[i * blocks + n / 32] = sums[i].top;
            }
        }
    for (int i = 0; i < rows; i++) {
        const float whole = sums[i].log();
        scores[from + i] = mine[i] - whole;
        for (int n = 0; c.dh && n < blocks; n += 16) {
            float* to = tops + i * blocks + n;
            store(to, -exponential<N>(load(to) - whole));
        }
    }
    if (!c.dh) return;
    float* dx = room(total, (size_t)CHUNK<N> * c.inputs);  // blocks [inputs / 32][rows / 32][32][32]
    N* slope = room(s.g, (size_t)CHUNK<N> * VOCABULARY);
    for (int low = 0; low < c.outputs; low += VOCABULARY) {
        const int width = std::min(VOCABULARY, c.outputs - low);
        for (int i = 0; i < up32(rows); i++) {
            for (int n = 0; n < width; n += 32) {
                auto v = zeros<N>();
                if (i < rows) {
                    const auto a = raw(exps + place(i, low + n, c.outputs));
                    const float by = tops[i * blocks + (low + n) / 32];
                    v = as<N>(lower(a) * by, upper(a) * by);
                }
                set(slope + place(i, n, width), v);
            }
            const int64_t target = i < rows ? targets[from + i] - low : -1;
            if (target >= 0 && target < width) slope[place(i, (int)target / 32 * 32, width) + target % 32] = near<N>(-std::expm1(scores[from + i]));
        }
        for (int k = 0; k < c.inputs; k += 32)
            for (int t = 0; t < rows; t += 32) {
                const N* panel = c.backward + (size_t)k * c.outputs + (size_t)low * 16;
                one_block<N>(in_pieces(slope + (size_t)t * width, width, panel, (size_t)16 * c.outputs, width), 32, rows - t, dx + (size_t)k * CHUNK<N> + (size_t)t * 32, low > 0);
            }
    }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < c.inputs; k += 32) {
            const float* found = dx + (size_t)k * CHUNK<N> + (size_t)i * 32;
            put(c.dh + (size_t)(from + i) * c.inputs + k, load(found), load(found + 16));
        }
}

}  // namespace
