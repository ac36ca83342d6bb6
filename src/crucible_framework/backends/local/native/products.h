// Products of few rows with a frozen matrix that stands row by row, [outputs][inputs], as torch keeps it: no second copy of the weights.
// Sums are fp32. With bf16 and int8 weights the activations are rounded to bf16, whichever instructions multiply; EXACT ones give what the
// fp32 matrix would, to the bit. But for columns a row's products are summed in one order, however many rows there are.
#pragma once
#include "rows.h"

// ------------------------------------------------------------------------------------------------------------ vectors
// The sums of O vectors for each of R rows.
template <int O, int R, class V> INLINED static inline void sums(const V (&acc)[O][R], float* c, int stride) {
#if defined(__AVX512F__)
    unrolled<R>([&](auto r) INLINED {
        unrolled<O / 4>([&](auto o) INLINED {
            const __m512 v0 = (__m512)acc[o * 4][r], v1 = (__m512)acc[o * 4 + 1][r], v2 = (__m512)acc[o * 4 + 2][r], v3 = (__m512)acc[o * 4 + 3][r];
            const __m512d low = (__m512d)(_mm512_unpacklo_ps(v0, v1) + _mm512_unpackhi_ps(v0, v1));
            const __m512d high = (__m512d)(_mm512_unpacklo_ps(v2, v3) + _mm512_unpackhi_ps(v2, v3));
            const __m512 four = (__m512)_mm512_unpacklo_pd(low, high) + (__m512)_mm512_unpackhi_pd(low, high);
            const __m256 two = _mm512_castps512_ps256(four) + _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)four, 1));
            _mm_storeu_ps(c + r * stride + o * 4, _mm256_castps256_ps128(two) + _mm256_extractf128_ps(two, 1));
        });
    });
#else
    unrolled<O>([&](auto o) INLINED { unrolled<R>([&](auto r) INLINED { c[r * stride + o] = sum(acc[o][r]); }); });
#endif
}

// Rows of a few hundred bytes end before the processor has seen where they lead, so those 16 further on are asked for: by the first block of
// rows of activations, or, with bf16, a share by each of the `count` blocks, so that memory works all the time. Where a single row fills its
// registers from whole lines of the cache, memory is all it needs.
template <class W, int O, int R> struct Ahead {
    const char* at;
    int wait;
    const int period;
    Ahead(const W* const* w, int width, int block, int count)
        : at((const char*)(w[0] + (size_t)16 * width / EACH<W>)), wait(sizeof(W) == 2 || block == 0 ? block : width), period(sizeof(W) == 2 ? count : 1) {}
    void step(int numbers) {
        if ((R > 1 || sizeof(W) < (LANES == 16 ? 2 : 4) || EACH<W> > 1) && wait-- == 0) {
            for (size_t i = 0; i < O * numbers * sizeof(W); i += 64) __builtin_prefetch(at + i);
            wait = period - 1;
        }
        at += O * numbers * sizeof(W);
    }
};

template <class W, int O, int R> static inline void dots(const W* const* w, const float* x, int width, float* c, int stride, int block, int count) {
    Lane acc[O][R];
    clear(acc);
    int k = 0;
    Ahead<W, O, R> ahead(w, width, block, count);
    for (; k + LANES <= width; k += LANES) {
        ahead.step(LANES);
        Lane v[R];
        unrolled<R>([&](auto r) INLINED { v[r] = lane(x + (size_t)r * width + k); });
        unrolled<O>([&](auto o) INLINED {
            const Lane one = lane(w[o] + k);
            unrolled<R>([&](auto r) INLINED { acc[o][r] += one * v[r]; });
        });
    }
    sums<O, R>(acc, c, stride);
    for (int j = k; j < width; j++)
        for (int o = 0; o < O; o++)
            for (int r = 0; r < R; r++) c[r * stride + o] += number(w[o][j]) * x[(size_t)r * width + j];
}

template <class W, int O, int R>
static inline void dots(const Affine* const* w, const float* x, int width, float* c, int stride, int block, int count) {
    Lane acc[O][R];
    clear(acc);
    Ahead<Affine, O, R> ahead(w, width, block, count);
    for (int g = 0; g < width / 32; g++, x += 32) {
        ahead.step(1);
        unrolled<O>([&](auto o) INLINED {
            const Affine& group = w[o][g];
            unrolled<32 / LANES>([&](auto i) INLINED {
                const Lane one = group.numbers(i * LANES);
                unrolled<R>([&](auto r) INLINED { acc[o][r] += one * lane(x + (size_t)r * width + i * LANES); });
            });
        });
    }
    sums<O, R>(acc, c, stride);
}

