// Products of few rows with a frozen matrix that stands row by row, [outputs][inputs], as torch keeps it: no second copy of the weights.
// Sums are fp32. With bf16 and int8 weights the activations are rounded to bf16, whichever instructions multiply.
#pragma once
#include "vectors.h"
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAVE_BF16 1
#endif

struct Matrix {
    const void* weight;    // [outputs][inputs]
    const float* scale;    // of int8 weights, per output
    const float* bias;     // per output, or null
    const int32_t* sums;   // of int8 weights, per output
    int32_t outputs, inputs, kind;
};

enum Way { PLAIN, COLUMNS, DOTS, TILES };  // fp32 vectors, the same with 16 rows beside each other, AVX-512's bf16 dot products, AMX tiles

// Rows of activations in the form that the way of multiplying reads.
struct Rows {
    Way way = PLAIN;
    int count = 0, width = 0;
    std::vector<float> plain;      // [count][width]
    std::vector<float> columns;    // [count / 16][width][16]
    std::vector<uint16_t> halves;  // [count][width]
    std::vector<uint32_t> pairs;   // [count / 16][width / 2][16]: what an AMX tile reads
    // For int8 weights on AMX: x = step (256 high + low - 32768), which is finer than bf16, so that products are exact whole numbers.
    bool bytes = false, adapted = false;
    std::vector<uint8_t> high, low;                // [count][width]
    std::vector<uint32_t> high_quads, low_quads;   // [count / 16][width / 4][16]
    std::vector<float> step;
    void set(Way w, int c, int k, bool b, bool a) {
        way = w, count = c, width = k, bytes = b, adapted = a;
        size_t n = (size_t)((c + 15) / 16 * 16) * (k + 32);
        if (way <= COLUMNS && plain.size() < n) plain.resize(n);
        if (way == COLUMNS && columns.size() < n) columns.resize(n);
        if (way > COLUMNS && halves.size() < n) halves.resize(n);
        if (way == TILES && pairs.size() < n / 2) pairs.resize(n / 2);
        if (bytes && high.size() < n) high.resize(n), low.resize(n), high_quads.resize(n / 4 + 1), low_quads.resize(n / 4 + 1);
        if (bytes && step.size() < n / k) step.resize(n / k + 16);
    }
    // Takes one row; `round` to bf16 where weights are.
    void put(int row, const float* x, bool round) {
        int k = 0;
        if (way <= COLUMNS) {
            float* to = &plain[(size_t)row * width];
            if (!round) { memcpy(to, x, width * sizeof(float)); return; }
            for (; k + 16 <= width; k += 16) store(to + k, halved(load(x + k)));
            for (; k < width; k++) to[k] = number(rounded(x[k]));
            return;
        }
        if (bytes) quantise(row, x);
        if (bytes && !adapted) return;
        uint16_t* to = &halves[(size_t)row * width];
        for (; k + 16 <= width; k += 16) store(to + k, load(x + k));
        for (; k < width; k++) to[k] = rounded(x[k]);
    }
    void quantise(int row, const float* x);
    bool blocks() const { return way == COLUMNS || way == TILES; }
    void pack(int block);  // what `blocks` ways read of 16 rows that were put
};

#ifdef HAVE_AMX
static inline void transpose(__m512i r[16]) {  // 16 x 16 numbers of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
static inline bool allow_tiles() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return allowed;
}
static inline void open_tiles() {
    struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}
#endif

#ifdef HAVE_AMX
// Rows of [count][units] numbers of 32 bits as [units][16], a block of 16 rows at a time.
static inline void packed(const uint32_t* from, uint32_t* to, int block, int count, int units) {
    for (int k = 0; k < units; k += 16) {
        const __mmask16 mask = units - k >= 16 ? 0xffff : (__mmask16)((1 << (units - k)) - 1);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = block * 16 + i < count ? _mm512_maskz_loadu_epi32(mask, from + (size_t)(block * 16 + i) * units + k) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < std::min(16, units - k); i++) _mm512_storeu_si512(to + ((size_t)block * units + k + i) * 16, r[i]);
    }
}
#endif

inline void Rows::pack(int block) {
    if (way == COLUMNS) {
        const float* from = &plain[(size_t)block * 16 * width];
        float* to = &columns[(size_t)block * 16 * width];
        const int here = std::min(16, count - block * 16);
        for (int k = 0; k < width; k++, to += 16)
            for (int i = 0; i < 16; i++) to[i] = i < here ? from[(size_t)i * width + k] : 0.0f;
    }
#ifdef HAVE_AMX
    if (bytes) {
        packed((const uint32_t*)high.data(), high_quads.data(), block, count, width / 4);
        packed((const uint32_t*)low.data(), low_quads.data(), block, count, width / 4);
    }
    if (!bytes || adapted) packed((const uint32_t*)halves.data(), pairs.data(), block, count, width / 2);
#endif
}

