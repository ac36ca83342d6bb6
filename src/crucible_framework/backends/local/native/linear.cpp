// A frozen matrix with low-rank adapters beside it, its norm, gate, dropout and residual: the forward and the backward pass of each as one
// walk over chunks of rows that stay in the processor's own cache. bf16 with fp32 sums. Python's side is linear.py, whose callers have
// torch code for the same numbers up to rounding. Where the processor has no bf16 products this file gives nothing.
#include "blocks.h"
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

constexpr int CHUNK = 256;
typedef __m512i Halves;

inline Halves raw(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline __m512 lower(Halves v) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16); }
inline __m512 upper(Halves v) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16); }
inline void put(uint16_t* p, __m512 low, __m512 high) { _mm512_storeu_si512(p, (Halves)_mm512_cvtne2ps_pbh(high, low)); }
inline int up32(int n) { return (n + 31) / 32 * 32; }

// --------------------------------------------------------------------------------------------------- what stands before
inline __m512 logistic(__m512 x) { return (__m512)_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f) + (__m512)exp16((Lane)(-x))); }

void norm_row(const uint16_t* x, const uint16_t* w, uint16_t* y, int width, float scale) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int i = 0; i < width; i += 32) {
        const Halves a = raw(x + i), b = raw(w + i);
        put(y + i, lower(a) * by * lower(b), upper(a) * by * upper(b));
    }
}
float inverse_rms(const uint16_t* x, int width, float eps) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int i = 0; i < width; i += 32) {
        const Halves a = raw(x + i);
        low = _mm512_fmadd_ps(lower(a), lower(a), low), high = _mm512_fmadd_ps(upper(a), upper(a), high);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(low + high) / width + eps);
}
// `extra` is added: the gradient that comes through the residual.
void norm_back_row(const uint16_t* g, const uint16_t* x, const uint16_t* w, const uint16_t* extra, uint16_t* out, int width, float scale) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int i = 0; i < width; i += 32) {
        const Halves u = raw(g + i), a = raw(x + i), b = raw(w + i);
        low = _mm512_fmadd_ps(lower(u) * lower(b), lower(a), low), high = _mm512_fmadd_ps(upper(u) * upper(b), upper(a), high);
    }
    const __m512 by = _mm512_set1_ps(scale), slope = _mm512_set1_ps(-_mm512_reduce_add_ps(low + high) * scale * scale * scale / width);
    for (int i = 0; i < width; i += 32) {
        const Halves u = raw(g + i), a = raw(x + i), b = raw(w + i);
        __m512 first = lower(u) * lower(b) * by + lower(a) * slope, second = upper(u) * upper(b) * by + upper(a) * slope;
        if (extra) first += lower(raw(extra + i)), second += upper(raw(extra + i));
        put(out + i, first, second);
    }
}
void gate_row(const uint16_t* both, uint16_t* y, int width) {
    for (int i = 0; i < width; i += 32) {
        const Halves a = raw(both + i), b = raw(both + width + i);
        put(y + i, lower(a) * logistic(lower(a)) * lower(b), upper(a) * logistic(upper(a)) * upper(b));
    }
}
inline void gate_slope(__m512 g, __m512 a, __m512 b, __m512& da, __m512& db) {
    const __m512 s = logistic(a), one = _mm512_set1_ps(1.0f);
    da = g * b * s * (one + a * (one - s)), db = g * a * s;
}
void gate_back_row(const uint16_t* g, const uint16_t* both, uint16_t* out, int width) {
    for (int i = 0; i < width; i += 32) {
        const Halves u = raw(g + i), a = raw(both + i), b = raw(both + width + i);
        __m512 da[2], db[2];
        gate_slope(lower(u), lower(a), lower(b), da[0], db[0]), gate_slope(upper(u), upper(a), upper(b), da[1], db[1]);
        put(out + i, da[0], da[1]), put(out + width + i, db[0], db[1]);
    }
}