#if !defined(__AVX512F__)
// tile[O outputs][16 rows or 8 of them]: each weight is multiplied with the rows that stand beside each other. `next` is asked for in steps.
// Inlined it would have too few registers for all pointers, and lose a fifth.
template <int O, int V>
static __attribute__((noinline)) void outer(const float* const* w, const char* const* next, int step, const float* x, int width, float* tile) {
    Lane acc[O][V] = {};
    for (int k = 0, at = 0; k < width; at += step) {
        for (int o = 0; o < O; o++) __builtin_prefetch(next[o] + at);
        for (const int end = std::min(k + 16, width); k < end; k++, x += 16) {
            Lane v[V];
            for (int i = 0; i < V; i++) v[i] = lane(x + i * LANES);
            for (int o = 0; o < O; o++)
                for (int i = 0; i < V; i++) acc[o][i] += v[i] * w[o][k];
        }
    }
    for (int o = 0; o < O; o++)
        for (int i = 0; i < V; i++) store(tile + o * 16 + i * LANES, acc[o][i]);
}
static void by_columns(const float* const* w, const char* const* next, int step, const Rows& rows, int from, int to, float* c, int stride) {
    const int width = rows.width;
    alignas(64) float tile[256];
    for (int r = from / 8 * 8; r < to;) {
        const float* x = &rows.columns[(size_t)(r / 16) * 16 * width + r % 16];
        const int many = r % 16 == 0 && r + 8 < to ? 16 : 8;
        if (many == 16) {
            outer<6, 2>(w, next, step, x, width, tile);
            outer<5, 2>(w + 6, next + 6, step, x, width, tile + 96);
            outer<5, 2>(w + 11, next + 11, step, x, width, tile + 176);
        } else {
            outer<8, 1>(w, next, step, x, width, tile);
            outer<8, 1>(w + 8, next + 8, step, x, width, tile + 128);
        }
        for (int i = 0; i < many; i += 8)
            for (int o = 0; o < 16; o += 8) turned(tile + o * 16 + i, 16, c + (size_t)(r + i) * stride + o, stride);
        r += many;
    }
}
#endif

#ifdef HAVE_BF16
static inline __m512bh halves(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh halves(const int8_t* p) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
    return _mm512_cvtne2ps_pbh(high, low);
}
template <class W, int O, int R> static inline void dots(const W* const* w, const uint16_t* x, int width, float* c, int stride, int block, int count) {
    Vec acc[O][R];
    clear(acc);
    int k = 0;
    Ahead<W, O, R> ahead(w, width, block, count);
    for (; k + 32 <= width; k += 32) {
        ahead.step(32);
        __m512bh v[R];
        unrolled<R>([&](auto r) INLINED { v[r] = halves(x + (size_t)r * width + k); });
        unrolled<O>([&](auto o) INLINED {
            const __m512bh one = halves(w[o] + k);
            unrolled<R>([&](auto r) INLINED { acc[o][r] = (Vec)_mm512_dpbf16_ps((__m512)acc[o][r], one, v[r]); });
        });
    }
    sums<O, R>(acc, c, stride);
    for (int j = k; j < width; j++)
        for (int o = 0; o < O; o++)
            for (int r = 0; r < R; r++) c[r * stride + o] += number(w[o][j]) * number(x[(size_t)r * width + j]);
}
#endif

template <int O, int R, class W, class X>
static void some_rows(const W* const* w, const X* x, int width, float* c, int stride, int block, int count) {
    for (int o = 0; o < 16; o += O) dots<W, O, R>(w + o, x, width, c + o, stride, block, count);
}
template <class W, class X> static void by_vectors(const W* const* w, const X* x, int width, int from, int to, float* c, int stride) {
    constexpr int R = 4, O = LANES == 16 ? 4 : 2;  // 16 registers hold fewer outputs beside four rows
    const int blocks = (to - from + R - 1) / R;
    for (int b = 0; b < blocks; b++) {
        const int r = from + b * R, many = std::min(R, to - r);
        const X* row = x + (size_t)r * width;
        float* at = c + (size_t)r * stride;
        if (many == 4) some_rows<O, 4>(w, row, width, at, stride, b, blocks);
        else if (many == 3) some_rows<4, 3>(w, row, width, at, stride, b, blocks);
        else if (many == 2) some_rows<(LANES == 16 ? 8 : 4), 2>(w, row, width, at, stride, b, blocks);
        else some_rows<8, 1>(w, row, width, at, stride, b, blocks);
    }
}
template <class W> static void by_vectors(const W* const* w, const Rows& rows, int from, int to, float* c, int stride) {
#ifdef HAVE_BF16
    if constexpr (sizeof(W) < 4)
        if (rows.way == DOTS) return by_vectors(w, rows.halves.data(), rows.width, from, to, c, stride);
#endif
    by_vectors(w, rows.plain.data(), rows.width, from, to, c, stride);
}