inline void Rows::quantise(int row, const float* x) {
    (void)row, (void)x;
#ifdef HAVE_AMX
    Vec top = {}, zero = {};
    for (int k = 0; k < width; k += 16) top = larger(top, larger(load(x + k), -load(x + k))), zero += load(x + k) * 0.0f;
    const float most = std::max(highest(top), 1e-30f);
    step[row] = most / 32767.0f + sum(zero);  // not a number where one of them is not
    const float inverse = 32767.0f / most;
    uint8_t *h = &high[(size_t)row * width], *l = &low[(size_t)row * width];
    typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
    for (int k = 0; k < width; k += 16) {
        ULane q = (ULane)__builtin_convertvector(load(x + k) * inverse + 32768.5f, ILane);  // rounded: all are positive
        *(Bytes*)(h + k) = __builtin_convertvector(q >> 8, Bytes);
        *(Bytes*)(l + k) = __builtin_convertvector(q & 255, Bytes);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------------ vectors
// The sums of O vectors for each of R rows.
template <int O, int R, class V> static inline void sums(const V (&acc)[O][R], float* c, int stride) {
#if defined(__AVX512F__)
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o += 4) {
            const __m512 v0 = (__m512)acc[o][r], v1 = (__m512)acc[o + 1][r], v2 = (__m512)acc[o + 2][r], v3 = (__m512)acc[o + 3][r];
            const __m512d low = (__m512d)(_mm512_unpacklo_ps(v0, v1) + _mm512_unpackhi_ps(v0, v1));
            const __m512d high = (__m512d)(_mm512_unpacklo_ps(v2, v3) + _mm512_unpackhi_ps(v2, v3));
            const __m512 four = (__m512)_mm512_unpacklo_pd(low, high) + (__m512)_mm512_unpackhi_pd(low, high);
            const __m256 two = _mm512_castps512_ps256(four) + _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)four, 1));
            _mm_storeu_ps(c + r * stride + o, _mm256_castps256_ps128(two) + _mm256_extractf128_ps(two, 1));
        }
#else
    for (int o = 0; o < O; o++)
        for (int r = 0; r < R; r++) c[r * stride + o] = sum(acc[o][r]);
#endif
}

template <class W, int O, int R> static inline void dots_plain(const W* const* w, const float* x, int width, float* c, int stride) {
    Lane acc[O][R] = {};
    int k = 0;
    // Rows of a few hundred bytes end before the processor has seen where they lead, so the rows after the next ones are asked for.
    const char* ahead = (const char*)(w[0] + (size_t)2 * O * width);
    for (; k + LANES <= width; k += LANES) {
        if (sizeof(W) < 4)
            for (size_t i = 0; i < O * LANES * sizeof(W); i += 64) __builtin_prefetch(ahead + i);
        ahead += O * LANES * sizeof(W);
        Lane v[R];
        for (int r = 0; r < R; r++) v[r] = lane(x + (size_t)r * width + k);
        for (int o = 0; o < O; o++) {
            Lane one = lane(w[o] + k);
            for (int r = 0; r < R; r++) acc[o][r] += one * v[r];
        }
    }
    sums<O, R>(acc, c, stride);
    for (int j = k; j < width; j++)
        for (int o = 0; o < O; o++)
            for (int r = 0; r < R; r++) c[r * stride + o] += number(w[o][j]) * x[(size_t)r * width + j];
}

