// What a call for a training step says, with the low-rank adapters in it: their matrices as panels, and the sums that are their gradients.
// `N` is the kind of all activations and frozen matrices, float or bf16; adapters and their gradients are fp32.
#pragma once
#include "between.h"
#include "panels.h"
#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif

namespace {

struct Part {  // one adapter on the outputs from `low` to before `high` of the rows from `from` to before `to`
    int32_t low, high, from, to;
    int32_t first, ranks;  // where its ranks stand: from a multiple of 32 on
    float scale;
    const float *a, *b;    // [ranks][inputs], [high - low][ranks]
    float *da, *db;        // their gradients
    bool meets(int row, int rows) const { return from < row + rows && to > row; }
};
struct Drop {  // rows from `low` to before `high` lose numbers for the adapters
    int32_t low, high;
    uint64_t start;
    int32_t threshold;
};
template <class N> struct Call {
    const N *h, *norm, *residual, *bias, *forward, *backward, *g, *extra;
    N *y, *low, *dh, *inner, *dropped;
    float* r;
    const Part* part;
    const Drop* drop;
    int32_t rows, inputs, outputs, gated, parts, drops, ranks;
    float eps;
};

template <class N> constexpr int CHUNK = sizeof(N) == 2 ? 128 : 64;  // rows whose activations, with a panel, stay in a core's own cache
constexpr size_t LARGE = 1 << 22;                                     // bytes of a result that no cache keeps until it is read

inline int up32(int n) { return (n + 31) / 32 * 32; }
template <class N> const Drop* drop_of(const Call<N>& c, int row) {
    for (const Drop* d = c.drop; d < c.drop + c.drops; d++)
        if (row >= d->low && row < d->high) return d;
    return nullptr;
}

// -------------------------------------------------------------------------------------------------------------- scratch
template <class N> struct Scratch {
    Array<N> x, gated, g, slopes, dropped, low, turned, inner, dx, pairs;  // all but `pairs` in pieces
    Array<uint32_t> masks;
};
template <class N> Scratch<N>& scratch() {
    static thread_local Scratch<N> mine;
    return mine;
}

// An adapter's matrices as panels: forward `a` reads inputs and gives ranks and `b` reads ranks and gives outputs, backward the other way.
template <class N> struct Panels {
    Array<N> a, b;
};
// Rows [count][width] that are a product's outputs, or its inputs, from where `to` is on; both are filled up to multiples of 32.
inline void as_outputs(const float* rows, int count, int width, float* to, size_t panel) {
    for (int row = 0; row < up32(count); row += 8)
        for (int k = 0; k < up32(width); k += 8) {
            const float* from = rows + (size_t)row * width + k;
            float* at = to + (size_t)(row / 16) * panel + (size_t)k * 16 + row % 16;
            if (row + 8 <= count && k + 8 <= width) turned(from, width, at, 16);
            else
                for (int i = 0; i < 8; i++)
                    for (int j = 0; j < 8; j++) at[j * 16 + i] = row + i < count && k + j < width ? from[(size_t)i * width + j] : 0.0f;
        }
}
inline void as_inputs(const float* rows, int count, int width, float* to, size_t panel) {
    for (int row = 0; row < up32(count); row++)
        for (int k = 0; k < up32(width); k += 16) {
            const float* from = rows + (size_t)row * width + k;
            float* at = to + (size_t)(k / 16) * panel + (size_t)row * 16;
            if (row < count && k + 16 <= width) store(at, load(from));
            else
                for (int j = 0; j < 16; j++) at[j] = row < count && k + j < width ? from[j] : 0.0f;
        }
}
#ifdef HAVE_BF16
// 32 numbers of a row as bf16, 0 beyond its width.
inline Halves some_of(const float* row, int k, int width) {
    const auto some = [&](int left) { return left >= 16 ? (__mmask16)0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : (__mmask16)0; };
    return halves(_mm512_maskz_loadu_ps(some(width - k), row + k), _mm512_maskz_loadu_ps(some(width - k - 16), row + k + 16));
}
inline void as_outputs(const float* rows, int count, int width, uint16_t* to, size_t panel) {
    for (int row = 0; row < up32(count); row += 16)
        for (int k = 0; k < width; k += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = row + i < count ? some_of(rows + (size_t)(row + i) * width, k, width) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (size_t)(row / 16) * panel + (k / 2 + i) * 32, r[i]);
        }
}
inline void as_inputs(const float* rows, int count, int width, uint16_t* to, size_t panel) {
    for (int row = 0; row < up32(count); row += 2)
        for (int k = 0; k < width; k += 32) {
            const Halves a = row < count ? some_of(rows + (size_t)row * width, k, width) : _mm512_setzero_si512();
            const Halves b = row + 1 < count ? some_of(rows + (size_t)(row + 1) * width, k, width) : _mm512_setzero_si512();
            uint16_t* at = to + (size_t)(k / 16) * panel + row / 2 * 32;
            _mm512_storeu_si512(at, by_turns(a, b, 0)), _mm512_storeu_si512(at + panel, by_turns(a, b, 1));
        }
}
#endif
template <class N> void pack_forward(const Call<N>& c, Panels<N>& p) {
    N *a = room(p.a, (size_t)c.ranks * c.inputs), *b = room(p.b, (size_t)c.outputs * c.ranks);
    for (const Part* one = c.part; one < c.part + c.parts; one++) {
        as_outputs(one->a, one->ranks, c.inputs, a + (size_t)one->first * c.inputs, (size_t)16 * c.inputs);
        as_outputs(one->b, one->high - one->low, one->ranks, b + (size_t)one->low * c.ranks + (size_t)one->first * 16, (size_t)16 * c.ranks);
    }
}
template <class N> void pack_backward(const Call<N>& c, Panels<N>& p) {
    N *a = room(p.a, (size_t)c.ranks * c.inputs), *b = room(p.b, (size_t)c.ranks * c.outputs);
    for (const Part* one = c.part; one < c.part + c.parts; one++) {
        as_inputs(one->a, one->ranks, c.inputs, a + (size_t)one->first * 16, (size_t)16 * c.ranks);
        as_inputs(one->b, one->high - one->low, one->ranks, b + (size_t)one->first * c.outputs + (size_t)one->low * 16, (size_t)16 * c.outputs);
    }
}

