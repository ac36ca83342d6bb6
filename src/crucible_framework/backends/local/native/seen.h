// Packed heads, spans of tokens, and which of them see which others, by blocks of 32 queries and 32 keys. It multiplies nothing.
#pragma once
#include "blocks.h"

constexpr float HIDDEN = -1e30f;  // a score that is not seen, finite so that differences are
constexpr float FAINT = -1e20f;   // what a mask must exceed to be seen

struct Span {  // `count` runs of `length` tokens from `start` on, the first `skip` of each as keys only; mask [length - skip][length] or null
    int32_t start, count, length, skip;
    const float* mask;
    int kept() const { return length - skip; }
    int rows() const { return (kept() + BLOCK - 1) / BLOCK; }
    int columns() const { return (length + BLOCK - 1) / BLOCK; }
};

template <class N> struct Heads {  // x [tokens][queries + 2 keys][size]
    const N* x;
    int queries, keys, size;
    int groups() const { return queries / keys; }
    size_t stride() const { return (size_t)(queries + 2 * keys) * size; }
    size_t width() const { return (size_t)queries * size; }
    float scale() const { return 1.0f / std::sqrt((float)size); }
};

template <class N> struct Back {  // what the backward pass reads, and dx
    const N *g, *o;
    const float* lse;
    N* dx;
};

enum Sight : uint8_t { NONE, SOME, WHOLE };

// Which queries of one span see which keys, block by block.
struct Seen {
    const Span* span;
    std::vector<uint8_t> sights;  // of a mask, [rows][columns]
    Sight at(int row, int column) const {
        if (span->mask) return (Sight)sights[(size_t)row * span->columns() + column];
        const int first = span->skip + row * BLOCK, key = column * BLOCK;
        return key >= first + BLOCK ? NONE : key + BLOCK - 1 <= first ? WHOLE : SOME;
    }
    int end(int rows) const {  // one beyond the last block of keys that the first `rows` blocks of queries may see
        if (span->mask) return span->columns();
        return (std::min(span->length, span->skip + rows * BLOCK) + BLOCK - 1) / BLOCK;
    }
    void look(int row) {
        for (int column = 0; column < span->columns(); column++) {
            bool any = false, all = (column + 1) * BLOCK <= span->length;
            for (int q = row * BLOCK; q < std::min(span->kept(), (row + 1) * BLOCK); q++) {
                const float* at = span->mask + (size_t)q * span->length;
                for (int key = column * BLOCK; key < std::min(span->length, (column + 1) * BLOCK); key++)
                    any |= !(at[key] <= FAINT), all &= at[key] == 0.0f;
            }
            sights[(size_t)row * span->columns() + column] = !any ? NONE : all ? WHOLE : SOME;
        }
    }
    // Hides scores, before they are scaled, that are not seen.
    void hide(int row, int column, float inverse, float* s) const {
        for (int r = 0; r < BLOCK; r++, s += BLOCK) {
            const int q = row * BLOCK + r, key = column * BLOCK;
            const int count = std::max(0, std::min(BLOCK, span->mask ? span->length - key : span->skip + q + 1 - key));
            if (span->mask && q < span->kept()) {
                const float* added = span->mask + (size_t)q * span->length + key;
                for (int i = 0; i < count; i++) {
                    const float v = s[i] + added[i] * inverse;
                    s[i] = v < HIDDEN ? HIDDEN : v;  // a NaN stays one
                }
            }
            for (int i = count; i < BLOCK; i++) s[i] = HIDDEN;
        }
    }
};

// A thread's share: the blocks of queries [low, high) of the heads that share one key-value head of one run.
struct Unit {
    const Seen* seen;
    int run, head, low, high;
    float* sums;  // gradients of keys and values that others add to, [blocks][2][size / 32][32][32], or null
    int64_t token() const { return seen->span->start + (int64_t)run * seen->span->length; }
    int blocks() const { return seen->end(high); }
    int64_t cost() const { return (int64_t)(high - low) * (2 * blocks() - (seen->span->mask ? 0 : high - low)); }
};