// -------------------------------------------------------------------------------------------------------------- dropout
// Which of 32 numbers stay: 16 random bits each, as train.cpp's `drop` has them; `word` is the first of 8 words of the counter.
inline __mmask32 kept(uint64_t start, uint64_t word, int threshold) {
    const __m512i steps = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8), golden = _mm512_set1_epi64(0x9E3779B97F4A7C15ull);
    __m512i z = _mm512_mullo_epi64(_mm512_add_epi64(_mm512_set1_epi64(word), steps), golden);
    z = _mm512_add_epi64(z, _mm512_set1_epi64(start));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9ull));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EBull));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    return _mm512_cmpge_epu16_mask(z, _mm512_set1_epi16((short)threshold));
}
const Drop* drop_of(const Call& c, int row) {
    for (const Drop* d = c.drop; d < c.drop + c.drops; d++)
        if (row >= d->low && row < d->high) return d;
    return nullptr;
}

// -------------------------------------------------------------------------------------------------------------- scratch
struct Scratch {
    Array<uint16_t> x, dropped, low, turned, inner, dx, pairs, tail;
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
Panels& panels() {
    static thread_local Panels mine;
    return mine;
}
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

// --------------------------------------------------------------------------------------------------------------- chunks
template <class F> void in_chunks(const Call& c, const F& work) {
    const int threads = omp_get_max_threads();
    int count = (c.rows + CHUNK - 1) / CHUNK;
    count = (count + threads - 1) / threads * threads;
    const int size = up32((c.rows + count - 1) / count);
    count = (c.rows + size - 1) / size;
#pragma omp parallel if (count > 1)
    {
        open_blocks();
#pragma omp for schedule(static)
        for (int i = 0; i < count; i++) work(i * size, std::min(size, c.rows - i * size), omp_get_thread_num());
        close_blocks();
    }
}

// Rows of a matrix as products read them: those of the last block, of which fewer than 32 may be there, are a copy's.
struct Left {
    const uint16_t* x;
    size_t stride;
    const uint16_t* tail;  // rows of the last block, or null
    int full;              // rows before it
    const uint16_t* at(int row) const { return tail && row >= full ? tail : x + row * stride; }
    Left(const uint16_t* x, size_t stride, int rows, Array<uint16_t>& copy) : x(x), stride(stride), tail(nullptr), full(rows / 32 * 32) {
        if (full == rows) return;
        uint16_t* to = room(copy, 32 * stride);
        memcpy(to, x + full * stride, (rows - full) * stride * 2);
        tail = to;
    }
    Left(const uint16_t* x, size_t stride) : x(x), stride(stride), tail(nullptr), full(0) {}
};

// What the matrix reads of some rows: [rows][inputs], and r where it is to be found.
Left enter(const Call& c, int from, int rows, Scratch& s, bool again) {
    const int wide = c.gated ? 2 * c.inputs : c.inputs;
    const uint16_t* h = c.h + (size_t)from * wide;
    if (!c.norm && !c.gated) return Left(h, c.inputs, rows, s.tail);
    uint16_t* x = room(s.x, (size_t)CHUNK * c.inputs);
    for (int t = 0; t < rows; t++) {
        if (c.gated) {
            gate_row(h + (size_t)t * wide, x + (size_t)t * c.inputs, c.inputs);
            continue;
        }
        if (!again) c.r[from + t] = inverse_rms(h + (size_t)t * wide, wide, c.eps);
        norm_row(h + (size_t)t * wide, c.norm, x + (size_t)t * c.inputs, wide, c.r[from + t]);
    }
    return Left(x, c.inputs);
}

// What the adapters read; where numbers are dropped, a copy and which of them stay.
Left dropped(const Call& c, int from, int rows, const Left& x, Scratch& s) {
    if (!c.drops) return x;
    uint16_t* to = room(s.dropped, (size_t)CHUNK * c.inputs);
    uint32_t* masks = room(s.masks, (size_t)CHUNK * c.inputs / 32);
    for (int t = 0; t < rows; t++) {
        const Drop* d = drop_of(c, from + t);
        const uint16_t* row = x.at(t / 32 * 32) + t % 32 * x.stride;
        for (int k = 0; k < c.inputs; k += 32) {
            const __mmask32 mask = d ? kept(d->start, ((uint64_t)(from + t - d->low) * c.inputs + k) / 4, d->threshold) : 0xffffffffu;
            masks[(t * c.inputs + k) / 32] = mask;
            _mm512_storeu_si512(to + (size_t)t * c.inputs + k, _mm512_maskz_mov_epi16(mask, raw(row + k)));
        }
    }
    return Left(to, c.inputs);
}

// [32][32] numbers to bf16 ranks of rows, each with its factor.
void put_ranks(const Call& c, const Part& part, int from, int rows, int first, const float* block, uint16_t* to) {
    for (int t = 0; t < rows; t++) {
        __m512 by[2] = {_mm512_set1_ps(part.scale), _mm512_set1_ps(part.scale)};
        const int left = part.ranks - first;
        if (c.scales)
            for (int i = 0; i < 2; i++) {
                const __mmask16 some = left >= 16 * i + 16 ? 0xffff : left > 16 * i ? (__mmask16)((1 << (left - 16 * i)) - 1) : 0;
                by[i] = _mm512_maskz_loadu_ps(some, c.scales + (size_t)(from + t) * part.ranks + first + 16 * i);
            }
        const __m512 high = left > 16 ? _mm512_loadu_ps(block + t * 32 + 16) * by[1] : _mm512_setzero_ps();
        put(to + (size_t)t * c.ranks + part.first + first, _mm512_loadu_ps(block + t * 32) * by[0], high);
    }
}

void forward_rows(const Call& c, int from, int rows, const Panels& p) {
    Scratch& s = scratch();
    alignas(64) float block[BLOCK * BLOCK];
    const Left x = enter(c, from, rows, s, false);
    uint16_t* low = room(s.low, (size_t)CHUNK * std::max(c.ranks, 1));
    if (c.parts) {
        const Left read = dropped(c, from, rows, x, s);
        for (const Part* part = c.part; part < c.part + c.parts; part++)
            for (int first = 0; first < part->ranks; first += 32)
                for (int t = 0; t < rows; t += 32) {
                    const Term term{read.at(t), read.stride, p.a.data() + (size_t)(part->first + first) * c.inputs, (size_t)16 * c.inputs, c.inputs / 2};
                    if (part->ranks - first > 16) product<2>(&term, 1, rows - t, block, false);
                    else product<1>(&term, 1, rows - t, block, false);
                    put_ranks(c, *part, from + t, std::min(32, rows - t), first, block, low + (size_t)t * c.ranks);
                }
        memcpy(c.low + (size_t)from * c.ranks, low, (size_t)rows * c.ranks * 2);
    }
    const Part* part = c.part;
    for (int n = 0; n < c.outputs; n += 32) {
        while (part < c.part + c.parts && n >= part->high) part++;
        const bool adapted = part < c.part + c.parts && n >= part->low;
        const uint16_t* panel = c.forward + (size_t)n * c.inputs;
        for (int t = 0; t < rows; t += 32) {
            Term terms[2] = {{x.at(t), x.stride, panel, (size_t)16 * c.inputs, c.inputs / 2}, {}};
            if (adapted) terms[1] = {low + (size_t)t * c.ranks + part->first, (size_t)c.ranks, p.b.data() + (size_t)n * c.ranks, (size_t)16 * c.ranks, up32(part->ranks) / 2};
            product<2>(terms, adapted ? 2 : 1, rows - t, block, false);
            for (int i = 0; i < std::min(32, rows - t); i++) {
                const size_t place = (size_t)(from + t + i) * c.outputs + n;
                __m512 first = _mm512_load_ps(block + i * 32), second = _mm512_load_ps(block + i * 32 + 16);
                if (c.bias) first += lower(raw(c.bias + n)), second += upper(raw(c.bias + n));
                if (c.residual) first += lower(raw(c.residual + place)), second += upper(raw(c.residual + place));
                put(c.y + place, first, second);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- backward
// `turned` [32][up32(rows)]: 32 columns of [rows][stride], 0 beyond the rows.
void turn(const uint16_t* x, size_t stride, int rows, uint16_t* turned) {
    const int width = up32(rows);
    for (int t = 0; t < width; t++)
        for (int j = 0; j < 32; j++) turned[j * width + t] = t < rows ? x[t * stride + j] : 0;
}
// Sums over rows of ranks times columns, added to blocks [columns / 32][32 ranks][32].
void add_sums(const uint16_t* turned, int ranks, const Left& wide, int columns, int rows, float* sums, Scratch& s) {
    const int width = up32(rows);
    uint16_t* pairs = room(s.pairs, (size_t)CHUNK * 32);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int n = 0; n < columns; n += 32) {
        for (int t = 0; t < width; t += 2) {
            const uint16_t* row = wide.at(t / 32 * 32) + t % 32 * wide.stride + n;
            const Halves a = t < rows ? raw(row) : _mm512_setzero_si512(), b = t + 1 < rows ? raw(row + wide.stride) : _mm512_setzero_si512();
            const Halves even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
            _mm512_storeu_si512(pairs + t * 16, _mm512_permutex2var_epi64(even, first, odd));
            _mm512_storeu_si512(pairs + width * 16 + t * 16, _mm512_permutex2var_epi64(even, second, odd));
        }
        const Term term{turned, (size_t)width, pairs, (size_t)width * 16, width / 2};
        product<2>(&term, 1, ranks, sums + (size_t)n * 32, true);
    }
}

void backward_rows(const Call& c, int from, int rows, const Panels& p, float* da, float* db) {
    Scratch& s = scratch();
    alignas(64) float block[BLOCK * BLOCK];
    static thread_local Array<uint16_t> tail;
    const Left g(c.g + (size_t)from * c.outputs, c.outputs, rows, tail);
    uint16_t* inner = room(s.inner, (size_t)CHUNK * std::max(c.ranks, 1));
    if (c.parts) {
        const Left read = dropped(c, from, rows, enter(c, from, rows, s, true), s);
        uint16_t* turned = room(s.turned, (size_t)CHUNK * 32);
        for (const Part* part = c.part; part < c.part + c.parts; part++)
            for (int first = 0; first < part->ranks; first += 32) {
                const int rank = part->first + first, count = std::min(32, part->ranks - first);
                for (int t = 0; t < rows; t += 32) {
                    const Term term{g.at(t) + part->low, g.stride, p.b.data() + (size_t)rank * c.outputs + (size_t)part->low * 16, (size_t)16 * c.outputs, (part->high - part->low) / 2};
                    if (count > 16) product<2>(&term, 1, rows - t, block, false);
                    else product<1>(&term, 1, rows - t, block, false);
                    put_ranks(c, *part, from + t, std::min(32, rows - t), first, block, inner + (size_t)t * c.ranks);
                }
                turn(inner + rank, c.ranks, rows, turned);
                add_sums(turned, count, read, c.inputs, rows, da + (size_t)rank * c.inputs, s);
                turn(c.low + (size_t)from * c.ranks + rank, c.ranks, rows, turned);
                Left mine = g;
                mine.x += part->low;
                if (mine.tail) mine.tail += part->low;
                add_sums(turned, count, mine, part->high - part->low, rows, db + (size_t)rank * c.outputs + (size_t)part->low * 32, s);
            }
        if (c.inner) memcpy(c.inner + (size_t)from * c.ranks, inner, (size_t)rows * c.ranks * 2);
        if (c.dropped)
            for (int t = 0; t < rows; t++) memcpy(c.dropped + (size_t)(from + t) * c.inputs, read.at(t / 32 * 32) + t % 32 * read.stride, (size_t)c.inputs * 2);
    }
    if (!c.dh) return;
    const bool plain = !c.norm && !c.gated;
    uint16_t* dx = plain ? c.dh + (size_t)from * c.inputs : room(s.dx, (size_t)CHUNK * c.inputs);
    for (int k = 0; k < c.inputs; k += 32)
        for (int t = 0; t < rows; t += 32) {
            const int here = std::min(32, rows - t);
            const Term terms[2] = {{g.at(t), g.stride, c.backward + (size_t)k * c.outputs, (size_t)16 * c.outputs, c.outputs / 2},
                                   {inner + (size_t)t * c.ranks, (size_t)c.ranks, p.a.data() + (size_t)k * c.ranks, (size_t)16 * c.ranks, c.ranks / 2}};
            if (c.parts && c.drops) {
                product<2>(terms + 1, 1, here, block, false);
                for (int i = 0; i < here; i++) {
                    const uint32_t mask = s.masks[((t + i) * c.inputs + k) / 32];
                    float* row = block + i * 32;
                    _mm512_store_ps(row, _mm512_maskz_loadu_ps((__mmask16)mask, row));
                    _mm512_store_ps(row + 16, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + 16));
                }
                product<2>(terms, 1, here, block, true);
            } else {
                product<2>(terms, c.parts ? 2 : 1, here, block, false);
            }
            for (int i = 0; i < here; i++) put(dx + (size_t)(t + i) * c.inputs + k, _mm512_load_ps(block + i * 32), _mm512_load_ps(block + i * 32 + 16));
        }
    for (int t = 0; t < rows && !plain; t++) {
        const size_t row = from + t, wide = c.gated ? 2 * (size_t)c.inputs : c.inputs;
        const uint16_t *up = dx + (size_t)t * c.inputs, *h = c.h + row * wide;
        if (c.gated) gate_back_row(up, h, c.dh + row * wide, c.inputs);
        else norm_back_row(up, h, c.norm, c.extra ? c.extra + row * wide : nullptr, c.dh + row * wide, c.inputs, c.r[row]);
    }
}

// The blocks of all threads, added up in their order, as the gradients of a part.
void gather(const Call& c, const Part& part, const std::vector<std::vector<Array<float>>>& sums) {
    for (int j = 0; j < part.ranks; j++) {
        const int rank = part.first + j / 32 * 32, row = j % 32 * 32;
        float* da = part.da + (size_t)j * c.inputs;
        for (int k = 0; k < c.inputs; k += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (auto& one : sums)
                if (!one.empty()) sum += _mm512_loadu_ps(&one[0][(size_t)rank * c.inputs + (size_t)(k / 32) * 1024 + row + k % 32]);
            _mm512_storeu_ps(da + k, sum);
        }
        for (int n = part.low; n < part.high; n++) {
            float sum = 0;
            for (auto& one : sums)
                if (!one.empty()) sum += one[1][(size_t)rank * c.outputs + (size_t)(n / 32) * 1024 + row + n % 32];
            part.db[(size_t)(n - part.low) * part.ranks + j] = sum;
        }
    }
}

}  // namespace

// A matrix [outputs][inputs] as panels of its outputs, and of its inputs.
extern "C" void crucible_panels(const uint16_t* weight, uint16_t* forward, uint16_t* backward, int outputs, int inputs) {
    for (int n = 0; n < outputs; n++)
        for (int k = 0; k < inputs; k++) {
            const uint16_t one = weight[(size_t)n * inputs + k];
            forward[(size_t)(n / 16) * 16 * inputs + k / 2 * 32 + n % 16 * 2 + k % 2] = one;
            backward[(size_t)(k / 16) * 16 * outputs + n / 2 * 32 + k % 16 * 2 + n % 2] = one;
        }
}
extern "C" void crucible_linear(const Call* c) {
    Panels& p = panels();
    if (c->parts) pack_forward(*c, p);
    in_chunks(*c, [&](int from, int rows, int) { forward_rows(*c, from, rows, p); });
}
extern "C" void crucible_linear_back(const Call* c) {
    Panels& p = panels();
    if (c->parts) pack_backward(*c, p);
    static thread_local std::vector<std::vector<Array<float>>> sums;
    auto& mine = sums;
    mine.assign(omp_get_max_threads(), {});
    in_chunks(*c, [&](int from, int rows, int thread) {
        auto& own = mine[thread];
        if (own.empty() && c->parts) own = {Array<float>((size_t)c->ranks * c->inputs), Array<float>((size_t)c->ranks * c->outputs)};
        backward_rows(*c, from, rows, p, c->parts ? own[0].data() : nullptr, c->parts ? own[1].data() : nullptr);
    });
    for (const Part* part = c->part; part < c->part + c->parts; part++) gather(*c, *part, mine);
}
#endif
