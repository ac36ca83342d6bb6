// bf16 rows of tokens in the forms that blocks of products read, and blocks of products as rows again. It knows no attention.
#pragma once
#include "blocks.h"
#ifdef HAVE_BF16

typedef uint16_t Half;
constexpr int SQUARE = BLOCK * BLOCK;

template <int PANELS> static inline void multiply(const Term* terms, int count, int rows, float* c, bool add) {
    asm volatile("" ::: "memory");  // gcc does not know that tiles are read from memory
    product<PANELS>(terms, count, rows, c, add);
    asm volatile("" ::: "memory");
}

// 32 numbers of a row; those of rows from `count` on are 0. Rows lie so far apart that no processor asks for the next ones by itself.
static inline __m512i row_of(const Half* from, size_t stride, int row, int count) {
    __builtin_prefetch(from + (size_t)(row + 16) * stride);
    return row < count ? _mm512_loadu_si512(from + (size_t)row * stride) : _mm512_setzero_si512();
}

// Words 2 i of two vectors behind each other (odd = 0), or words 2 i + 1.
static inline __m512i every_second(__m512i a, __m512i b, int odd) {
    alignas(64) static const auto index = [] {
        struct { uint16_t at[2][32]; } found{};
        for (int i = 0; i < 32; i++) found.at[0][i] = 2 * i, found.at[1][i] = 2 * i + 1;
        return found;
    }();
    return _mm512_permutex2var_epi16(a, _mm512_loadu_si512(index.at[odd]), b);
}
// Words of two vectors by turns: the first 16 of each, or the last.
static inline __m512i by_turns(__m512i a, __m512i b, int last) {
    alignas(64) static const auto index = [] {
        struct { uint16_t at[2][32]; } found{};
        for (int i = 0; i < 32; i++)
            for (int half = 0; half < 2; half++) found.at[half][i] = (i % 2 ? 32 : 0) + 16 * half + i / 2;
        return found;
    }();
    return _mm512_permutex2var_epi16(a, _mm512_loadu_si512(index.at[last]), b);
}

// Two rows of 32 outputs as a pair of inputs of two panels, by the quickest instructions; `output_of` tells which output stands where.
static inline void paired(__m512i a, __m512i b, Half* to) {
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + SQUARE / 2, _mm512_unpackhi_epi16(a, b));
}
static inline int output_of(int column) { return column % 16 / 4 * 8 + column / 16 * 4 + column % 4; }

// Tokens as outputs: [blocks * 2 panels][size / 2 pairs of numbers][16 tokens][2].
static inline void tokens_out(const Half* from, size_t stride, int count, int blocks, int size, Half* to) {
    for (int panel = 0; panel < 2 * blocks; panel++)
        for (int k = 0; k < size; k += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = row_of(from + k, stride, panel * 16 + i, count);
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (size_t)panel * 16 * size + (k / 2 + i) * 32, r[i]);
        }
}

// Tokens as inputs: [size / 16 panels][blocks * 16 pairs of tokens][16 numbers][2].
static inline void tokens_in(const Half* from, size_t stride, int count, int blocks, int size, Half* to) {
    const size_t panel = (size_t)blocks * 16 * 32;
    for (int pair = 0; pair < blocks * 16; pair++)
        for (int k = 0; k < size; k += 32) {
            const __m512i a = row_of(from + k, stride, 2 * pair, count), b = row_of(from + k, stride, 2 * pair + 1, count);
            Half* place = to + (size_t)(k / 16) * panel + (size_t)pair * 32;
            _mm512_storeu_si512(place, by_turns(a, b, 0));
            _mm512_storeu_si512(place + panel, by_turns(a, b, 1));
        }
}

// A block of 32 tokens as [32][size].
static inline void tokens_plain(const Half* from, size_t stride, int count, int size, Half* to) {
    for (int row = 0; row < BLOCK; row++)
        for (int k = 0; k < size; k += 32) _mm512_storeu_si512(to + row * size + k, row_of(from + k, stride, row, count));
}

// A block [32 tokens][size] turned: [size][32 tokens].
static inline void turned(const Half* from, int size, Half* to) {
    for (int k = 0; k < size; k += 32) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * size + k), b[i] = _mm512_loadu_si512(from + (16 + i) * size + k);
        transpose(a);
        transpose(b);
        for (int i = 0; i < 16; i++)
            for (int odd = 0; odd < 2; odd++) _mm512_storeu_si512(to + (k + 2 * i + odd) * BLOCK, every_second(a[i], b[i], odd));
    }
}

static inline __m512i halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Adds up squares [32 numbers][32 columns of tokens] and turns them to [32 tokens][32 numbers], the columns being those of `paired` rows.
static inline void turned(const float* const* squares, int count, size_t offset, float* to) {
    for (int i = 0; i < BLOCK; i += 16)
        for (int j = 0; j < BLOCK; j += 16) {
            __m512i r[16];
            for (int row = 0; row < 16; row++) {
                __m512 total = _mm512_setzero_ps();
                for (int k = 0; k < count; k++) total += _mm512_loadu_ps(squares[k] + offset + (i + row) * BLOCK + j);
                r[row] = (__m512i)total;
            }
            transpose(r);
            for (int row = 0; row < 16; row++) _mm512_storeu_si512(to + output_of(j + row) * BLOCK + i, r[row]);
        }
}

// Rows [rows][32] times a scale into bf16; the first `add` are added to what is there.
static inline void put(const float* from, int rows, float scale, Half* to, size_t stride, int add) {
    for (int r = 0; r < rows; r++) {
        __m512 low = _mm512_loadu_ps(from + r * BLOCK) * scale, high = _mm512_loadu_ps(from + r * BLOCK + 16) * scale;
        Half* place = to + (size_t)r * stride;
        __builtin_prefetch(place + 16 * stride, 1);
        if (r < add) low += (__m512)lane(place), high += (__m512)lane(place + 16);
        _mm512_storeu_si512(place, halves(low, high));
    }
}
#endif
