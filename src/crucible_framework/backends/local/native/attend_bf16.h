// Attention in bf16 with fp32 sums, by tiles or dot products: a share of the work in each direction. attend.cpp divides it.
#pragma once
#include "panels.h"
#include "seen.h"
#ifdef HAVE_BF16

namespace {

constexpr int CHUNK = 8;              // blocks of keys between two corrections of a row's sum
constexpr int QUERIES = 4, KEYS = 4;  // blocks that the backward pass multiplies at once
constexpr float LOG2E = 1.44269504088896341f;

// 2^t to 3e-6 of it, a hundredth of what bf16 rounds.
inline __m512 power(__m512 t) {
    const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t less the whole number below it, which scalef takes
    __m512 p = r * 1.3534142617e-02f + 5.2011509220e-02f;
    p = p * r + 2.4144272817e-01f;
    p = p * r + 6.9300383975e-01f;
    p = p * r + 1.0000025932e+00f;
    return _mm512_scalef_ps(p, t);
}
// The logarithm to base 2 of numbers above 0.
inline __m512 logarithm(__m512 x) {
    const __m512 e = _mm512_getexp_ps(x * 1.33333333f), m = _mm512_scalef_ps(x, -e);  // m in [3/4, 3/2)
    const __m512 f = (m - 1.0f) / (m + 1.0f), g = f * f;
    __m512 p = g * (1.0f / 9) + 1.0f / 7;
    p = p * g + 1.0f / 5;
    p = p * g + 1.0f / 3;
    p = p * g + 1.0f;
    return e + f * p * (2 * LOG2E);
}

// ------------------------------------------------------------------------------------------------------------------ forward
struct Row {  // a block of 32 queries of one head on its way through the keys
    alignas(64) float scores[CHUNK][SQUARE];
    alignas(64) Half p[CHUNK][SQUARE];
    alignas(64) float sums[BLOCK][16];
    alignas(64) float top[BLOCK];
    int columns[CHUNK];
    bool begun;
};

// Probabilities of `count` blocks of scores under the highest score so far; the result and sums so far are corrected where it rises.
void probabilities(Row& row, int count, int rows, int parts, float scale, float* acc) {
    for (int r = 0; r < rows; r++) {
        __m512 most = _mm512_set1_ps(HIDDEN);
        for (int b = 0; b < count; b++) {
            const float* s = row.scores[b] + r * BLOCK;
            most = _mm512_max_ps(most, _mm512_max_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(s + 16)));
        }
        const float top = std::max(_mm512_reduce_max_ps(most) * scale, FAINT);
        if (!row.begun) {
            row.top[r] = top;
            _mm512_store_ps(row.sums[r], _mm512_setzero_ps());
        } else if (top > row.top[r] + 8.0f) {  // below that nothing overflows
            const float less = std::exp2(row.top[r] - top);
            row.top[r] = top;
            _mm512_store_ps(row.sums[r], _mm512_load_ps(row.sums[r]) * less);
            for (int part = 0; part < parts; part++) {
                float* c = acc + part * SQUARE + r * BLOCK;
                _mm512_storeu_ps(c, _mm512_loadu_ps(c) * less);
                _mm512_storeu_ps(c + 16, _mm512_loadu_ps(c + 16) * less);
            }
        }
        const float base = row.top[r];
        __m512 sum = _mm512_load_ps(row.sums[r]);
        for (int b = 0; b < count; b++) {
            const float* s = row.scores[b] + r * BLOCK;
            const __m512 low = power(_mm512_loadu_ps(s) * scale - base), high = power(_mm512_loadu_ps(s + 16) * scale - base);
            sum += low + high;
            _mm512_storeu_si512(row.p[b] + r * BLOCK, halves(low, high));
        }
        _mm512_store_ps(row.sums[r], sum);
    }
}

// Divides by the sums, writes `rows` results and the logarithms of the sums.
void finish(Row& row, int rows, int parts, float* acc, Half* o, size_t width, float* lse, int heads) {
    alignas(64) float sums[BLOCK], logs[BLOCK];
    for (int r = 0; r < BLOCK; r++) sums[r] = r < rows ? _mm512_reduce_add_ps(_mm512_load_ps(row.sums[r])) : 1.0f;
    for (int r = 0; r < BLOCK; r += 16) _mm512_store_ps(logs + r, logarithm(_mm512_load_ps(sums + r)) + _mm512_load_ps(row.top + r));
    for (int r = 0; r < rows; r++) {
        const bool none = sums[r] == 0.0f;  // it sees nothing
        for (int part = 0; part < parts; part++) put(acc + part * SQUARE + r * BLOCK, 1, none ? 0.0f : 1.0f / sums[r], o + r * width + part * BLOCK, width, 0);
        if (lse) lse[(size_t)r * heads] = none ? -HIDDEN : logs[r];
    }
}

