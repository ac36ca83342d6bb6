// Attention of new tokens to the keys and values that stand in pages of 16 tokens.
// A page holds, per layer, [heads][size][16] keys (so that 16 scores are one vector) and then [heads][16][room] values.
#pragma once
#include "products.h"

struct Pages {
    char* pool;
    int64_t layer_bytes, page_bytes;
    int32_t heads, size, room;  // key-value heads, their size, and that rounded up to 16
    template <class T> T* keys(int layer, int page, int head) const {
        return (T*)(pool + layer * layer_bytes + page * page_bytes) + (size_t)head * size * 16;
    }
    template <class T> T* values(int layer, int page, int head) const {
        return (T*)(pool + layer * layer_bytes + page * page_bytes) + (size_t)heads * size * 16 + (size_t)head * 16 * room;
    }
};

static inline float kept(float x, float*) { return x; }
static inline uint16_t kept(float x, uint16_t*) { return rounded(x); }

template <class T> static void remember(const Pages& pages, int layer, const int32_t* table, int place, const float* k, const float* v) {
    const int page = table[place / 16], column = place % 16;
    for (int h = 0; h < pages.heads; h++) {
        T *keys = pages.keys<T>(layer, page, h), *values = pages.values<T>(layer, page, h) + (size_t)column * pages.room;
        for (int d = 0; d < pages.size; d++) {
            keys[d * 16 + column] = kept(k[h * pages.size + d], (T*)nullptr);
            values[d] = kept(v[h * pages.size + d], (T*)nullptr);
        }
        for (int d = pages.size; d < pages.room; d++) values[d] = T(0);
    }
}

template <class T, int Q> static void scores_of(const T* keys, int size, const float* const* q, float* const* to) {
    Vec acc[Q] = {};
    for (int d = 0; d < size; d++) {
        Vec k = load(keys + d * 16);
        for (int i = 0; i < Q; i++) acc[i] += k * q[i][d];
    }
    for (int i = 0; i < Q; i++) store(to[i], acc[i]);
}
template <class T> static void scores_of(const T* keys, int size, const float* const* q, float* const* to, int count) {
    for (; count >= 6; count -= 6, q += 6, to += 6) scores_of<T, 6>(keys, size, q, to);
    if (count >= 3) { scores_of<T, 3>(keys, size, q, to); count -= 3, q += 3, to += 3; }
    for (; count > 0; count--, q++, to++) scores_of<T, 1>(keys, size, q, to);
}

template <class T, int Q, int V>
static void mixed(const Pages& pages, int layer, const int32_t* table, int head, int from, int length, const float* const* p, float* const* to, int width) {
    Vec acc[Q][V] = {};
    for (int start = 0; start < length; start += 16) {
        const T* values = pages.values<T>(layer, table[start / 16], head) + from;
        const int many = std::min(16, length - start);
        for (int j = 0; j < many; j++)
            for (int n = 0; n < V; n++) {
                Vec v = load(values + (size_t)j * pages.room + n * 16);
                for (int i = 0; i < Q; i++) acc[i][n] += v * p[i][start + j];
            }
    }
    for (int i = 0; i < Q; i++)
        for (int n = 0; n < V; n++) {
            const int at = from + n * 16;
            if (at + 16 <= width) store(to[i] + at, acc[i][n]);
            else memcpy(to[i] + at, &acc[i][n], (width - at) * sizeof(float));
        }
}
template <class T, int V>
static void mixed(const Pages& pages, int layer, const int32_t* table, int head, int from, int length, const float* const* p, float* const* to, int count) {
    const int width = pages.size;
    for (; count >= 6; count -= 6, p += 6, to += 6) mixed<T, 6, V>(pages, layer, table, head, from, length, p, to, width);
    if (count >= 3) { mixed<T, 3, V>(pages, layer, table, head, from, length, p, to, width); count -= 3, p += 3, to += 3; }
    for (; count > 0; count--, p++, to++) mixed<T, 1, V>(pages, layer, table, head, from, length, p, to, width);
}

template <class T> static inline void fetch(const T* from, int count) {
    for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// `count` queries of one sequence and one key-value head; query i sees the first lengths[i] tokens.
template <class T>
static void attend(const Pages& pages, int layer, const int32_t* table, int head, int count, const float* const* q, const int* lengths, float* const* to,
                   Scratch& scratch) {
    int longest = 0;
    for (int i = 0; i < count; i++) longest = std::max(longest, lengths[i]);
    const size_t stride = (size_t)(longest + 15) / 16 * 16;
    if (scratch.scores.size() < stride * count) scratch.scores.resize(stride * count * 2);
    std::vector<float*>& p = scratch.rows;
    std::vector<float*>& at = scratch.at;
    p.resize(count), at.resize(count);
    for (int i = 0; i < count; i++) p[i] = &scratch.scores[i * stride];
    for (int start = 0; start < longest; start += 16) {
        // Pages lie anywhere in memory: the next one's keys and this one's values are asked for while these scores are made.
        if (start + 16 < longest) fetch(pages.keys<T>(layer, table[start / 16 + 1], head), pages.size * 16);
        fetch(pages.values<T>(layer, table[start / 16], head), pages.room * 16);
        for (int i = 0; i < count; i++) at[i] = p[i] + start;
        scores_of<T>(pages.keys<T>(layer, table[start / 16], head), pages.size, q, at.data(), count);
    }
    for (int i = 0; i < count; i++) {
        float* row = p[i];
        const int n = lengths[i];
        for (int j = n; j < (int)stride; j++) row[j] = -INFINITY;
        Vec top = all(-INFINITY);
        for (int j = 0; j < n; j += 16) top = larger(top, load(row + j));
        const Vec most = all(highest(top));
        Vec total = {};
        for (int j = 0; j < n; j += 16) {
            Vec e = exp16(load(row + j) - most);
            store(row + j, e);
            total += e;
        }
        const Vec inverse = all(1.0f / sum(total));
        for (int j = 0; j < (int)stride; j += 16) store(row + j, j < n ? load(row + j) * inverse : Vec{});
    }
    for (int from = 0; from < pages.room;) {
        if (LANES == 16 && from + 64 <= pages.room) mixed<T, 4>(pages, layer, table, head, from, longest, p.data(), to, count), from += 64;
        else mixed<T, 1>(pages, layer, table, head, from, longest, p.data(), to, count), from += 16;
    }
}
