// Frozen matrices, and rows of activations in the forms that the ways of multiplying them read. It multiplies nothing.
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

// 32 neighbours of a row: lowest + scale * steps, where neither the product nor the sum is rounded.
struct Affine {
    float scale, lowest;
    uint8_t steps[32];
    Lane numbers(int at) const { return lane(steps + at) * scale + lowest; }
};
template <class W> constexpr int EACH = std::is_same<W, Affine>::value ? 32 : 1;  // numbers of an item

// `count` numbers of a row as fp32.
static inline void widen(const Affine* from, int count, float* to) {
    for (int k = 0; k < count; k += 32, from++)
        for (int i = 0; i < 32; i += LANES) store(to + k + i, from->numbers(i));
}
template <class W> static inline void widen(const W* from, int count, float* to) {
    int k = 0;
    for (; k + LANES <= count; k += LANES) store(to + k, lane(from + k));
    for (; k < count; k++) to[k] = number(from[k]);
}

struct Matrix {
    const void* weight;    // [outputs][inputs], or [outputs][inputs / 32] groups
    const float* scale;    // of int8 weights, per output
    const float* bias;     // per output, or null
    const int32_t* sums;   // of int8 weights, per output
    int32_t outputs, inputs, kind;
};

static inline bool keeps_fp32(int kind) { return kind == FLOAT32 || kind >= EXACT; }  // whether activations stay as they are

enum Way { PLAIN, COLUMNS, DOTS, TILES };  // fp32 vectors, the same with 16 rows beside each other, AVX-512's bf16 dot products, AMX tiles

// Rows of activations in the form that the way of multiplying reads.
struct Rows {
    Way way = PLAIN;
    int count = 0, width = 0;
    Array<float> plain;      // [count][width]
    Array<float> columns;    // [count / 16][width][16]
    Array<uint16_t> halves;  // [count][width]
    Array<uint32_t> pairs;   // [count / 16][width / 2][16]: what an AMX tile reads
    // For int8 weights on AMX: x = step (256 high + low - 32768), which is finer than bf16, so that products are exact whole numbers.
    bool bytes = false, adapted = false;
    Array<uint8_t> high, low;                // [count][width]
    Array<uint32_t> high_quads, low_quads;   // [count / 16][width / 4][16]
    Array<float> step;
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

#if defined(__AVX512F__)
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
#endif

// 8 x 8 numbers, rows to columns.
static inline void turned(const float* from, size_t from_row, float* to, size_t to_row) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * from_row);
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int r = 0; r < 8; r++) to[r * to_row + i] = from[i * from_row + r];
#endif
}

#ifdef HAVE_AMX
static inline bool allow_tiles() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return allowed;
}
// gcc does not know that a tile is read from memory: what was stored must be there before.
static inline void written() { asm volatile("" : : : "memory"); }
static inline void open_tiles() {
    struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(config));  // gcc's own function reads 8 of the 64 bytes, and the others may never be written
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
        float* from = &plain[(size_t)block * 16 * width];
        float* to = &columns[(size_t)block * 16 * width];
        const int here = std::min(16, count - block * 16);
        memset(from + (size_t)here * width, 0, (size_t)(16 - here) * width * sizeof(float));  // there is room for whole blocks
        int k = 0;
        for (; k + 8 <= width; k += 8)
            for (int i = 0; i < 16; i += 8) turned(from + (size_t)i * width + k, width, to + (size_t)k * 16 + i, 16);
        for (; k < width; k++)
            for (int i = 0; i < 16; i++) to[k * 16 + i] = from[(size_t)i * width + k];
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