void forward(const Heads<Half>& h, const Unit& unit, Half* o, float* lse) {
    static thread_local Array<Half> packed;
    static thread_local Array<float> results;
    static thread_local Row row;
    const Seen& seen = *unit.seen;
    const Span& span = *seen.span;
    const int size = h.size, parts = size / BLOCK, blocks = unit.blocks(), keys = std::min(span.length, blocks * BLOCK);
    const size_t all = (size_t)blocks * BLOCK * size, panel = (size_t)blocks * SQUARE / 2;
    Half *k = room(packed, 2 * all + BLOCK * size), *v = k + all, *q = v + all;
    float* acc = room(results, (size_t)parts * SQUARE);
    const Half* key = h.x + unit.token() * h.stride() + (size_t)(h.queries + unit.head) * size;
    tokens_out(key, h.stride(), keys, blocks, size, k);
    tokens_in(key + (size_t)h.keys * size, h.stride(), keys, blocks, size, v);
    for (int block = unit.low; block < unit.high; block++)
        for (int head = unit.head * h.groups(); head < (unit.head + 1) * h.groups(); head++) {
            const int64_t token = unit.token() + span.skip + block * BLOCK;
            const int rows = std::min(BLOCK, span.kept() - block * BLOCK), end = seen.end(block + 1);
            tokens_plain(h.x + token * h.stride() + (size_t)head * size, h.stride(), rows, size, q);
            row.begun = false;
            for (int column = 0, count = 0; column < end || !row.begun; column++) {
                const Sight sight = column < end ? seen.at(block, column) : NONE;
                if (sight != NONE) {
                    const Term term = {q, (size_t)size, k + (size_t)column * BLOCK * size, (size_t)16 * size, size / 2};
                    product<2>(&term, 1, rows, row.scores[count], false);
                    if (sight == SOME) seen.hide(block, column, 1.0f / h.scale(), row.scores[count]);
                    row.columns[count++] = column;
                }
                if (count < CHUNK && column + 1 < end) continue;
                if (count == 0 && row.begun) break;
                probabilities(row, count, rows, parts, h.scale() * LOG2E, acc);
                Term terms[CHUNK];
                for (int part = 0; part < parts; part++) {
                    for (int b = 0; b < count; b++) terms[b] = {row.p[b], BLOCK, v + 2 * part * panel + row.columns[b] * SQUARE / 2, panel, 16};
                    product<2>(terms, count, rows, acc + part * SQUARE, row.begun);
                }
                row.begun = true, count = 0;
            }
            finish(row, rows, parts, acc, o + token * h.width() + (size_t)head * size, h.width(), lse ? lse + token * h.queries + head : nullptr, h.queries);
        }
}

// ----------------------------------------------------------------------------------------------------------------- backward
// A block of 32 queries of one head in the forms that are multiplied.
struct Query {
    Half *q, *g;                 // [32][size]
    Half *q_turned, *g_turned;   // [size][32]
    float *lse, *slope;          // [32]; slope: the sum of g * o
    float* dq;                   // [size / 32][32][32]
    bool begun;
};

// Blocks of probabilities and of the scores' gradients.
struct Slopes {
    alignas(64) Half p[QUERIES][KEYS][SQUARE];        // two panels of 16 keys, queries as inputs
    alignas(64) Half turned[QUERIES][KEYS][SQUARE];   // ds in the same form
    alignas(64) Half ds[QUERIES][KEYS][SQUARE];       // [32 queries][32 keys]
    alignas(64) float scores[SQUARE], dp[SQUARE];
    bool there[QUERIES][KEYS];
};

void slopes(Slopes& b, int i, int j, const Query& query, float scale) {
    for (int r = 0; r < BLOCK; r += 2) {
        __m512i p[2], ds[2];
        for (int two = 0; two < 2; two++) {
            const float *s = b.scores + (r + two) * BLOCK, *dp = b.dp + (r + two) * BLOCK, lse = query.lse[r + two], slope = query.slope[r + two];
            const __m512 low = power(_mm512_load_ps(s) * scale - lse), high = power(_mm512_load_ps(s + 16) * scale - lse);
            p[two] = halves(low, high);
            ds[two] = halves(low * (_mm512_load_ps(dp) - slope), high * (_mm512_load_ps(dp + 16) - slope));
            _mm512_store_si512(b.ds[i][j] + (r + two) * BLOCK, ds[two]);
        }
        paired(p[0], p[1], b.p[i][j] + r * 16);
        paired(ds[0], ds[1], b.turned[i][j] + r * 16);
    }
}

