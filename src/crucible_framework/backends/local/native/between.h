// What stands between products in training, for bf16 numbers 32 at a time: norm, gate, dropout. Sums and steps are fp32.
#pragma once
#include "blocks.h"
#ifdef HAVE_BF16

typedef __m512i Halves;

static inline Halves raw(const uint16_t* p) { return _mm512_loadu_si512(p); }
static inline __m512 lower(Halves v) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16); }
static inline __m512 upper(Halves v) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16); }
static inline void put(uint16_t* p, __m512 low, __m512 high) { _mm512_storeu_si512(p, halves(low, high)); }
// `past` the caches, for what is too large for them: p begins a line.
static inline void put(uint16_t* p, __m512 low, __m512 high, bool past) {
    if (past) _mm512_stream_si512((Halves*)p, halves(low, high));
    else put(p, low, high);
}

// exp to about 2 ulp, with infinity and 0 where they belong. Source: Cephes' expf.
static inline __m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x * _mm512_set1_ps(1.44269504088896341f), 8);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(next));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r * r, r + _mm512_set1_ps(1.0f)), n);
}
static inline __m512 logistic(__m512 x) { return _mm512_rcp14_ps(_mm512_set1_ps(1.0f) + exponential(-x)); }  // to 2^-14: bf16 has 2^-9
static inline Halves gate(Halves a, Halves b) { return halves(lower(a) * logistic(lower(a)) * lower(b), upper(a) * logistic(upper(a)) * upper(b)); }
static inline void gate_slopes(__m512 g, __m512 a, __m512 b, __m512& da, __m512& db) {
    const __m512 s = logistic(a), one = _mm512_set1_ps(1.0f);
    da = g * b * s * (one + a * (one - s)), db = g * a * s;
}

static inline float inverse_rms(const uint16_t* x, int width, float eps) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int i = 0; i < width; i += 32) {
        const Halves a = raw(x + i);
        low = _mm512_fmadd_ps(lower(a), lower(a), low), high = _mm512_fmadd_ps(upper(a), upper(a), high);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(low + high) / width + eps);
}
static inline Halves scaled(Halves a, Halves weight, float scale) {
    const __m512 by = _mm512_set1_ps(scale);
    return halves(lower(a) * by * lower(weight), upper(a) * by * upper(weight));
}
// A row's gradient through its norm, from g in pieces `step` apart. `extra` is added: the gradient that comes through the residual.
static inline void norm_back(const uint16_t* g, int step, const uint16_t* x, const uint16_t* w, const uint16_t* extra, uint16_t* out, int width, float scale) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int i = 0; i < width; i += 32) {
        const Halves u = raw(g + i / 32 * step), a = raw(x + i), b = raw(w + i);
        low = _mm512_fmadd_ps(lower(u) * lower(b), lower(a), low), high = _mm512_fmadd_ps(upper(u) * upper(b), upper(a), high);
    }
    const __m512 by = _mm512_set1_ps(scale), slope = _mm512_set1_ps(-_mm512_reduce_add_ps(low + high) * scale * scale * scale / width);
    for (int i = 0; i < width; i += 32) {
        const Halves u = raw(g + i / 32 * step), a = raw(x + i), b = raw(w + i);
        __m512 first = lower(u) * lower(b) * by + lower(a) * slope, second = upper(u) * upper(b) * by + upper(a) * slope;
        if (extra) first += lower(raw(extra + i)), second += upper(raw(extra + i));
        put(out + i, first, second);
    }
}

// Which of 32 numbers dropout keeps: 16 random bits each, as train.cpp's `drop` has them; `word` is the first of 8 words of the counter.
static inline __mmask32 kept(uint64_t start, uint64_t word, int threshold) {
    const __m512i steps = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8), golden = _mm512_set1_epi64(0x9E3779B97F4A7C15ull);
    __m512i z = _mm512_mullo_epi64(_mm512_add_epi64(_mm512_set1_epi64(word), steps), golden);
    z = _mm512_add_epi64(z, _mm512_set1_epi64(start));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9ull));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EBull));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    return _mm512_cmpge_epu16_mask(z, _mm512_set1_epi16((short)threshold));
}
#endif
