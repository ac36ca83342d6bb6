// A frozen matrix with low-rank adapters beside it, its norm, gate, dropout and residual: the forward and the backward pass of each as one
// walk over chunks of rows that stay in the processor's own cache. fp32, or bf16 with fp32 sums where the processor has products of it.
// Python's side is linear.py, whose callers have torch code for the same numbers up to rounding.
#include "head.h"

namespace {

// What the matrix reads of some rows, and r where it is to be found.
template <class N> const N* enter(const Call<N>& c, int from, int rows, bool again) {
    const int width = c.inputs, wide = c.gated ? 2 * width : width;
    const N* h = c.h + (size_t)from * wide;
    N* x = room(scratch<N>().x, (size_t)CHUNK<N> * width);
    if (!c.norm && !c.gated) return cut(h, rows, width, x);
    for (int t = 0; t < up32(rows); t++, h += wide) {
        if (c.norm && t < rows && !again) c.r[from + t] = inverse_rms(h, width, c.eps);
        for (int k = 0; k < width; k += 32) {
            auto v = zeros<N>();
            if (t < rows) v = c.gated ? gate<N>(raw(h + k), raw(h + width + k)) : scaled<N>(raw(h + k), raw(c.norm + k), c.r[from + t]);
            set(x + place(t, k, width), v);
        }
    }
    return x;
}

// What the adapters read; where numbers are dropped, a copy and which of them stay.
template <class N> const N* dropped(const Call<N>& c, int from, int rows, const N* x) {
    if (!c.drops) return x;
    N* to = room(scratch<N>().dropped, (size_t)CHUNK<N> * c.inputs);
    uint32_t* masks = room(scratch<N>().masks, (size_t)CHUNK<N> * c.inputs / 32);
    for (int t = 0; t < up32(rows); t++) {
        const Drop* d = drop_of(c, from + t);
        for (int k = 0; k < c.inputs; k += 32) {
            const uint32_t mask = d ? kept(d->start, ((uint64_t)(from + t - d->low) * c.inputs + k) / 4, d->threshold) : 0xffffffffu;
            masks[(t * c.inputs + k) / 32] = mask;
            set(to + place(t, k, c.inputs), keep(raw(x + place(t, k, c.inputs)), mask));
        }
    }
    return to;
}

// [32][32] numbers to the ranks of 32 rows with the part's factor, 0 for what is not its own; `to` begins the rows' pieces.
template <class N> void put_ranks(const Call<N>& c, const Part& part, int from, int first, const float* block, N* to) {
    const int left = part.ranks - first;
    const auto some = [&](int count) { return count >= 16 ? 0xffffu : count > 0 ? (1u << count) - 1 : 0u; };
    for (int t = 0; t < 32; t++) {
        const bool none = from + t < part.from || from + t >= part.to;
        const float* row = block + t * 32;
        const Vec low = masked(load(row), none ? 0 : some(left)) * part.scale, high = masked(load(row + 16), none ? 0 : some(left - 16)) * part.scale;
        put(to + place(t, part.first + first, c.ranks), low, high);
    }
}
// The ranks of some rows as they are kept, [rows][ranks], and back.
template <class N> void copy_ranks(const Call<N>& c, int from, int rows, N* pieces, bool keep, N* ranks) {
    if (!keep) { cut(ranks + (size_t)from * c.ranks, rows, c.ranks, pieces); return; }
    for (int t = 0; t < rows; t++)
        for (int j = 0; j < c.ranks; j += 32) set(ranks + (size_t)(from + t) * c.ranks + j, raw(pieces + place(t, j, c.ranks)));
}

// How many ranks are multiplied with the second matrix: of those that fill them up no more than a product needs.
template <class N> int used(const Part& part) { return sizeof(N) == 4 ? (part.ranks + 15) / 16 * 16 : up32(part.ranks); }

// Makes the ranks from `first` on of 32 rows zeros.
template <class N> void none(const Call<N>& c, const Part& part, int first, N* to) {
    for (int t = 0; t < BLOCK; t++) set(to + place(t, part.first + first, c.ranks), zeros<N>());
}

// The adapters' products with x, which are kept too, in pieces.
template <class N> const N* ranks_of(const Call<N>& c, int from, int rows, const Panels<N>& p, const N* x) {
    alignas(64) float block[BLOCK * BLOCK];
    N* low = room(scratch<N>().low, (size_t)CHUNK<N> * c.ranks);
    const N* read = dropped(c, from, rows, x);
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int first = 0; first < part->ranks; first += 32)
            for (int t = 0; t < rows; t += 32) {
                if (!part->meets(from + t, std::min(32, rows - t))) { none(c, *part, first, low + (size_t)t * c.ranks); continue; }
                const N* a = p.a.data() + (size_t)(part->first + first) * c.inputs;
                one_block<N>(in_pieces(read + (size_t)t * c.inputs, c.inputs, a, (size_t)16 * c.inputs, c.inputs), part->ranks - first, rows - t, block);
                put_ranks(c, *part, from + t, first, block, low + (size_t)t * c.ranks);
            }
    copy_ranks(c, from, rows, low, true, c.low);
    return low;
}