struct Scratch {
    Array<Half> keys, queries;
    Array<float> floats, local;
    std::vector<Query> query;
    std::vector<char> begun;
    Slopes slopes;
};

// Takes a unit's queries of one head, block by block.
void take(const Heads<Half>& h, const Unit& unit, int head, const Back<Half>& back, Scratch& scratch) {
    const Span& span = *unit.seen->span;
    const int size = h.size, count = unit.high - unit.low;
    Half* half = room(scratch.queries, (size_t)count * 4 * BLOCK * size);
    float* full = room(scratch.floats, (size_t)count * BLOCK * (size + 2));
    scratch.query.resize(count);
    for (int n = 0; n < count; n++) {
        Query& to = scratch.query[n];
        const int rows = std::min(BLOCK, span.kept() - (unit.low + n) * BLOCK);
        const int64_t token = unit.token() + span.skip + (unit.low + n) * BLOCK;
        to = {half, half + BLOCK * size, half + 2 * BLOCK * size, half + 3 * BLOCK * size, full, full + BLOCK, full + 2 * BLOCK, false};
        half += 4 * BLOCK * size, full += BLOCK * (size + 2);
        tokens_plain(h.x + token * h.stride() + (size_t)head * size, h.stride(), rows, size, to.q);
        tokens_plain(back.g + token * h.width() + (size_t)head * size, h.width(), rows, size, to.g);
        turned(to.q, size, to.q_turned);
        turned(to.g, size, to.g_turned);
        const Half* o = back.o + token * h.width() + (size_t)head * size;
        for (int r = 0; r < BLOCK; r++) {
            to.lse[r] = r < rows ? back.lse[(token + r) * h.queries + head] : -HIDDEN;
            __m512 sum = _mm512_setzero_ps();
            for (int k = 0; k < size && r < rows; k += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)row_of(o + k, h.width(), r, rows), (__m512bh)_mm512_loadu_si512(to.g + r * size + k));
            to.slope[r] = _mm512_reduce_add_ps(sum);
        }
    }
}

// Writes, or adds, 32 keys' gradients that are the sum of `count` shares [2][size / 32][32 numbers][32 keys].
void leave(const Heads<Half>& h, const Span& span, int64_t token, int head, int column, const float* const* shares, int count, Half* dx) {
    alignas(64) float rows[SQUARE];
    const int parts = h.size / BLOCK, here = std::min(BLOCK, span.length - column * BLOCK), add = std::max(0, span.skip - column * BLOCK);
    for (int value = 0; value < 2; value++)
        for (int part = 0; part < parts; part++) {
            Half* to = dx + (token + column * BLOCK) * h.stride() + (size_t)(h.queries + value * h.keys + head) * h.size + part * BLOCK;
            turned(shares, count, (size_t)(value * parts + part) * SQUARE, rows);
            put(rows, here, value ? 1.0f : h.scale(), to, h.stride(), add);
        }
}

struct Keys {  // of a unit, packed
    Half *k, *v, *inner;  // keys and values as outputs, keys as inputs
    int blocks;
};

// Adds what `rows` blocks of queries and `columns` of keys give.
void add(const Heads<Half>& h, const Keys& keys, Slopes& b, Query* query, int rows, int column, int columns, float* sums, char* begun) {
    const int size = h.size, parts = size / BLOCK;
    const size_t panel = (size_t)keys.blocks * SQUARE / 2;
    Term terms[std::max(QUERIES, KEYS)];
    for (int i = 0; i < rows; i++) {
        int count = 0;
        for (int j = 0; j < columns; j++)
            if (b.there[i][j]) terms[count++] = {b.ds[i][j], BLOCK, keys.inner + (column + j) * SQUARE / 2, panel, 16};
        for (int part = 0; part < parts && count; part++) {
            product<2>(terms, count, BLOCK, query[i].dq + part * SQUARE, query[i].begun);
            for (int n = 0; n < count; n++) terms[n].w += 2 * panel;
        }
        query[i].begun |= count > 0;
    }
    for (int value = 0; value < 2; value++)  // all of one kind, so that the queries stay in the nearest cache
        for (int j = 0; j < columns; j++) {
            int count = 0;
            for (int i = 0; i < rows; i++)
                if (b.there[i][j]) terms[count++] = {value ? query[i].g_turned : query[i].q_turned, BLOCK, value ? b.p[i][j] : b.turned[i][j], SQUARE / 2, 16};
            for (int part = 0; part < parts && count; part++) {
                product<2>(terms, count, BLOCK, sums + (size_t)((2 * j + value) * parts + part) * SQUARE, begun[j] & 1 << value);
                for (int n = 0; n < count; n++) terms[n].x += SQUARE;
            }
            if (count) begun[j] |= 1 << value;
        }
}

