// Products of blocks of 32 rows with 32 or 16 outputs in bf16 with fp32 sums: what training multiplies with. Where neither AVX-512's bf16
// dot products nor AMX tiles are there, neither is this. A sum's order depends on its length only, never on who else is in the block.
#pragma once
#include "rows.h"

constexpr int BLOCK = 32;

#ifdef HAVE_BF16

// A product's right side is kept in panels of 16 outputs, [pairs of inputs][16 outputs][2]: what a tile reads, and a vector of dot products.
// The left side is rows of bf16; 32 of them must be readable, whatever they hold.
struct Term {
    const uint16_t* x;
    size_t stride;  // numbers from one row to the next
    const uint16_t* w;
    size_t panel;   // numbers from one panel to the next
    int pairs;      // a multiple of 16
};

static inline bool tiles() {
#ifdef HAVE_AMX
    return allow_tiles();
#else
    return false;
#endif
}
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
template <int PANELS> static inline void by_tiles(const Term* terms, int count, float* c, bool add) {
    constexpr int row = BLOCK * sizeof(float);
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + 16 * BLOCK, row);
        if (PANELS == 2) { _tile_loadd(2, c + 16, row); _tile_loadd(3, c + 16 * BLOCK + 16, row); }
    } else {
        _tile_zero(0); _tile_zero(1);
        if (PANELS == 2) { _tile_zero(2); _tile_zero(3); }
    }
    for (const Term* t = terms; t < terms + count; t++) {
        const uint16_t *x0 = t->x, *x1 = t->x + 16 * t->stride, *w0 = t->w, *w1 = t->w + t->panel;
        const size_t bytes = t->stride * 2;
        for (int s = 0; s < t->pairs; s += 16, x0 += 32, x1 += 32, w0 += 512, w1 += 512) {
            _tile_loadd(4, x0, bytes);
            _tile_loadd(6, w0, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, x1, bytes);
            _tile_dpbf16ps(1, 5, 6);
            if (PANELS == 2) {
                _tile_loadd(7, w1, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + 16 * BLOCK, row);
    if (PANELS == 2) { _tile_stored(2, c + 16, row); _tile_stored(3, c + 16 * BLOCK + 16, row); }
}
#endif

template <int ROWS, int PANELS> static inline void by_dots(const Term* terms, int count, int from, float* c, bool add) {
    __m512 acc[ROWS][PANELS];
    clear(acc);
    c += from * BLOCK;
    if (add) unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { acc[r][p] = _mm512_loadu_ps(c + r * BLOCK + p * 16); }); });
    for (const Term* t = terms; t < terms + count; t++) {
        const uint16_t *x = t->x + from * t->stride, *w = t->w;
        const size_t stride = t->stride, panel = t->panel;
        for (int k = 0; k < t->pairs; k++, x += 2, w += 32) {
            __m512bh v[PANELS];
            unrolled<PANELS>([&](auto p) INLINED { v[p] = (__m512bh)_mm512_loadu_si512(w + p * panel); });
            unrolled<ROWS>([&](auto r) INLINED {
                const __m512bh one = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(x + r * stride));
                unrolled<PANELS>([&](auto p) INLINED { acc[r][p] = _mm512_dpbf16_ps(acc[r][p], one, v[p]); });
            });
        }
    }
    unrolled<ROWS>([&](auto r) INLINED { unrolled<PANELS>([&](auto p) INLINED { _mm512_storeu_ps(c + r * BLOCK + p * 16, acc[r][p]); }); });
}

// c[32][32], of which the first 16 columns with one panel: the sum of the terms, added to what is there where `add` says so. Of rows from
// `rows` on c may hold anything.
template <int PANELS> static inline void product(const Term* terms, int count, int rows, float* c, bool add) {
#ifdef HAVE_AMX
    if (tiles()) { by_tiles<PANELS>(terms, count, c, add); return; }
#endif
    int r = 0;
    for (; r + 12 <= rows; r += 12) by_dots<12, PANELS>(terms, count, r, c, add);
    for (; r + 4 <= rows; r += 4) by_dots<4, PANELS>(terms, count, r, c, add);
    for (; r < rows; r++) by_dots<1, PANELS>(terms, count, r, c, add);
}
#endif