// y of some rows, given what the matrix reads of them. With `gated` its two halves go through a gate too, to there, in pieces.
template <class N> void forward_rows(const Call<N>& c, int from, int rows, const Panels<N>& p, const N* x, N* gated) {
    alignas(64) float block[2][BLOCK * BLOCK];
    const N* low = c.parts ? ranks_of(c, from, rows, p, x) : nullptr;
    const bool past = (size_t)c.rows * c.outputs * sizeof(N) > LARGE;
    const int half = c.outputs / 2;
    std::vector<TermOf<N>> terms(1 + c.parts);
    auto times = [&](int n, int t, float* to) {
        int count = 1;
        terms[0] = frozen(x, t, rows, c.forward, n, c.inputs);
        for (const Part* part = c.part; part < c.part + c.parts; part++)
            if (n >= part->low && n < part->high && part->meets(from + t, std::min(32, rows - t))) {
                const N* b = p.b.data() + (size_t)n * c.ranks + (size_t)part->first * 16;
                terms[count++] = in_pieces(low + (size_t)t * c.ranks + place(0, part->first, c.ranks), c.ranks, b, (size_t)16 * c.ranks, used<N>(*part));
            }
        product<2>(terms.data(), count, rows - t, to, false);
    };
    auto leave = [&](int n, int row, const float* found) {
        const size_t at = (size_t)row * c.outputs + n;
        Vec first = load(found), second = load(found + 16);
        if (c.bias) first += lower(raw(c.bias + n)), second += upper(raw(c.bias + n));
        if (c.residual) first += lower(raw(c.residual + at)), second += upper(raw(c.residual + at));
        put(c.y + at, first, second, past);
        return as<N>(first, second);
    };
    for (int n = 0; n < (gated ? half : c.outputs); n += 32)
        for (int t = 0; t < rows; t += 32) {
            const int here = std::min(32, rows - t);
            times(n, t, block[0]);
            if (gated) times(n + half, t, block[1]);
            for (int i = 0; i < here; i++) {
                const auto a = leave(n, from + t + i, block[0] + i * 32);
                if (gated) set(gated + place(t + i, n, half), gate<N>(a, leave(n + half, from + t + i, block[1] + i * 32)));
            }
            for (int i = here; gated && i < 32; i++) set(gated + place(t + i, n, half), zeros<N>());
        }
}

