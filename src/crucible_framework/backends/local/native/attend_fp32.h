// Attention in fp32 by vectors: a share of the work in each direction. attend.cpp divides it.
#pragma once
#include "seen.h"

namespace {

#if defined(__AVX512F__)
constexpr int TALL = 8, BROAD = 2;  // rows, and vectors of 16 outputs, whose sums the registers hold
#else
constexpr int TALL = 6, BROAD = 1;
#endif
constexpr int PIECE = 8;  // blocks of keys between two corrections of a row's sum

// A product's left side, whose number k of row r is x[r * row + k * step], and its right side, rows of 32 outputs.
struct Factor {
    const float* x;
    size_t row, step;
    const float* w;
    size_t stride;
    int count;
};

template <int ROWS, int VECTORS> inline void by_vectors(const Factor* factors, int many, int from, int column, float* c, bool add) {
    Vec acc[ROWS][VECTORS];
    clear(acc);
    c += from * BLOCK + column;
    if (add) unrolled<ROWS>([&](auto r) INLINED { unrolled<VECTORS>([&](auto v) INLINED { acc[r][v] = load(c + r * BLOCK + v * 16); }); });
    for (const Factor* f = factors; f < factors + many; f++) {
        const size_t row = f->row, step = f->step, stride = f->stride;
        const float *x = f->x + from * row, *w = f->w + column;
        for (int k = 0; k < f->count; k++, x += step, w += stride) {
            Vec one[VECTORS];
            unrolled<VECTORS>([&](auto v) INLINED { one[v] = load(w + v * 16); });
            unrolled<ROWS>([&](auto r) INLINED { unrolled<VECTORS>([&](auto v) INLINED { acc[r][v] += one[v] * x[r * row]; }); });
        }
    }
    unrolled<ROWS>([&](auto r) INLINED { unrolled<VECTORS>([&](auto v) INLINED { store(c + r * BLOCK + v * 16, acc[r][v]); }); });
}

// c[32][32], the sum of the products, added to what is there where `add` says so; of `rows` rows.
inline void multiply(const Factor* factors, int many, int rows, float* c, bool add) {
    for (int column = 0; column < BLOCK; column += 16 * BROAD) {
        int r = 0;
        for (; r + TALL <= rows; r += TALL) by_vectors<TALL, BROAD>(factors, many, r, column, c, add);
        for (; r < rows; r++) by_vectors<1, BROAD>(factors, many, r, column, c, add);
    }
}

// Rows of tokens without gaps, up to a whole block of them, those that are not there 0.
inline void tokens_plain(const float* from, size_t stride, int count, int blocks, int size, float* to) {
    for (int t = 0; t < blocks * BLOCK; t++, to += size) {
        if (t < count) memcpy(to, from + (size_t)t * stride, size * sizeof(float));
        else memset(to, 0, size * sizeof(float));
    }
}
// The same as outputs: [blocks][size][32 tokens].
inline void tokens_out(const float* from, size_t stride, int count, int blocks, int size, float* to) {
    for (int block = 0; block < blocks; block++, to += size * BLOCK)
        for (int t = 0; t < BLOCK; t++) {
            const int token = block * BLOCK + t;
            for (int k = 0; k < size; k++) to[k * BLOCK + t] = token < count ? from[(size_t)token * stride + k] : 0.0f;
        }
}

inline void put(const float* from, int rows, float scale, float* to, size_t stride, int add) {
    for (int r = 0; r < rows; r++, from += BLOCK, to += stride)
        for (int i = 0; i < BLOCK; i += 16) store(to + i, r < add ? load(to + i) + load(from + i) * scale : load(from + i) * scale);
}

// ------------------------------------------------------------------------------------------------------------------ forward
struct Way {  // of a block of 32 queries of one head through the keys
    alignas(64) float scores[PIECE][BLOCK * BLOCK];
    float top[BLOCK], sums[BLOCK];
    int columns[PIECE];
    bool begun;
};

void probabilities(Way& way, int count, int rows, int parts, float scale, float* acc) {
    for (int r = 0; r < rows; r++) {
        Vec most = all(HIDDEN), sum = all(0.0f);
        for (int b = 0; b < count; b++)
            for (int i = 0; i < BLOCK; i += 16) most = larger(most, load(way.scores[b] + r * BLOCK + i));
        const float top = std::max(highest(most) * scale, FAINT);
        if (!way.begun) {
            way.top[r] = top, way.sums[r] = 0;
        } else if (top > way.top[r]) {
            const float less = std::exp(way.top[r] - top);
            way.top[r] = top, way.sums[r] *= less;
            for (int part = 0; part < parts; part++)
                for (int i = 0; i < BLOCK; i += 16) store(acc + (part * BLOCK + r) * BLOCK + i, load(acc + (part * BLOCK + r) * BLOCK + i) * less);
        }
        for (int b = 0; b < count; b++)
            for (int i = 0; i < BLOCK; i += 16) {
                float* s = way.scores[b] + r * BLOCK + i;
                const Vec p = exp16(load(s) * scale - all(way.top[r]));
                store(s, p);
                sum += p;
            }
        way.sums[r] += ::sum(sum);
    }
}

void forward(const Heads<float>& h, const Unit& unit, float* o, float* lse) {
    static thread_local Array<float> packed;
    static thread_local Way way;
    const Seen& seen = *unit.seen;
    const Span& span = *seen.span;
    const int size = h.size, parts = size / BLOCK, blocks = unit.blocks(), keys = std::min(span.length, blocks * BLOCK);
    const size_t every = (size_t)blocks * BLOCK * size, wide = (size_t)BLOCK * size;
    float *k = room(packed, 2 * every + 2 * wide), *v = k + every, *q = v + every, *acc = q + wide;
    const float* key = h.x + unit.token() * h.stride() + (size_t)(h.queries + unit.head) * size;
    tokens_out(key, h.stride(), keys, blocks, size, k);
    tokens_plain(key + (size_t)h.keys * size, h.stride(), keys, blocks, size, v);
    for (int block = unit.low; block < unit.high; block++)
        for (int head = unit.head * h.groups(); head < (unit.head + 1) * h.groups(); head++) {
            const int64_t token = unit.token() + span.skip + block * BLOCK;
            const int rows = std::min(BLOCK, span.kept() - block * BLOCK), end = seen.end(block + 1);
            tokens_plain(h.x + token * h.stride() + (size_t)head * size, h.stride(), rows, 1, size, q);
            way.begun = false;
            for (int column = 0, count = 0; column < end || !way.begun; column++) {
                const Sight sight = column < end ? seen.at(block, column) : NONE;
                if (sight != NONE) {
                    const Factor factor = {q, (size_t)size, 1, k + column * wide, BLOCK, size};
                    multiply(&factor, 1, rows, way.scores[count], false);
                    if (sight == SOME) seen.hide(block, column, 1.0f / h.scale(), way.scores[count]);
                    way.columns[count++] = column;
                }
                if (count < PIECE && column + 1 < end) continue;
                if (count == 0 && way.begun) break;
                probabilities(way, count, rows, parts, h.scale(), acc);
                Factor factors[PIECE];
                for (int part = 0; part < parts; part++) {
                    for (int b = 0; b < count; b++) factors[b] = {way.scores[b], BLOCK, 1, v + way.columns[b] * wide + part * BLOCK, (size_t)size, BLOCK};
                    multiply(factors, count, rows, acc + part * BLOCK * BLOCK, way.begun);
                }
                way.begun = true, count = 0;
            }
            for (int r = 0; r < rows; r++) {
                const bool none = way.sums[r] == 0.0f;  // it sees nothing
                for (int part = 0; part < parts; part++)
                    put(acc + (part * BLOCK + r) * BLOCK, 1, none ? 0.0f : 1.0f / way.sums[r], o + (token + r) * h.width() + (size_t)head * size + part * BLOCK, 0, 0);
                if (lse) lse[(token + r) * h.queries + head] = none ? -HIDDEN : way.top[r] + std::log(way.sums[r]);
            }
        }
}

// ----------------------------------------------------------------------------------------------------------------- backward
// Writes, or adds, 32 keys' gradients that are the sum of `count` shares [2][size / 32][32 keys][32 numbers].
void leave(const Heads<float>& h, const Span& span, int64_t token, int head, int column, const float* const* shares, int count, float* dx) {
    const int here = std::min(BLOCK, span.length - column * BLOCK), add = std::max(0, span.skip - column * BLOCK);
    for (int value = 0; value < 2; value++)
        for (int part = 0; part < h.size / BLOCK; part++) {
            alignas(64) float rows[BLOCK * BLOCK];
            for (int i = 0; i < BLOCK * BLOCK; i += 16) {
                Vec total = all(0.0f);
                for (int n = 0; n < count; n++) total += load(shares[n] + (size_t)(value * h.size / BLOCK + part) * BLOCK * BLOCK + i);
                store(rows + i, total);
            }
            float* to = dx + (token + column * BLOCK) * h.stride() + (size_t)(h.queries + value * h.keys + head) * h.size + part * BLOCK;
            put(rows, here, value ? 1.0f : h.scale(), to, h.stride(), add);
        }
}

// Probabilities in place of scores, and the scores' gradients in place of the probabilities'.
inline void slopes(float* s, float* dp, int rows, float scale, const float* lse, const float* slope) {
    for (int r = 0; r < rows; r++)
        for (int i = r * BLOCK; i < (r + 1) * BLOCK; i += 16) {
            const Vec p = exp16(load(s + i) * scale - all(lse[r]));
            store(s + i, p);
            store(dp + i, p * (load(dp + i) - all(slope[r])));
        }
}

struct Taken {  // a unit's keys and values as outputs, keys as rows; a head's queries, upstream and dq, all by blocks of 32
    float *k, *v, *rows, *q, *g, *dq, *lse, *slope;
};

void head_back(const Heads<float>& h, const Unit& unit, const Back<float>& back, int head, const Taken& t, float* sums, char* begun) {
    alignas(64) float s[BLOCK * BLOCK], dp[BLOCK * BLOCK];
    const Span& span = *unit.seen->span;
    const int size = h.size, parts = size / BLOCK, square = BLOCK * BLOCK, many = unit.high - unit.low;
    const size_t wide = (size_t)BLOCK * size, stride = size;
    const int64_t first = unit.token() + span.skip + unit.low * BLOCK;
    const int tokens = std::min(many * BLOCK, span.kept() - unit.low * BLOCK);
    tokens_plain(h.x + first * h.stride() + (size_t)head * size, h.stride(), tokens, many, size, t.q);
    tokens_plain(back.g + first * h.width() + (size_t)head * size, h.width(), tokens, many, size, t.g);
    for (int n = 0; n < tokens; n++) {
        const float* o = back.o + (first + n) * h.width() + (size_t)head * size;
        Vec dot = all(0.0f);
        for (int k = 0; k < size; k += 16) dot += load(o + k) * load(t.g + n * stride + k);
        t.slope[n] = sum(dot), t.lse[n] = back.lse[(first + n) * h.queries + head];
    }
    memset(t.dq, 0, many * wide * sizeof(float));
    for (int column = 0; column < unit.blocks(); column++)
        for (int row = 0; row < many; row++) {
            const Sight sight = unit.seen->at(unit.low + row, column);
            if (sight == NONE) continue;
            const int rows = std::min(BLOCK, tokens - row * BLOCK);
            const float *q = t.q + row * wide, *g = t.g + row * wide;
            const Factor score = {q, stride, 1, t.k + column * wide, BLOCK, size}, up = {g, stride, 1, t.v + column * wide, BLOCK, size};
            multiply(&score, 1, rows, s, false);
            multiply(&up, 1, rows, dp, false);
            if (sight == SOME) unit.seen->hide(unit.low + row, column, 1.0f / h.scale(), s);
            slopes(s, dp, rows, h.scale(), t.lse + row * BLOCK, t.slope + row * BLOCK);
            float* mine = sums + column * 2 * wide;
            for (int part = 0; part < parts; part++) {
                const Factor dq = {dp, BLOCK, 1, t.rows + column * wide + part * BLOCK, stride, BLOCK};
                const Factor dk = {dp, 1, BLOCK, q + part * BLOCK, stride, rows}, dv = {s, 1, BLOCK, g + part * BLOCK, stride, rows};
                multiply(&dq, 1, rows, t.dq + (row * parts + part) * square, true);
                multiply(&dk, 1, BLOCK, mine + part * square, begun[column]);
                multiply(&dv, 1, BLOCK, mine + (parts + part) * square, begun[column]);
            }
            begun[column] = 1;
        }
    for (int row = 0; row < many; row++)
        for (int part = 0; part < parts; part++)
            put(t.dq + (row * parts + part) * square, std::min(BLOCK, tokens - row * BLOCK), h.scale(),
                back.dx + (first + row * BLOCK) * h.stride() + (size_t)head * size + part * BLOCK, h.stride(), 0);
}

void backward(const Heads<float>& h, const Unit& unit, const Back<float>& back) {
    static thread_local Array<float> packed, local;
    static thread_local std::vector<char> begun;
    const Span& span = *unit.seen->span;
    const int size = h.size, blocks = unit.blocks(), keys = std::min(span.length, blocks * BLOCK);
    const size_t every = (size_t)blocks * BLOCK * size, some = (size_t)(unit.high - unit.low) * BLOCK * size;
    Taken t;
    t.k = room(packed, 3 * every + 3 * some + 2 * some / size), t.v = t.k + every, t.rows = t.v + every;
    t.q = t.rows + every, t.g = t.q + some, t.dq = t.g + some, t.lse = t.dq + some, t.slope = t.lse + some / size;
    const float* key = h.x + unit.token() * h.stride() + (size_t)(h.queries + unit.head) * size;
    tokens_out(key, h.stride(), keys, blocks, size, t.k);
    tokens_out(key + (size_t)h.keys * size, h.stride(), keys, blocks, size, t.v);
    tokens_plain(key, h.stride(), keys, blocks, size, t.rows);
    float* sums = unit.sums ? unit.sums : room(local, 2 * every);
    begun.assign(blocks, 0);
    for (int head = unit.head * h.groups(); head < (unit.head + 1) * h.groups(); head++) head_back(h, unit, back, head, t, sums, begun.data());
    for (int column = 0; column < blocks; column++) {
        float* mine = sums + (size_t)column * 2 * BLOCK * size;
        if (!begun[column]) memset(mine, 0, (size_t)2 * BLOCK * size * sizeof(float));
        if (!unit.sums) leave(h, span, unit.token(), unit.head, column, &mine, 1, back.dx);
    }
}

}  // namespace