// Sums of one thread: of A and of B, in blocks [ranks / 32][width / 32][32][32]. Those of ranks that are not `begun` hold anything.
struct Sums {
    std::vector<char> begun;
    Array<float> a, b;
};
template <class N> std::vector<Sums>& fresh(const Call<N>& c, std::vector<Sums>& sums) {
    if ((int)sums.size() < omp_get_max_threads()) sums.resize(omp_get_max_threads());
    for (auto& one : sums) one.begun.assign(c.ranks / 32, 0);
    return sums;
}
template <class N> Sums& of_thread(const Call<N>& c, std::vector<Sums>& sums, int thread) {
    room(sums[thread].a, (size_t)c.ranks * c.inputs), room(sums[thread].b, (size_t)c.ranks * c.outputs);
    return sums[thread];
}
// The sums of all threads, added up in their order, as the gradients of the parts.
template <class N> void gather(const Call<N>& c, const std::vector<Sums>& sums) {
    alignas(64) float square[16][16], columns[16][16];
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int j = 0; j < part->ranks; j += 16) {
            const int rank = part->first + j / 32 * 32, row = j % 32, some = std::min(16, part->ranks - j);
            const auto total = [&](const Array<float> Sums::* which, size_t at) {
                Vec sum = all(0.0f);
                for (auto& one : sums)
                    if (one.begun[rank / 32]) sum += load((one.*which).data() + at);
                return sum;
            };
            for (int i = 0; i < some; i++)
                for (int k = 0; k < c.inputs; k += 16) {
                    const size_t at = (size_t)rank * c.inputs + (size_t)(k / 32) * 1024 + (row + i) * 32 + k % 32;
                    store(part->da + (size_t)(j + i) * c.inputs + k, total(&Sums::a, at));
                }
            for (int n = part->low; n < part->high; n += 16) {
                for (int i = 0; i < 16; i++) store(square[i], total(&Sums::b, (size_t)rank * c.outputs + (size_t)(n / 32) * 1024 + (row + i) * 32 + n % 32));
                for (int i = 0; i < 16; i += 8)
                    for (int k = 0; k < 16; k += 8) turned(&square[i][k], 16, &columns[k][i], 16);
                float* to = part->db + (size_t)(n - part->low) * part->ranks + j;
                for (int i = 0; i < 16; i++) memcpy(to + (size_t)i * part->ranks, columns[i], some * sizeof(float));
            }
        }
}

}  // namespace