// ------------------------------------------------------------------------------------------------------------- backward
// 32 columns of rows in pieces as 32 rows in pieces.
template <class N> const N* turn(const N* x, int width, int rows, N* turned) {
    const int wide = up32(rows);
    for (int t = 0; t < wide; t++)
        for (int j = 0; j < 32; j++) turned[place(j, t, wide) + t % 32] = x[place(t, 0, width) + j];
    return turned;
}
// 32 columns of so many rows in pieces as two panels, whose inputs the rows are.
inline void rows_in(const float* x, int width, int rows, float* panels) {
    for (int t = 0; t < rows; t++) {
        const Two row = raw(x + place(t, 0, width));
        store(panels + t * 16, row.low), store(panels + (rows + t) * 16, row.high);
    }
}
#ifdef HAVE_BF16
inline void rows_in(const uint16_t* x, int width, int rows, uint16_t* panels) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int t = 0; t < rows; t += 2) {
        const uint16_t* row = x + place(t, 0, width);
        const Halves even = _mm512_unpacklo_epi16(raw(row), raw(row + 32)), odd = _mm512_unpackhi_epi16(raw(row), raw(row + 32));
        set(panels + t * 16, _mm512_permutex2var_epi64(even, first, odd));
        set(panels + (rows + t) * 16, _mm512_permutex2var_epi64(even, second, odd));
    }
}
#endif
// Sums over rows of ranks times columns of x, which stands in pieces, from its column `low` on: in blocks, or added to them, [columns / 32][32 ranks][32].
template <class N> void add_sums(const N* turned, int ranks, const N* x, int width, int low, int columns, int rows, float* sums, bool add) {
    const int wide = up32(rows);
    N* panels = room(scratch<N>().pairs, (size_t)CHUNK<N> * 32);
    for (int n = 0; n < columns; n += 32) {
        rows_in(x + place(0, low + n, width), width, wide, panels);
        one_block<N>(in_pieces(turned, wide, panels, (size_t)wide * 16, wide), 32, ranks, sums + (size_t)n * 32, add);
    }
}

// The gradients of the adapters; gives their inner gradient, in pieces.
template <class N> const N* adapters_back(const Call<N>& c, int from, int rows, const Panels<N>& p, const N* g, Sums& sums) {
    auto& s = scratch<N>();
    alignas(64) float block[BLOCK * BLOCK];
    N *inner = room(s.inner, (size_t)CHUNK<N> * c.ranks), *low = room(s.low, (size_t)CHUNK<N> * c.ranks), *turned = room(s.turned, (size_t)CHUNK<N> * 32);
    const N* read = dropped(c, from, rows, enter(c, from, rows, true));
    copy_ranks(c, from, rows, low, false, c.low);
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int first = 0; first < part->ranks; first += 32) {
            const int rank = part->first + first, count = std::min(32, part->ranks - first), outputs = part->high - part->low;
            const N* b = p.b.data() + (size_t)rank * c.outputs + (size_t)part->low * 16;
            int begin = rows, end = 0;  // rows that use these ranks
            for (int t = 0; t < rows; t += 32) {
                if (!part->meets(from + t, std::min(32, rows - t))) { none(c, *part, first, inner + (size_t)t * c.ranks); continue; }
                begin = std::min(begin, t), end = std::min(t + 32, rows);
                const N* mine = g + (size_t)t * c.outputs + place(0, part->low, c.outputs);
                one_block<N>(in_pieces(mine, c.outputs, b, (size_t)16 * c.outputs, outputs), count, rows - t, block);
                put_ranks(c, *part, from + t, first, block, inner + (size_t)t * c.ranks);
            }
            if (begin >= end) continue;
            const bool add = sums.begun[rank / 32];
            sums.begun[rank / 32] = 1;
            const size_t at = place(begin, rank, c.ranks), x = (size_t)begin * c.inputs, y = (size_t)begin * c.outputs;
            const int many = end - begin;
            add_sums(turn(inner + at, c.ranks, many, turned), count, read + x, c.inputs, 0, c.inputs, many, sums.a.data() + (size_t)rank * c.inputs, add);
            float* below = sums.b.data() + (size_t)rank * c.outputs + (size_t)part->low * 32;
            add_sums(turn(low + at, c.ranks, many, turned), count, g + y, c.outputs, part->low, outputs, many, below, add);
        }
    if (c.inner) copy_ranks(c, from, rows, inner, true, c.inner);
    for (int t = 0; c.dropped && t < rows; t++)
        for (int k = 0; k < c.inputs; k += 32) set(c.dropped + (size_t)(from + t) * c.inputs + k, raw(read + place(t, k, c.inputs)));
    return inner;
}