#if !defined(__AVX512F__)
// c[16 rows or 8 of them][O outputs]: each weight is multiplied with the rows that stand beside each other.
template <int O, int V> static inline void outer(const float* const* w, const float* x, int width, float* c, int stride) {
    Lane acc[O][V] = {};
    for (int k = 0; k < width;) {
        for (int o = 0; o < O; o++) __builtin_prefetch(w[o] + (size_t)32 * width + k);  // the piece after this one
        for (const int end = std::min(k + 16, width); k < end; k++, x += 16) {
            Lane v[V];
            for (int i = 0; i < V; i++) v[i] = *(const Lane*)(x + i * LANES);
            for (int o = 0; o < O; o++)
                for (int i = 0; i < V; i++) acc[o][i] += v[i] * w[o][k];
        }
    }
    for (int i = 0; i < V; i++)
        for (int r = 0; r < 8; r++)
            for (int o = 0; o < O; o++) c[(i * 8 + r) * stride + o] = acc[o][i][r];
}
static void by_columns(const float* const* w, const Rows& rows, int from, int to, float* c, int stride) {
    const int width = rows.width;
    for (int r = from / 8 * 8; r < to;) {
        const float* x = &rows.columns[(size_t)(r / 16) * 16 * width + r % 16];
        float* at = c + (size_t)r * stride;
        if (r % 16 == 0 && r + 8 < to) {
            outer<6, 2>(w, x, width, at, stride), outer<5, 2>(w + 6, x, width, at + 6, stride), outer<5, 2>(w + 11, x, width, at + 11, stride);
            r += 16;
        } else {
            outer<8, 1>(w, x, width, at, stride), outer<8, 1>(w + 8, x, width, at + 8, stride);
            r += 8;
        }
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
template <class W, int O, int R> static inline void dots_halves(const W* const* w, const uint16_t* x, int width, float* c, int stride) {
    Vec acc[O][R] = {};
    int k = 0;
    for (; k + 32 <= width; k += 32) {
        __m512bh v[R];
        for (int r = 0; r < R; r++) v[r] = halves(x + (size_t)r * width + k);
        for (int o = 0; o < O; o++) {
            __m512bh one = halves(w[o] + k);
            for (int r = 0; r < R; r++) acc[o][r] = (Vec)_mm512_dpbf16_ps((__m512)acc[o][r], one, v[r]);
        }
    }
    sums<O, R>(acc, c, stride);
    for (int j = k; j < width; j++)
        for (int o = 0; o < O; o++)
            for (int r = 0; r < R; r++) c[r * stride + o] += number(w[o][j]) * number(x[(size_t)r * width + j]);
}
#endif

template <class W> static void by_vectors(const W* const* w, const Rows& rows, int from, int to, float* c, int stride) {
    int r = from;
#ifdef HAVE_BF16
    if constexpr (sizeof(W) < 4)
        if (rows.way == DOTS) {
            const uint16_t* x = rows.halves.data();
            for (; r + 4 <= to; r += 4)
                for (int o = 0; o < 16; o += 4) dots_halves<W, 4, 4>(w + o, x + (size_t)r * rows.width, rows.width, c + r * stride + o, stride);
            for (; r < to; r++)
                for (int o = 0; o < 16; o += 8) dots_halves<W, 8, 1>(w + o, x + (size_t)r * rows.width, rows.width, c + r * stride + o, stride);
            return;
        }
#endif
    const float* x = rows.plain.data();
    constexpr int R = LANES == 16 ? 4 : 2;
    for (; r + R <= to; r += R)
        for (int o = 0; o < 16; o += 4) dots_plain<W, 4, R>(w + o, x + (size_t)r * rows.width, rows.width, c + r * stride + o, stride);
    for (; r < to; r++)
        for (int o = 0; o < 16; o += 8) dots_plain<W, 8, 1>(w + o, x + (size_t)r * rows.width, rows.width, c + r * stride + o, stride);
}

// -------------------------------------------------------------------------------------------------------------- tiles
struct Scratch {
    std::vector<float> c;           // [rows][32]
    std::vector<uint16_t> panel;    // [32][inputs]
    std::vector<float> wide;        // [32][inputs]
    std::vector<float> scores;
    std::vector<float*> rows, at;
};

#ifdef HAVE_AMX
static inline void put_tile(const float* tile, float* c, int count) {  // [16 outputs][16 rows] to rows of c, 32 apart
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(tile + i * 16);
    transpose(r);
    for (int i = 0; i < count; i++) _mm512_storeu_si512(c + i * 32, r[i]);
}
static void by_tiles(const uint16_t* w0, const uint16_t* w1, const Rows& rows, int from, int to, float* c) {
    const int width = rows.width, stride = width * 2, steps = width / 32;
    const size_t block = (size_t)width / 2 * 16;
    alignas(64) float tile[4][256];
    for (int b = from / 16; b * 16 < to; b += 2) {
        const uint32_t *x0 = &rows.pairs[b * block], *x1 = x0 + block;
        const bool both = (b + 1) * 16 < to;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        if (both) {
            for (int s = 0; s < steps; s++) {
                _tile_loadd(4, w0 + s * 32, stride);
                _tile_loadd(6, x0 + s * 256, 64);
                _tile_loadd(5, w1 + s * 32, stride);
                _tile_loadd(7, x1 + s * 256, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6); _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(3, 5, 7);
            }
        } else {
            for (int s = 0; s < steps; s++) {
                _tile_loadd(4, w0 + s * 32, stride);
                _tile_loadd(6, x0 + s * 256, 64);
                _tile_loadd(5, w1 + s * 32, stride);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
            }
        }
        _tile_stored(0, tile[0], 64); _tile_stored(1, tile[1], 64);
        if (both) { _tile_stored(2, tile[2], 64); _tile_stored(3, tile[3], 64); }
        float* at = c + (size_t)b * 16 * 32;
        put_tile(tile[0], at, std::min(16, to - b * 16)); put_tile(tile[1], at + 16, std::min(16, to - b * 16));
        if (both) { put_tile(tile[2], at + 512, std::min(16, to - b * 16 - 16)); put_tile(tile[3], at + 528, std::min(16, to - b * 16 - 16)); }
    }
}
// The same with int8 weights: two products of whole numbers for the high and the low bytes of the activations.
static void by_bytes(const int8_t* w0, const int8_t* w1, const int32_t* s0, const int32_t* s1, const Rows& rows, int from, int to, float* c) {
    const int width = rows.width, steps = width / 64;
    const size_t block = (size_t)width / 4 * 16;
    alignas(64) int32_t tile[4][256];
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
    for (int i = 0; i < 32; i++) w[i] = base + (size_t)std::min(i < 16 ? first + i : second + i - 16, m.outputs - 1) * m.inputs;
#ifdef HAVE_AMX
    if constexpr (sizeof(W) < 4)
        if (rows.way == TILES) {
            if constexpr (sizeof(W) == 1)
                if (rows.bytes && std::max(first, second) + 16 <= m.outputs) {
                    by_bytes((const int8_t*)w[0], (const int8_t*)w[16], m.sums + first, m.sums + second, rows, from / 16 * 16, to, c);
                    return;
                }
            const uint16_t *w0 = (const uint16_t*)w[0], *w1 = (const uint16_t*)w[16];
            if (sizeof(W) == 1 || std::max(first, second) + 16 > m.outputs) {
                uint16_t* panel = scratch.panel.data();
                for (int i = 0; i < 32; i++)
                    for (int k = 0; k < m.inputs; k += 32) _mm512_storeu_si512(panel + (size_t)i * m.inputs + k, (__m512i)halves(w[i] + k));
                w0 = panel, w1 = panel + (size_t)16 * m.inputs;
            }
            by_tiles(w0, w1, rows, from / 16 * 16, to, c);
            return;
        }
#endif
#if !defined(__AVX512F__)
    if (rows.way == COLUMNS) {
        const float* wide[32];
        for (int i = 0; i < 32; i++) {
            if constexpr (sizeof(W) == 4) wide[i] = w[i];
            else {
                float* to_wide = &scratch.wide[(size_t)i * m.inputs];
                for (int k = 0; k < m.inputs; k += 64 / sizeof(W)) __builtin_prefetch(w[i] + (size_t)32 * m.inputs + k);
                for (int k = 0; k < m.inputs; k++) to_wide[k] = number(w[i][k]);
                wide[i] = to_wide;
            }
        }
        by_columns(wide, rows, from, to, c, 32);
        by_columns(wide + 16, rows, from, to, c + 16, 32);
        return;
    }
#endif
    by_vectors<W>(w, rows, from, to, c, 32);
    by_vectors<W>(w + 16, rows, from, to, c + 16, 32);
}

static void product(const Matrix& m, int first, int second, const Rows& rows, int from, int to, Scratch& scratch) {
    if (m.kind == FLOAT32) product<float>(m, first, second, rows, from, to, scratch);
    else if (m.kind == BFLOAT16) product<uint16_t>(m, first, second, rows, from, to, scratch);
    else product<int8_t>(m, first, second, rows, from, to, scratch);
}

// Whether int8 weights are multiplied as such; then a matrix's outputs come in whole blocks.
static bool by_bytes_too(const Matrix& m, Way way) { return m.kind == INT8 && way == TILES && m.inputs % 64 == 0 && m.outputs % 32 == 0; }

static Way way_of(int kind, int rows, int width) {
    const Way plain = LANES < 16 && rows > 4 ? COLUMNS : PLAIN;  // with 32 long registers nothing is gained by columns
    if (kind == FLOAT32) return plain;
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
