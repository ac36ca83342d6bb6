// Products of blocks of 32 rows with 32 or 16 outputs, with fp32 sums: what training multiplies with. In fp32 everywhere, in bf16 where
// AVX-512's dot products or AMX tiles are there. A sum's order depends on its length only, never on who else is in the block.
#pragma once
#include "rows.h"

constexpr int BLOCK = 32;

// Rows stand in pieces [rows / 16][width / 32][16][32]: where a row's number k is.
static inline size_t place(int row, int k, int width) { return (size_t)(row / 16) * 16 * width + (size_t)(k / 32) * 512 + row % 16 * 32; }

// ----------------------------------------------------------------------------------------------------------------- fp32
// A product's right side is kept in panels of 16 outputs, [inputs][16 outputs]; the left side is rows in pieces, of which 32 must be
// readable, whatever they hold.
struct FloatTerm {
    const float *x, *w;
    size_t lower, panel;           // numbers from row 0 to row 16, and from one panel to the next
    int inputs;                    // a multiple of 16
    const float* ahead = nullptr;  // what is read next: `lines` of the cache are fetched for every 32 inputs
    int lines = 0;
};
static inline FloatTerm in_pieces(const float* x, int width, const float* w, size_t panel, int inputs) { return {x, w, (size_t)16 * width, panel, inputs}; }

// Rows of a piece, and panels, whose sums the registers hold.
#if defined(__AVX512F__)
constexpr int FIRST = 8, REST = 8, BROAD = 2;
#else
constexpr int FIRST = 6, REST = 5, BROAD = 1;
#endif
constexpr int NEAR = 128;  // inputs whose rows and panels stay in the first cache

template <int ROWS, int PANELS> static __attribute__((noinline)) void by_floats(const float* x, const float* w, size_t panel, int inputs, float* c, bool add) {
    Vec acc[ROWS][PANELS];
    clear(acc);
    if (add) unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { acc[r][p] = load(c + r * BLOCK + p * 16); }); });
    for (; inputs > 0; inputs -= 32, x += 512)
        for (const float *at = x, *end = x + std::min(inputs, 32); at < end; at++, w += 16) {  // a constant from row to row: indexed addresses take twice the time
            Vec v[PANELS];
            unrolled<PANELS>([&](auto p) INLINED { v[p] = load(w + p * panel); });
            unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { acc[r][p] += v[p] * at[r * 32]; }); });
        }
    unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { store(c + r * BLOCK + p * 16, acc[r][p]); }); });
}