// The gradient of h for some rows, given that of y in pieces; with `slopes` that of a gated step's h goes there, in pieces.
template <class N> void backward_rows(const Call<N>& c, int from, int rows, const Panels<N>& p, const N* g, Sums& sums, N* slopes) {
    auto& s = scratch<N>();
    alignas(64) float block[BLOCK * BLOCK];
    const N* inner = c.parts ? adapters_back(c, from, rows, p, g, sums) : nullptr;
    if (!c.dh && !slopes) return;
    N* dx = room(s.dx, (size_t)CHUNK<N> * c.inputs);
    const bool past = c.gated && (size_t)c.rows * c.inputs * 2 * sizeof(N) > LARGE, begun = c.parts && c.drops;
    const int wide = 2 * c.inputs;
    std::vector<TermOf<N>> terms(1 + c.parts);
    for (int k = 0; k < c.inputs; k += 32)
        for (int t = 0; t < rows; t += 32) {
            const int here = std::min(32, rows - t);
            int count = 1;
            terms[0] = frozen(g, t, rows, c.backward, k, c.outputs);
            for (const Part* part = c.part; part < c.part + c.parts; part++)
                if (part->meets(from + t, here)) {
                    const N* a = p.a.data() + (size_t)k * c.ranks + (size_t)part->first * 16;
                    const N* at = inner + (size_t)t * c.ranks + place(0, part->first, c.ranks);
                    terms[count++] = in_pieces(at, c.ranks, a, (size_t)16 * c.ranks, used<N>(*part));
                }
            if (begun) {
                product<2>(terms.data() + 1, count - 1, here, block, false);
                for (int i = 0; i < here; i++) {
                    const uint32_t mask = s.masks[((t + i) * c.inputs + k) / 32];
                    float* row = block + i * 32;
                    set(row, keep(raw(row), mask));
                }
            }
            product<2>(terms.data(), begun ? 1 : count, here, block, begun);
            for (int i = 0; i < here; i++) {
                const size_t row = from + t + i;
                const Vec first = load(block + i * 32), second = load(block + i * 32 + 16);
                if (c.norm) { put(dx + place(t + i, k, c.inputs), first, second); continue; }
                if (!c.gated) { put(c.dh + row * c.inputs + k, first, second); continue; }
                const auto a = raw(c.h + row * wide + k), b = raw(c.h + row * wide + c.inputs + k);
                Vec da[2], db[2];
                gate_slopes<N>(first, lower(a), lower(b), da[0], db[0]), gate_slopes<N>(second, upper(a), upper(b), da[1], db[1]);
                if (slopes) put(slopes + place(t + i, k, wide), da[0], da[1]), put(slopes + place(t + i, c.inputs + k, wide), db[0], db[1]);
                else put(c.dh + row * wide + k, da[0], da[1], past), put(c.dh + row * wide + c.inputs + k, db[0], db[1], past);
            }
            for (int i = here; slopes && i < 32; i++)
                for (int side = k; side < wide; side += c.inputs) set(slopes + place(t + i, side, wide), zeros<N>());
        }
    for (int t = 0; c.norm && t < rows; t++) {
        const size_t at = (size_t)(from + t) * c.inputs;
        norm_back(dx + place(t, 0, c.inputs), 512, c.h + at, c.norm, c.extra ? c.extra + at : nullptr, c.dh + at, c.inputs, c.r[from + t]);
    }
}
template <class N> const N* cut_gradient(const Call<N>& c, int from, int rows) {
    return cut(c.g + (size_t)from * c.outputs, rows, c.outputs, room(scratch<N>().g, (size_t)CHUNK<N> * c.outputs));
}