// -------------------------------------------------------------------------------------------------------------- tiles
struct Scratch {
    Array<float> c;           // [rows][32]
    Array<uint16_t> panel;    // [32][inputs]
    Array<float> wide;        // [32][inputs]
    Array<float> scores;
    std::vector<float*> rows, at;
};

#ifdef HAVE_AMX
static inline void put_tile(const float* tile, float* c, int count) {  // [16 outputs][16 rows] to rows of c, 32 apart
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(tile + i * 16);
    transpose(r);
    for (int i = 0; i < count; i++) _mm512_storeu_si512(c + i * 32, r[i]);
}
template <bool TWO> static void by_tiles(const uint16_t* w0, const uint16_t* w1, const Rows& rows, int from, int to, float* c) {
    const int width = rows.width, stride = width * 2, steps = width / 32;
    const size_t block = (size_t)width / 2 * 16;
    alignas(64) float tile[4][256];
    written();
    for (int b = from / 16; b * 16 < to; b += 2) {
        const uint32_t *x0 = &rows.pairs[b * block], *x1 = x0 + block;
        const bool both = (b + 1) * 16 < to;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int s = 0; s < steps; s++) {
            _tile_loadd(4, w0 + s * 32, stride);
            _tile_loadd(6, x0 + s * 256, 64);
            if (TWO) _tile_loadd(5, w1 + s * 32, stride);
            if (both) _tile_loadd(7, x1 + s * 256, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (TWO) _tile_dpbf16ps(1, 5, 6);
            if (both) _tile_dpbf16ps(2, 4, 7);
            if (TWO && both) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, tile[0], 64); _tile_stored(1, tile[1], 64); _tile_stored(2, tile[2], 64); _tile_stored(3, tile[3], 64);
        for (int half = 0; half < (both ? 2 : 1); half++) {
            float* at = c + (size_t)(b + half) * 16 * 32;
            const int count = std::min(16, to - (b + half) * 16);
            put_tile(tile[2 * half], at, count);
            if (TWO) put_tile(tile[2 * half + 1], at + 16, count);
        }
    }
}
// The same with int8 weights: two products of whole numbers for the high and the low bytes of the activations.
static void by_bytes(const int8_t* w0, const int8_t* w1, const int32_t* s0, const int32_t* s1, const Rows& rows, int from, int to, float* c) {
    const int width = rows.width, steps = width / 64;
    const size_t block = (size_t)width / 4 * 16;
    alignas(64) int32_t tile[4][256];
    written();
    for (int b = from / 16; b * 16 < to; b++) {
        const uint32_t *high = &rows.high_quads[b * block], *low = &rows.low_quads[b * block];
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int s = 0; s < steps; s++) {
            _tile_loadd(4, w0 + s * 64, width);
            _tile_loadd(6, high + s * 256, 64);
            _tile_loadd(5, w1 + s * 64, width);
            _tile_loadd(7, low + s * 256, 64);
            _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 5, 6); _tile_dpbsud(2, 4, 7); _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, tile[0], 64); _tile_stored(1, tile[1], 64); _tile_stored(2, tile[2], 64); _tile_stored(3, tile[3], 64);
        for (int n = 0; n < 2; n++) {
            __m512i h[16], l[16];
            for (int i = 0; i < 16; i++) h[i] = _mm512_loadu_si512(tile[n] + i * 16), l[i] = _mm512_loadu_si512(tile[2 + n] + i * 16);
            transpose(h);
            transpose(l);
            const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(n ? s1 : s0), 7);  // 128 times the sums
            for (int i = 0; i < std::min(16, to - b * 16); i++) {
                const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(h[i], shift)) * _mm512_set1_ps(256.0f) + _mm512_cvtepi32_ps(l[i]);
                _mm512_storeu_ps(c + (size_t)(b * 16 + i) * 32 + n * 16, whole * _mm512_set1_ps(rows.step[b * 16 + i]));
            }
        }
    }
}
#endif

