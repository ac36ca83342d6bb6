// What a call for a training step says, with the low-rank adapters in it: their matrices as panels, and the sums that are their gradients.
#pragma once
#include "between.h"
#ifdef HAVE_BF16
#include <omp.h>

namespace {

struct Part {  // one adapter on the outputs from `low` to before `high`
    int32_t low, high;
    int32_t first, ranks;  // where its ranks stand in `low`'s columns: from a multiple of 32 on
    float scale;
    const float *a, *b;    // [ranks][inputs], [high - low][ranks]
    float *da, *db;        // their gradients
};
struct Drop {  // rows from `low` to before `high` lose numbers for the adapters
    int32_t low, high;
    uint64_t start;
    int32_t threshold;
};
struct Call {
    const uint16_t *h, *norm, *residual, *bias, *forward, *backward, *g, *extra;
    uint16_t *y, *low, *dh, *inner, *dropped;
    const float* scales;  // of the ranks of each row, [rows][ranks], or null
    float* r;
    const Part* part;
    const Drop* drop;
    int32_t rows, inputs, outputs, gated, parts, drops, ranks;
    float eps;
};

constexpr int CHUNK = 128;       // rows whose activations, with a panel, stay in a core's own cache
constexpr size_t LARGE = 1 << 22;  // bytes of a result that no cache keeps until it is read

inline int up32(int n) { return (n + 31) / 32 * 32; }
const Drop* drop_of(const Call& c, int row) {
    for (const Drop* d = c.drop; d < c.drop + c.drops; d++)
        if (row >= d->low && row < d->high) return d;
    return nullptr;
}

// -------------------------------------------------------------------------------------------------------------- scratch
struct Scratch {
    Array<uint16_t> x, gated, g, slopes, dropped, low, turned, inner, dx, pairs;  // all but `turned` and `pairs` in pieces
    Array<uint32_t> masks;
    Array<float> da, db;
};
Scratch& scratch() {
    static thread_local Scratch mine;
    return mine;
}
template <class T> T* room(Array<T>& array, size_t n) {
    if (array.size() < n) array.resize(n);
    return array.data();
}

// An adapter's matrices as panels. `a` reads inputs and gives ranks, `b` reads ranks and gives outputs; `a_back` and `b_back` the other way.
struct Panels {
    Array<uint16_t> a, b;
};
void pack_forward(const Call& c, Panels& p) {
    uint16_t *a = room(p.a, (size_t)c.ranks * c.inputs), *b = room(p.b, (size_t)c.outputs * 32 * std::max(1, c.ranks / 32));
    memset(a, 0, (size_t)c.ranks * c.inputs * 2);
    for (const Part* part = c.part; part < c.part + c.parts; part++) {
        for (int j = 0; j < part->ranks; j++) {
            uint16_t* to = a + (size_t)((part->first + j) / 16) * 16 * c.inputs + (part->first + j) % 16 * 2;
            const float* from = part->a + (size_t)j * c.inputs;
            for (int k = 0; k < c.inputs; k += 2) to[k * 16] = rounded(from[k]), to[k * 16 + 1] = rounded(from[k + 1]);
        }
        const int wide = up32(part->ranks);
        for (int n = part->low; n < part->high; n++) {
            uint16_t* to = b + (size_t)(n / 16) * 16 * c.ranks + n % 16 * 2;
            const float* from = part->b + (size_t)(n - part->low) * part->ranks;
            for (int j = 0; j < wide; j++) to[j / 2 * 32 + j % 2] = j < part->ranks ? rounded(from[j]) : 0;
        }
    }
}
void pack_backward(const Call& c, Panels& p) {
    uint16_t *a = room(p.a, (size_t)c.ranks * c.inputs), *b = room(p.b, (size_t)c.ranks * c.outputs);
    memset(a, 0, (size_t)c.ranks * c.inputs * 2), memset(b, 0, (size_t)c.ranks * c.outputs * 2);
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int j = 0; j < part->ranks; j++) {
            const int rank = part->first + j;
            const float* from = part->a + (size_t)j * c.inputs;
            for (int k = 0; k < c.inputs; k++) a[(size_t)(k / 16) * 16 * c.ranks + rank / 2 * 32 + k % 16 * 2 + rank % 2] = rounded(from[k]);
            uint16_t* to = b + (size_t)(rank / 16) * 16 * c.outputs + rank % 16 * 2;
            for (int n = part->low; n < part->high; n++) to[n / 2 * 32 + n % 2] = rounded(part->b[(size_t)(n - part->low) * part->ranks + j]);
        }
}

struct Sums {  // of one thread: of A and of B, in blocks [ranks / 32][width / 32][32][32]
    bool used = false;
    Array<float> a, b;
};
// The sums of all threads, added up in their order, as the gradients of the parts.
void gather(const Call& c, const std::vector<Sums>& sums) {
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int j = 0; j < part->ranks; j++) {
            const int rank = part->first + j / 32 * 32, row = j % 32 * 32;
            for (int k = 0; k < c.inputs; k += 16) {
                __m512 sum = _mm512_setzero_ps();
                for (auto& one : sums)
                    if (one.used) sum += _mm512_loadu_ps(&one.a[(size_t)rank * c.inputs + (size_t)(k / 32) * 1024 + row + k % 32]);
                _mm512_storeu_ps(part->da + (size_t)j * c.inputs + k, sum);
            }
            for (int n = part->low; n < part->high; n++) {
                float sum = 0;
                for (auto& one : sums)
                    if (one.used) sum += one.b[(size_t)rank * c.outputs + (size_t)(n / 32) * 1024 + row + n % 32];
                part->db[(size_t)(n - part->low) * part->ranks + j] = sum;
            }
        }
}
// A thread's sums for a call, which begin at 0.
Sums& begin(const Call& c, std::vector<Sums>& sums, int thread) {
    Sums& mine = sums[thread];
    if (!mine.used && c.parts) {
        memset(room(mine.a, (size_t)c.ranks * c.inputs), 0, (size_t)c.ranks * c.inputs * 4);
        memset(room(mine.b, (size_t)c.ranks * c.outputs), 0, (size_t)c.ranks * c.outputs * 4);
        mine.used = true;
    }
    return mine;
}
std::vector<Sums>& none_used(std::vector<Sums>& sums) {
    if ((int)sums.size() < omp_get_max_threads()) sums.resize(omp_get_max_threads());
    for (auto& one : sums) one.used = false;
    return sums;
}

}  // namespace
#endif