// A matrix [outputs][inputs] as panels of its outputs, and of its inputs; bf16 inputs stand in pairs.
template <class N> void panels(const N* weight, N* forward, N* backward, int outputs, int inputs) {
    constexpr int pair = 4 / sizeof(N);
    for (int n = 0; n < outputs; n++)
        for (int k = 0; k < inputs; k++) {
            const N one = weight[(size_t)n * inputs + k];
            forward[(size_t)(n / 16) * 16 * inputs + k / pair * 16 * pair + n % 16 * pair + k % pair] = one;
            backward[(size_t)(k / 16) * 16 * outputs + n / pair * 16 * pair + k % 16 * pair + n % pair] = one;
        }
}
template <class N> void linear(const Call<N>& c) {
    static thread_local Panels<N> made;
    const Panels<N>& p = made;
    if (c.parts) pack_forward(c, made);
    in_chunks(c, [&](int from, int rows, int) { forward_rows<N>(c, from, rows, p, enter(c, from, rows, false), nullptr); });
}
template <class N> void linear_back(const Call<N>& c) {
    static thread_local Panels<N> made;
    static thread_local std::vector<Sums> sums;
    const Panels<N>& p = made;
    auto& mine = fresh(c, sums);
    if (c.parts) pack_backward(c, made);
    in_chunks(c, [&](int from, int rows, int thread) { backward_rows<N>(c, from, rows, p, cut_gradient(c, from, rows), of_thread(c, mine, thread), nullptr); });
    gather(c, mine);
}
// A step whose result goes through a gate into a second one.
template <class N> void gated(const Call<N>& up, const Call<N>& down) {
    static thread_local Panels<N> made[2];
    const Panels<N>* p = made;
    if (up.parts) pack_forward(up, made[0]);
    if (down.parts) pack_forward(down, made[1]);
    in_chunks(up, [&](int from, int rows, int) {
        N* between = room(scratch<N>().gated, (size_t)CHUNK<N> * down.inputs);
        forward_rows(up, from, rows, p[0], enter(up, from, rows, false), between);
        forward_rows<N>(down, from, rows, p[1], between, nullptr);
    });
}
template <class N> void gated_back(const Call<N>& up, const Call<N>& down) {
    static thread_local Panels<N> made[2];
    static thread_local std::vector<Sums> sums[2];
    const Panels<N>* p = made;
    auto &above = fresh(up, sums[0]), &below = fresh(down, sums[1]);
    if (up.parts) pack_backward(up, made[0]);
    if (down.parts) pack_backward(down, made[1]);
    in_chunks(up, [&](int from, int rows, int thread) {
        N* slopes = room(scratch<N>().slopes, (size_t)CHUNK<N> * up.outputs);
        backward_rows(down, from, rows, p[1], cut_gradient(down, from, rows), of_thread(down, below, thread), slopes);
        backward_rows<N>(up, from, rows, p[0], slopes, of_thread(up, above, thread), nullptr);
    });
    gather(up, above), gather(down, below);
}

}  // namespace

#define EXPORT(N, kind)                                                                                                                       \
    extern "C" {                                                                                                                              \
    void crucible_panels_##kind(const N* weight, N* forward, N* backward, int outputs, int inputs) { panels(weight, forward, backward, outputs, inputs); } \
    void crucible_linear_##kind(const Call<N>* c) { linear(*c); }                                                                             \
    void crucible_linear_back_##kind(const Call<N>* c) { linear_back(*c); }                                                                   \
    void crucible_gated_##kind(const Call<N>* up, const Call<N>* down) { gated(*up, *down); }                                                 \
    void crucible_gated_back_##kind(const Call<N>* up, const Call<N>* down) { gated_back(*up, *down); }                                       \
    void crucible_scores_##kind(const Call<N>* c, const int64_t* targets, float* scores) {                                                    \
        in_chunks(*c, [&](int from, int rows, int) { score_rows(*c, targets, scores, from, rows); });                                         \
    }                                                                                                                                         \
    }
EXPORT(float, float32)
#ifdef HAVE_BF16
EXPORT(uint16_t, bfloat16)
#endif