// c[32][32], of which the first 16 columns with one panel: the sum of the terms, added to what is there where `add` says so. Of rows from
// `rows` on c may hold anything, and x too.
template <int PANELS> static inline void product(const FloatTerm* terms, int count, int rows, float* c, bool add) {
    if (count == 0 && !add) memset(c, 0, BLOCK * BLOCK * sizeof(float));
    constexpr int broad = PANELS < BROAD ? PANELS : BROAD;
    const int pieces = rows > 16 ? 2 : 1, calls = PANELS / broad * pieces * (1 + (16 - FIRST) / REST);
    for (const FloatTerm* t = terms; t < terms + count; t++) {
        const float* ahead = t->ahead;
        for (int from = 0; from < t->inputs; from += NEAR, add = true) {
            const int inputs = std::min(NEAR, t->inputs - from), lines = (t->lines * inputs / 32 + calls - 1) / calls;
            for (int p = 0; p < PANELS; p += broad)
                for (int piece = 0; piece < pieces; piece++) {
                    const float *x = t->x + (size_t)from * 16 + piece * t->lower, *w = t->w + p * t->panel + (size_t)from * 16;
                    float* to = c + piece * 16 * BLOCK + p * 16;
                    for (int r = 0; r < std::min(16, rows - piece * 16); r += r ? REST : FIRST) {
                        for (int i = 0; i < lines; i++, ahead += 16) __builtin_prefetch(ahead, 0, 2);
                        if (r == 0) by_floats<FIRST, broad>(x, w, t->panel, inputs, to, add);
                        else by_floats<REST, broad>(x + r * 32, w, t->panel, inputs, to + r * BLOCK, add);
                    }
                }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------------- bf16

#ifdef HAVE_BF16

// A product's right side is kept in panels of 16 outputs, [pairs of inputs][16 outputs][2]: what a tile reads, and a vector of dot products.
// The left side is rows of bf16, of which 32 must be readable, whatever they hold: row after row, or, which is read faster, in pieces.
struct Term {
    const uint16_t* x;
    size_t stride;  // numbers from one row to the next
    const uint16_t* w;
    size_t panel;   // numbers from one panel to the next
    int pairs;      // a multiple of 16
    size_t step = 32, lower = 0;      // numbers from 32 inputs of a row to the next, and from row 0 to row 16: 0 where all rows have one stride
    const uint16_t* ahead = nullptr;  // what is read next: `lines` of the cache are fetched for every 16 pairs
    int lines = 0;
};
static inline Term in_pieces(const uint16_t* x, int width, const uint16_t* w, size_t panel, int inputs) {
    return {x, 32, w, panel, inputs / 2, 512, (size_t)16 * width};
}

static inline bool tiles() {
#ifdef HAVE_AMX
    return allow_tiles();
#else
    return false;
#endif
}
static inline __m512i halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// A thread calls it before its first product, and `close` after its last: tiles that are held slow down every switch to another thread.
static inline void open_blocks() {
#ifdef HAVE_AMX
    if (tiles()) open_tiles();
#endif
}
static inline void close_blocks() {
#ifdef HAVE_AMX
    if (tiles()) _tile_release();
#endif
}

#ifdef HAVE_AMX
template <int PANELS, bool LOWER> static inline void by_tiles(const Term* terms, int count, float* c, bool add) {
    constexpr int row = BLOCK * sizeof(float);
    written();
    if (add) {
        _tile_loadd(0, c, row);
        if (LOWER) _tile_loadd(1, c + 16 * BLOCK, row);
        if (PANELS == 2) _tile_loadd(2, c + 16, row);
        if (PANELS == 2 && LOWER) _tile_loadd(3, c + 16 * BLOCK + 16, row);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (const Term* t = terms; t < terms + count; t++) {
        const uint16_t *x0 = t->x, *x1 = t->x + (t->lower ? t->lower : 16 * t->stride), *w0 = t->w, *w1 = t->w + t->panel;
        const size_t bytes = t->stride * 2, step = t->step;
        const uint16_t* ahead = t->ahead;
        for (int s = 0; s < t->pairs; s += 16, x0 += step, x1 += step, w0 += 512, w1 += 512) {
            _tile_loadd(4, x0, bytes);
            _tile_loadd(6, w0, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (LOWER) { _tile_loadd(5, x1, bytes); _tile_dpbf16ps(1, 5, 6); }
            if (PANELS == 2) { _tile_loadd(7, w1, 64); _tile_dpbf16ps(2, 4, 7); }
            if (PANELS == 2 && LOWER) _tile_dpbf16ps(3, 5, 7);
            for (int i = 0; i < t->lines; i++, ahead += 32) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
        }
    }
    _tile_stored(0, c, row);
    if (LOWER) _tile_stored(1, c + 16 * BLOCK, row);
    if (PANELS == 2) _tile_stored(2, c + 16, row);
    if (PANELS == 2 && LOWER) _tile_stored(3, c + 16 * BLOCK + 16, row);
}
#endif

template <int ROWS, int PANELS> static inline void by_dots(const Term* terms, int count, int from, float* c, bool add) {
    __m512 acc[ROWS][PANELS];
    clear(acc);
    c += from * BLOCK;
    if (add) unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { acc[r][p] = _mm512_loadu_ps(c + r * BLOCK + p * 16); }); });
    for (const Term* t = terms; t < terms + count; t++) {
        const uint16_t *x = t->x + (t->lower && from >= 16 ? t->lower + (from - 16) * t->stride : from * t->stride), *w = t->w;
        const size_t stride = t->stride, panel = t->panel;
        const uint16_t* ahead = t->ahead;
        for (int s = 0; s < t->pairs; s += 16, x += t->step) {
            for (int k = 0; k < 16; k++, w += 32) {
                __m512bh v[PANELS];
                unrolled<PANELS>([&](auto p) INLINED { v[p] = (__m512bh)_mm512_loadu_si512(w + p * panel); });
                unrolled<ROWS>([&](auto r) INLINED {
                    const __m512bh one = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(x + r * stride + k * 2));
                    unrolled<PANELS>([&](auto p) INLINED { acc[r][p] = _mm512_dpbf16_ps(acc[r][p], one, v[p]); });
                });
            }
            if (from == 0)
                for (int i = 0; i < t->lines; i++, ahead += 32) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
        }
    }
    unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { _mm512_storeu_ps(c + r * BLOCK + p * 16, acc[r][p]); }); });
}

// c[32][32], of which the first 16 columns with one panel: the sum of the terms, added to what is there where `add` says so. Of rows from
// `rows` on c may hold anything, and x too.
template <int PANELS> static inline void product(const Term* terms, int count, int rows, float* c, bool add) {
#ifdef HAVE_AMX
    if (tiles()) {
        if (rows > 16) by_tiles<PANELS, true>(terms, count, c, add);
        else by_tiles<PANELS, false>(terms, count, c, add);
        return;
    }
#endif
    for (int r = 0; r < std::min(rows, BLOCK); r += rows - r >= 8 ? 8 : 4) {  // none lies across two pieces
        if (rows - r >= 8) by_dots<8, PANELS>(terms, count, r, c, add);
        else by_dots<4, PANELS>(terms, count, r, c, add);
    }
}
#endif
