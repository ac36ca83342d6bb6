// What stands between products in training, for 32 numbers at a time, fp32 or bf16: norm, gate, dropout. Sums and steps are fp32.
#pragma once
#include "blocks.h"

struct Two { Vec low, high; };  // 32 numbers

// 32 numbers as they stand in memory, the same as fp32, and back.
static inline Two raw(const float* p) { return {load(p), load(p + 16)}; }
static inline void set(float* p, const Two& v) { store(p, v.low), store(p + 16, v.high); }
static inline Vec lower(const Two& v) { return v.low; }
static inline Vec upper(const Two& v) { return v.high; }
static inline Two keep(const Two& v, uint32_t bits) { return {masked(v.low, bits & 0xffff), masked(v.high, bits >> 16)}; }
static inline void put(float* p, const Vec& low, const Vec& high, bool past = false) {
    if (past) stream(p, low), stream(p + 16, high);
    else set(p, {low, high});
}
#ifdef HAVE_BF16
typedef __m512i Halves;

static inline Halves raw(const uint16_t* p) { return _mm512_loadu_si512(p); }
static inline void set(uint16_t* p, Halves v) { _mm512_storeu_si512(p, v); }
static inline Vec lower(Halves v) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16); }
static inline Vec upper(Halves v) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16); }
static inline Halves keep(Halves v, uint32_t bits) { return _mm512_maskz_mov_epi16(bits, v); }
static inline void put(uint16_t* p, Vec low, Vec high, bool past = false) {
    if (past) _mm512_stream_si512((Halves*)p, halves(low, high));
    else set(p, halves(low, high));
}
#endif
template <class N> using Raw = decltype(raw((const N*)nullptr));
template <class N> static inline Raw<N> as(const Vec& low, const Vec& high) {
#ifdef HAVE_BF16
    if constexpr (sizeof(N) == 2) return halves(low, high);
    else
#endif
    return {low, high};
}
template <class N> static inline Raw<N> zeros() { return as<N>(all(0.0f), all(0.0f)); }
template <class N> static inline N near(float x) {
    if constexpr (sizeof(N) == 4) return x;
    else return rounded(x);
}

// exp to about 2 ulp.
template <class N> static inline Vec exponential(const Vec& x) {
#ifdef HAVE_BF16
    if constexpr (sizeof(N) == 2) {  // with infinity and 0 where they belong. Source: Cephes' expf.
        const __m512 n = _mm512_roundscale_ps((__m512)x * _mm512_set1_ps(1.44269504088896341f), 8);
        const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), (__m512)x));
        __m512 p = _mm512_set1_ps(1.9875691500e-4f);
        for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(next));
        return (Vec)_mm512_scalef_ps(_mm512_fmadd_ps(p, r * r, r + _mm512_set1_ps(1.0f)), n);
    }
#endif
    return exp16(x);
}
template <class N> static inline Vec logistic(const Vec& x) {
#ifdef HAVE_BF16
    if constexpr (sizeof(N) == 2) return (Vec)_mm512_rcp14_ps((__m512)(1.0f + exponential<N>(-x)));  // to 2^-14: bf16 has 2^-9
#endif
    return 1.0f / (1.0f + exponential<N>(-x));
}
template <class N> static inline Raw<N> gate(const Raw<N>& a, const Raw<N>& b) {
    return as<N>(lower(a) * logistic<N>(lower(a)) * lower(b), upper(a) * logistic<N>(upper(a)) * upper(b));
}
template <class N> static inline void gate_slopes(const Vec& g, const Vec& a, const Vec& b, Vec& da, Vec& db) {
    const Vec s = logistic<N>(a);
    da = g * b * s * (1.0f + a * (1.0f - s)), db = g * a * s;
}

template <class N> static inline float inverse_rms(const N* x, int width, float eps) {
    Vec low = all(0.0f), high = low;
    for (int i = 0; i < width; i += 32) {
        const auto a = raw(x + i);
        low += lower(a) * lower(a), high += upper(a) * upper(a);
    }
    return 1.0f / std::sqrt(sum(low + high) / width + eps);
}
template <class N> static inline Raw<N> scaled(const Raw<N>& a, const Raw<N>& weight, float scale) {
    return as<N>(lower(a) * scale * lower(weight), upper(a) * scale * upper(weight));
}
// A row's gradient through its norm, from g in pieces `step` apart. `extra` is added: the gradient that comes through the residual.
template <class N> static inline void norm_back(const N* g, int step, const N* x, const N* w, const N* extra, N* out, int width, float scale) {
    Vec low = all(0.0f), high = low;
    for (int i = 0; i < width; i += 32) {
        const auto u = raw(g + i / 32 * step), a = raw(x + i), b = raw(w + i);
        low += lower(u) * lower(b) * lower(a), high += upper(u) * upper(b) * upper(a);
    }
    const float slope = -sum(low + high) * scale * scale * scale / width;
    for (int i = 0; i < width; i += 32) {
        const auto u = raw(g + i / 32 * step), a = raw(x + i), b = raw(w + i);
        Vec first = lower(u) * lower(b) * scale + lower(a) * slope, second = upper(u) * upper(b) * scale + upper(a) * slope;
        if (extra) first += lower(raw(extra + i)), second += upper(raw(extra + i));
        put(out + i, first, second);
    }
}

// Which of 32 numbers dropout keeps: 16 random bits each, as train.cpp's `drop` has them; `word` is the first of 8 words of the counter.
static inline uint32_t kept(uint64_t start, uint64_t word, int threshold) {
#ifdef HAVE_BF16
    const __m512i steps = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8), golden = _mm512_set1_epi64(0x9E3779B97F4A7C15ull);
    __m512i z = _mm512_mullo_epi64(_mm512_add_epi64(_mm512_set1_epi64(word), steps), golden);
    z = _mm512_add_epi64(z, _mm512_set1_epi64(start));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9ull));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EBull));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    return _mm512_cmpge_epu16_mask(z, _mm512_set1_epi16((short)threshold));
#else
    typedef uint64_t Words __attribute__((vector_size(32)));
    typedef uint16_t Lots __attribute__((vector_size(32)));
    uint32_t bits = 0;
    for (int half = 0; half < 2; half++) {
        Words z = (Words{word, word, word, word} + Words{1, 2, 3, 4} + (uint64_t)(4 * half)) * 0x9E3779B97F4A7C15ull + start;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        const auto stay = (Lots)z >= (Lots{} + (uint16_t)threshold);
#if defined(__AVX2__)
        const __m128i low = _mm256_castsi256_si128((__m256i)stay), high = _mm256_extracti128_si256((__m256i)stay, 1);
        bits |= (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(low, high)) << (16 * half);
#else
        for (int i = 0; i < 16; i++) bits |= (uint32_t)(stay[i] != 0) << (16 * half + i);
#endif
    }
    return bits;
#endif
}