// c[row][0..15] for 16 outputs from `first` on and c[row][16..31] from `second` on; rows from..to, or all of their blocks of 16.
template <class W> static void product(const Matrix& m, int first, int second, const Rows& rows, int from, int to, Scratch& scratch) {
    const W* base = (const W*)m.weight;
    float* c = scratch.c.data();
    const W* w[32];
    const size_t row = m.inputs / EACH<W>;
    for (int i = 0; i < 32; i++) w[i] = base + std::min(i < 16 ? first + i : second + i - 16, m.outputs - 1) * row;
#ifdef HAVE_AMX
    if constexpr (sizeof(W) < 4)
        if (rows.way == TILES) {
            if constexpr (sizeof(W) == 1)
                if (rows.bytes && std::max(first, second) + 16 <= m.outputs) {
                    by_bytes((const int8_t*)w[0], (const int8_t*)w[16], m.sums + first, m.sums + second, rows, from / 16 * 16, to, c);
                    return;
                }
            const uint16_t *w0 = (const uint16_t*)w[0], *w1 = (const uint16_t*)w[16];
            if (sizeof(W) == 2 && first + 16 <= m.outputs && second >= m.outputs) {
                by_tiles<false>(w0, nullptr, rows, from / 16 * 16, to, c);
                return;
            }
            if (sizeof(W) == 1 || std::max(first, second) + 16 > m.outputs) {
                uint16_t* panel = scratch.panel.data();
                for (int i = 0; i < 32; i++)
                    for (int k = 0; k < m.inputs; k += 32) _mm512_storeu_si512(panel + (size_t)i * m.inputs + k, (__m512i)halves(w[i] + k));
                w0 = panel, w1 = panel + (size_t)16 * m.inputs;
            }
            by_tiles<true>(w0, w1, rows, from / 16 * 16, to, c);
            return;
        }
#endif
#if !defined(__AVX512F__)
    if (rows.way == COLUMNS) {
        const float* wide[32];
        const char* next[32];  // what is asked for meanwhile: the outputs 32 further
        for (int i = 0; i < 32; i++) {
            next[i] = (const char*)(w[i] + 32 * row);
            if constexpr (std::is_same<W, float>::value) wide[i] = w[i];
            else wide[i] = &scratch.wide[(size_t)i * m.inputs], widen(w[i], m.inputs, &scratch.wide[(size_t)i * m.inputs]);
        }
        for (int n = 0; n < (second < m.outputs ? 32 : 16); n += 16) by_columns(wide + n, next + n, 16 * sizeof(W) / EACH<W>, rows, from, to, c + n, 32);
        return;
    }
#endif
#ifdef HAVE_BF16
    if constexpr (sizeof(W) == 1)
        if (rows.way == DOTS && to - from > 12) {  // made bf16 once for all blocks of rows
            const uint16_t* wide[32];
            for (int i = 0; i < 32; i++) {
                uint16_t* panel = &scratch.panel[(size_t)i * m.inputs];
                for (int k = 0; k < m.inputs; k += 64) __builtin_prefetch(w[i] + (size_t)32 * m.inputs + k);
                int k = 0;
                for (; k + 32 <= m.inputs; k += 32) _mm512_storeu_si512(panel + k, (__m512i)halves(w[i] + k));
                for (; k < m.inputs; k++) panel[k] = rounded(number(w[i][k]));
                wide[i] = panel;
            }
            by_vectors<uint16_t>(wide, rows, from, to, c, 32);
            if (second < m.outputs) by_vectors<uint16_t>(wide + 16, rows, from, to, c + 16, 32);
            return;
        }
#endif
    by_vectors<W>(w, rows, from, to, c, 32);
    if (second < m.outputs) by_vectors<W>(w + 16, rows, from, to, c + 16, 32);
}

static void product(const Matrix& m, int first, int second, const Rows& rows, int from, int to, Scratch& scratch) {
    if (m.kind == FLOAT32) product<float>(m, first, second, rows, from, to, scratch);
    else if (m.kind == GROUPED) product<Affine>(m, first, second, rows, from, to, scratch);
    else if (m.kind == BFLOAT16 || m.kind == EXACT) product<uint16_t>(m, first, second, rows, from, to, scratch);
    else product<int8_t>(m, first, second, rows, from, to, scratch);
}

// Whether int8 weights are multiplied as such; then a matrix's outputs come in whole blocks.
static bool by_bytes_too(const Matrix& m, Way way) { return m.kind == INT8 && way == TILES && m.inputs % 64 == 0 && m.outputs % 32 == 0; }

static Way way_of(int kind, int rows, int width, int few) {
    const Way plain = LANES < 16 && rows > few ? COLUMNS : PLAIN;  // with 32 long registers nothing is gained by columns
    if (keeps_fp32(kind)) return plain;
#ifdef HAVE_AMX
    if (width % 32 == 0 && allow_tiles()) return TILES;
#endif
    (void)width;
#ifdef HAVE_BF16
    return DOTS;
#else
    return plain;
#endif
}