// Blocks of slopes of `rows` blocks of queries and `columns` of keys; false where none is seen.
bool slopes_of(const Heads<Half>& h, const Unit& unit, const Keys& keys, Slopes& b, const Query* query, int row, int rows, int column, int columns) {
    bool any = false;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            const Sight sight = unit.seen->at(row + i, column + j);
            b.there[i][j] = sight != NONE;
            if (sight == NONE) continue;
            any = true;
            const size_t place = (size_t)(column + j) * BLOCK * h.size, size = h.size;
            const Term s = {query[i].q, size, keys.k + place, 16 * size, h.size / 2}, dp = {query[i].g, size, keys.v + place, 16 * size, h.size / 2};
            product<2>(&s, 1, BLOCK, b.scores, false);
            product<2>(&dp, 1, BLOCK, b.dp, false);
            if (sight == SOME) unit.seen->hide(row + i, column + j, 1.0f / h.scale(), b.scores);
            slopes(b, i, j, query[i], h.scale() * LOG2E);
        }
    return any;
}

void backward(const Heads<Half>& h, const Unit& unit, const Back<Half>& back) {
    static thread_local Scratch scratch;
    const Span& span = *unit.seen->span;
    const int size = h.size, parts = size / BLOCK, many = unit.high - unit.low;
    const size_t share = (size_t)2 * parts * SQUARE;
    Keys keys;
    keys.blocks = unit.blocks();
    const int count = std::min(span.length, keys.blocks * BLOCK);
    const size_t all = (size_t)keys.blocks * BLOCK * size;
    keys.k = room(scratch.keys, 3 * all), keys.v = keys.k + all, keys.inner = keys.v + all;
    const Half* key = h.x + unit.token() * h.stride() + (size_t)(h.queries + unit.head) * size;
    tokens_out(key, h.stride(), count, keys.blocks, size, keys.k);
    tokens_out(key + (size_t)h.keys * size, h.stride(), count, keys.blocks, size, keys.v);
    tokens_in(key, h.stride(), count, keys.blocks, size, keys.inner);
    float* sums = unit.sums ? unit.sums : room(scratch.local, keys.blocks * share);
    scratch.begun.assign(keys.blocks, 0);
    for (int head = unit.head * h.groups(); head < (unit.head + 1) * h.groups(); head++) {
        take(h, unit, head, back, scratch);
        for (int column = 0; column < keys.blocks; column += KEYS) {
            const int columns = std::min(KEYS, keys.blocks - column);
            for (int row = 0; row < many; row += QUERIES) {
                const int rows = std::min(QUERIES, many - row);
                Query* query = &scratch.query[row];
                if (slopes_of(h, unit, keys, scratch.slopes, query, unit.low + row, rows, column, columns))
                    add(h, keys, scratch.slopes, query, rows, column, columns, sums + column * share, &scratch.begun[column]);
            }
        }
        for (int n = 0; n < many; n++) {
            Query& query = scratch.query[n];
            const int block = unit.low + n, rows = std::min(BLOCK, span.kept() - block * BLOCK);
            if (!query.begun) memset(query.dq, 0, (size_t)size * BLOCK * sizeof(float));
            Half* to = back.dx + (unit.token() + span.skip + block * BLOCK) * h.stride() + (size_t)head * size;
            for (int part = 0; part < parts; part++) put(query.dq + part * SQUARE, rows, h.scale(), to + part * BLOCK, h.stride(), 0);
        }
    }
    for (int column = 0; column < keys.blocks; column++) {
        const float* mine = sums + column * share;
        if (!scratch.begun[column]) memset(sums + column * share, 0, share * sizeof(float));
        if (!unit.sums) leave(h, span, unit.token(), unit.head, column, &mine, 1, back.dx);
    }
}

}  // namespace
#endif
