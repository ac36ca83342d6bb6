// A frozen matrix with low-rank adapters beside it, its norm, gate, dropout and residual: the forward and the backward pass of each as one
// walk over chunks of rows that stay in the processor's own cache. bf16 with fp32 sums. Python's side is linear.py, whose callers have
// torch code for the same numbers up to rounding. Where the processor has no bf16 products this file gives nothing.
#include "adapters.h"
#ifdef HAVE_BF16

namespace {

// --------------------------------------------------------------------------------------------------------------- chunks
template <class F> void in_chunks(const Call& c, const F& work) {
    if (c.rows == 0) return;
    const int threads = omp_get_max_threads();
    int count = (c.rows + CHUNK - 1) / CHUNK;
    count = (count + threads - 1) / threads * threads;
    const int size = up32((c.rows + count - 1) / count);
    count = (c.rows + size - 1) / size;
#pragma omp parallel if (count > 1)
    {
        open_blocks();
#pragma omp for schedule(static)
        for (int i = 0; i < count; i++) work(i * size, std::min(size, c.rows - i * size), omp_get_thread_num());
        _mm_sfence();  // what went past the caches is there for other threads
        close_blocks();
    }
}

// Rows [rows][width] in pieces, with zeros up to a multiple of 32 rows.
const uint16_t* cut(const uint16_t* from, int rows, int width, uint16_t* to) {
    for (int t = 0; t < up32(rows); t++)
        for (int k = 0; k < width; k += 32)
            _mm512_storeu_si512(to + place(t, k, width), t < rows ? raw(from + (size_t)t * width + k) : _mm512_setzero_si512());
    return to;
}

// What the matrix reads of some rows, and r where it is to be found.
const uint16_t* enter(const Call& c, int from, int rows, Scratch& s, bool again) {
    const int width = c.inputs, wide = c.gated ? 2 * width : width;
    const uint16_t* h = c.h + (size_t)from * wide;
    uint16_t* x = room(s.x, (size_t)CHUNK * width);
    if (!c.norm && !c.gated) return cut(h, rows, width, x);
    for (int t = 0; t < up32(rows); t++, h += wide) {
        if (c.norm && t < rows && !again) c.r[from + t] = inverse_rms(h, width, c.eps);
        for (int k = 0; k < width; k += 32) {
            Halves v = _mm512_setzero_si512();
            if (t < rows) v = c.gated ? gate(raw(h + k), raw(h + width + k)) : scaled(raw(h + k), raw(c.norm + k), c.r[from + t]);
            _mm512_storeu_si512(x + place(t, k, width), v);
        }
    }
    return x;
}

// What the adapters read; where numbers are dropped, a copy and which of them stay.
const uint16_t* dropped(const Call& c, int from, int rows, const uint16_t* x, Scratch& s) {
    if (!c.drops) return x;
    uint16_t* to = room(s.dropped, (size_t)CHUNK * c.inputs);
    uint32_t* masks = room(s.masks, (size_t)CHUNK * c.inputs / 32);
    for (int t = 0; t < up32(rows); t++) {
        const Drop* d = drop_of(c, from + t);
        for (int k = 0; k < c.inputs; k += 32) {
            const __mmask32 mask = d ? kept(d->start, ((uint64_t)(from + t - d->low) * c.inputs + k) / 4, d->threshold) : 0xffffffffu;
            masks[(t * c.inputs + k) / 32] = mask;
            _mm512_storeu_si512(to + place(t, k, c.inputs), _mm512_maskz_mov_epi16(mask, raw(x + place(t, k, c.inputs))));
        }
    }
    return to;
}

// [32][32] numbers to bf16 ranks of 32 rows with the part's factor, 0 for what is not its own; `to` begins the rows' pieces.
void put_ranks(const Call& c, const Part& part, int from, int first, const float* block, uint16_t* to) {
    const int left = part.ranks - first;
    const __m512 by = _mm512_set1_ps(part.scale);
    for (int t = 0; t < 32; t++) {
        __m512 v[2];
        for (int i = 0; i < 2; i++) {
            const bool none = from + t < part.from || from + t >= part.to || left <= 16 * i;
            const __mmask16 some = none ? 0 : left >= 16 * i + 16 ? 0xffff : (__mmask16)((1 << (left - 16 * i)) - 1);
            v[i] = _mm512_maskz_loadu_ps(some, block + t * 32 + 16 * i) * by;
        }
        put(to + place(t, part.first + first, c.ranks), v[0], v[1]);
    }
}
// The ranks of some rows as they are kept, [rows][ranks], and back.
void copy_ranks(const Call& c, int from, int rows, uint16_t* pieces, bool keep, uint16_t* ranks) {
    if (!keep) { cut(ranks + (size_t)from * c.ranks, rows, c.ranks, pieces); return; }
    for (int t = 0; t < rows; t++)
        for (int j = 0; j < c.ranks; j += 32) _mm512_storeu_si512(ranks + (size_t)(from + t) * c.ranks + j, raw(pieces + place(t, j, c.ranks)));
}

// A term of the rows from t on with the two panels from output n on, that fetches its share of the next two: the other rows fetch theirs.
Term frozen(const uint16_t* x, int t, int rows, const uint16_t* panels, int n, int width) {
    Term term = in_pieces(x + (size_t)t * width, width, panels + (size_t)n * width, (size_t)16 * width, width / 2);
    const int blocks = up32(rows) / 32;
    term.lines = 32 / blocks;
    term.ahead = term.w + (size_t)32 * width + (size_t)t / 32 * (width / 32) * term.lines * 32;
    return term;
}

// Makes the ranks from `first` on of 32 rows zeros.
void none(const Call& c, const Part& part, int first, uint16_t* to) {
    for (int t = 0; t < BLOCK; t++) _mm512_storeu_si512(to + place(t, part.first + first, c.ranks), _mm512_setzero_si512());
}

// The adapters' products with x, which are kept too, in pieces.
const uint16_t* ranks_of(const Call& c, int from, int rows, const Panels& p, const uint16_t* x) {
    Scratch& s = scratch();
    alignas(64) float block[BLOCK * BLOCK];
    uint16_t* low = room(s.low, (size_t)CHUNK * c.ranks);
    const uint16_t* read = dropped(c, from, rows, x, s);
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int first = 0; first < part->ranks; first += 32)
            for (int t = 0; t < rows; t += 32) {
                if (!part->meets(from + t, std::min(32, rows - t))) { none(c, *part, first, low + (size_t)t * c.ranks); continue; }
                const uint16_t* a = p.a.data() + (size_t)(part->first + first) * c.inputs;
                const Term term = in_pieces(read + (size_t)t * c.inputs, c.inputs, a, (size_t)16 * c.inputs, c.inputs / 2);
                if (part->ranks - first > 16) product<2>(&term, 1, rows - t, block, false);
                else product<1>(&term, 1, rows - t, block, false);
                put_ranks(c, *part, from + t, first, block, low + (size_t)t * c.ranks);
            }
    copy_ranks(c, from, rows, low, true, c.low);
    return low;
}

// y of some rows, given what the matrix reads of them. With `gated` its two halves go through a gate too, to there, in pieces.
void forward_rows(const Call& c, int from, int rows, const Panels& p, const uint16_t* x, uint16_t* gated) {
    alignas(64) float block[2][BLOCK * BLOCK];
    const uint16_t* low = c.parts ? ranks_of(c, from, rows, p, x) : nullptr;
    const bool past = (size_t)c.rows * c.outputs * 2 > LARGE;
    const int half = c.outputs / 2;
    std::vector<Term> terms(1 + c.parts);
    auto times = [&](int n, int t, float* to) {
        int count = 1;
        terms[0] = frozen(x, t, rows, c.forward, n, c.inputs);
        for (const Part* part = c.part; part < c.part + c.parts; part++)
            if (n >= part->low && n < part->high && part->meets(from + t, std::min(32, rows - t))) {
                const uint16_t* b = p.b.data() + (size_t)n * c.ranks + (size_t)part->first * 16;
                terms[count++] = in_pieces(low + (size_t)t * c.ranks + place(0, part->first, c.ranks), c.ranks, b, (size_t)16 * c.ranks, up32(part->ranks) / 2);
            }
        product<2>(terms.data(), count, rows - t, to, false);
    };
    auto leave = [&](int n, int row, const float* found) {
        const size_t at = (size_t)row * c.outputs + n;
        __m512 first = _mm512_load_ps(found), second = _mm512_load_ps(found + 16);
        if (c.bias) first += lower(raw(c.bias + n)), second += upper(raw(c.bias + n));
        if (c.residual) first += lower(raw(c.residual + at)), second += upper(raw(c.residual + at));
        put(c.y + at, first, second, past);
        return halves(first, second);
    };
    for (int n = 0; n < (gated ? half : c.outputs); n += 32)
        for (int t = 0; t < rows; t += 32) {
            const int here = std::min(32, rows - t);
            times(n, t, block[0]);
            if (gated) times(n + half, t, block[1]);
            for (int i = 0; i < here; i++) {
                const Halves a = leave(n, from + t + i, block[0] + i * 32);
                if (gated) _mm512_storeu_si512(gated + place(t + i, n, half), gate(a, leave(n + half, from + t + i, block[1] + i * 32)));
            }
            for (int i = here; gated && i < 32; i++) _mm512_storeu_si512(gated + place(t + i, n, half), _mm512_setzero_si512());
        }
}

// ------------------------------------------------------------------------------------------------------------- backward
// [32][up32(rows)] of 32 columns of rows in pieces.
const uint16_t* turn(const uint16_t* x, int width, int rows, uint16_t* turned) {
    const int wide = up32(rows);
    for (int t = 0; t < wide; t++)
        for (int j = 0; j < 32; j++) turned[j * wide + t] = x[place(t, 0, width) + j];
    return turned;
}
// Sums over rows of ranks times columns of x, which stands in pieces, from its column `low` on: in blocks, or added to them, [columns / 32][32 ranks][32].
void add_sums(const uint16_t* turned, int ranks, const uint16_t* x, int width, int low, int columns, int rows, float* sums, bool add, Scratch& s) {
    const int wide = up32(rows);
    uint16_t* pairs = room(s.pairs, (size_t)CHUNK * 32);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int n = 0; n < columns; n += 32) {
        for (int t = 0; t < wide; t += 2) {
            const uint16_t* row = x + place(t, low + n, width);
            const Halves even = _mm512_unpacklo_epi16(raw(row), raw(row + 32)), odd = _mm512_unpackhi_epi16(raw(row), raw(row + 32));
            _mm512_storeu_si512(pairs + t * 16, _mm512_permutex2var_epi64(even, first, odd));
            _mm512_storeu_si512(pairs + wide * 16 + t * 16, _mm512_permutex2var_epi64(even, second, odd));
        }
        const Term term{turned, (size_t)wide, pairs, (size_t)wide * 16, wide / 2};
        product<2>(&term, 1, ranks, sums + (size_t)n * 32, add);
    }
}

// The gradients of the adapters; gives their inner gradient, in pieces.
const uint16_t* adapters_back(const Call& c, int from, int rows, const Panels& p, const uint16_t* g, Sums& sums) {
    Scratch& s = scratch();
    alignas(64) float block[BLOCK * BLOCK];
    uint16_t *inner = room(s.inner, (size_t)CHUNK * c.ranks), *low = room(s.low, (size_t)CHUNK * c.ranks), *turned = room(s.turned, (size_t)CHUNK * 32);
    const uint16_t* read = dropped(c, from, rows, enter(c, from, rows, s, true), s);
    copy_ranks(c, from, rows, low, false, c.low);
    for (const Part* part = c.part; part < c.part + c.parts; part++)
        for (int first = 0; first < part->ranks; first += 32) {
            const int rank = part->first + first, count = std::min(32, part->ranks - first), outputs = part->high - part->low;
            const uint16_t* b = p.b.data() + (size_t)rank * c.outputs + (size_t)part->low * 16;
            int begin = rows, end = 0;  // rows that use these ranks
            for (int t = 0; t < rows; t += 32) {
                if (!part->meets(from + t, std::min(32, rows - t))) { none(c, *part, first, inner + (size_t)t * c.ranks); continue; }
                begin = std::min(begin, t), end = std::min(t + 32, rows);
                const Term term = in_pieces(g + (size_t)t * c.outputs + place(0, part->low, c.outputs), c.outputs, b, (size_t)16 * c.outputs, outputs / 2);
                if (count > 16) product<2>(&term, 1, rows - t, block, false);
                else product<1>(&term, 1, rows - t, block, false);
                put_ranks(c, *part, from + t, first, block, inner + (size_t)t * c.ranks);
            }
            if (begin >= end) continue;
            const bool add = sums.begun[rank / 32];
            sums.begun[rank / 32] = 1;
            const size_t at = place(begin, rank, c.ranks), x = (size_t)begin * c.inputs, y = (size_t)begin * c.outputs;
            const int many = end - begin;
            add_sums(turn(inner + at, c.ranks, many, turned), count, read + x, c.inputs, 0, c.inputs, many, sums.a.data() + (size_t)rank * c.inputs, add, s);
            float* below = sums.b.data() + (size_t)rank * c.outputs + (size_t)part->low * 32;
            add_sums(turn(low + at, c.ranks, many, turned), count, g + y, c.outputs, part->low, outputs, many, below, add, s);
        }
    if (c.inner) copy_ranks(c, from, rows, inner, true, c.inner);
    for (int t = 0; c.dropped && t < rows; t++)
        for (int k = 0; k < c.inputs; k += 32) _mm512_storeu_si512(c.dropped + (size_t)(from + t) * c.inputs + k, raw(read + place(t, k, c.inputs)));
    return inner;
}

// The gradient of h for some rows, given that of y in pieces; with `slopes` that of a gated step's h goes there, in pieces.
void backward_rows(const Call& c, int from, int rows, const Panels& p, const uint16_t* g, Sums& sums, uint16_t* slopes) {
    Scratch& s = scratch();
    alignas(64) float block[BLOCK * BLOCK];
    const uint16_t* inner = c.parts ? adapters_back(c, from, rows, p, g, sums) : nullptr;
    if (!c.dh && !slopes) return;
    uint16_t* dx = room(s.dx, (size_t)CHUNK * c.inputs);
    const bool past = c.gated && (size_t)c.rows * c.inputs * 4 > LARGE, begun = c.parts && c.drops;
    const int wide = 2 * c.inputs;
    std::vector<Term> terms(1 + c.parts);
    for (int k = 0; k < c.inputs; k += 32)
        for (int t = 0; t < rows; t += 32) {
            const int here = std::min(32, rows - t);
            int count = 1;
            terms[0] = frozen(g, t, rows, c.backward, k, c.outputs);
            for (const Part* part = c.part; part < c.part + c.parts; part++)
                if (part->meets(from + t, here)) {
                    const uint16_t* a = p.a.data() + (size_t)k * c.ranks + (size_t)part->first * 16;
                    const uint16_t* at = inner + (size_t)t * c.ranks + place(0, part->first, c.ranks);
                    terms[count++] = in_pieces(at, c.ranks, a, (size_t)16 * c.ranks, up32(part->ranks) / 2);
                }
            if (begun) {
                product<2>(terms.data() + 1, count - 1, here, block, false);
                for (int i = 0; i < here; i++) {
                    const uint32_t mask = s.masks[((t + i) * c.inputs + k) / 32];
                    float* row = block + i * 32;
                    _mm512_store_ps(row, _mm512_maskz_loadu_ps((__mmask16)mask, row));
                    _mm512_store_ps(row + 16, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + 16));
                }
            }
            product<2>(terms.data(), begun ? 1 : count, here, block, begun);
            for (int i = 0; i < here; i++) {
                const size_t row = from + t + i;
                const __m512 first = _mm512_load_ps(block + i * 32), second = _mm512_load_ps(block + i * 32 + 16);
                if (c.norm) { put(dx + place(t + i, k, c.inputs), first, second); continue; }
                if (!c.gated) { put(c.dh + row * c.inputs + k, first, second); continue; }
                const Halves a = raw(c.h + row * wide + k), b = raw(c.h + row * wide + c.inputs + k);
                __m512 da[2], db[2];
                gate_slopes(first, lower(a), lower(b), da[0], db[0]), gate_slopes(second, upper(a), upper(b), da[1], db[1]);
                if (slopes) put(slopes + place(t + i, k, wide), da[0], da[1]), put(slopes + place(t + i, c.inputs + k, wide), db[0], db[1]);
                else put(c.dh + row * wide + k, da[0], da[1], past), put(c.dh + row * wide + c.inputs + k, db[0], db[1], past);
            }
            for (int i = here; slopes && i < 32; i++)
                for (int side = k; side < wide; side += c.inputs) _mm512_storeu_si512(slopes + place(t + i, side, wide), _mm512_setzero_si512());
        }
    for (int t = 0; c.norm && t < rows; t++) {
        const size_t at = (size_t)(from + t) * c.inputs;
        norm_back(dx + place(t, 0, c.inputs), 512, c.h + at, c.norm, c.extra ? c.extra + at : nullptr, c.dh + at, c.inputs, c.r[from + t]);
    }
}
const uint16_t* cut_gradient(const Call& c, int from, int rows) {
    return cut(c.g + (size_t)from * c.outputs, rows, c.outputs, room(scratch().g, (size_t)CHUNK * c.outputs));
}

// ------------------------------------------------------------------------------------------------------------------ head
constexpr int VOCABULARY = 1024;  // outputs whose probabilities, for a chunk of rows, stay in a core's own cache

// The sum of exp of a row's logits above the largest one so far.
struct ExpSum {
    float top = -INFINITY;
    __m512 sum = _mm512_setzero_ps();
    // Takes 32 logits; gives exp of each above `top`.
    Halves add(__m512 a, __m512 b) {
        const __m512 most = _mm512_max_ps(a, b);
        if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(top), _CMP_GT_OQ)) {
            const float higher = _mm512_reduce_max_ps(most);
            sum *= exponential(_mm512_set1_ps(top - higher)), top = higher;
        }
        a = exponential(a - top), b = exponential(b - top), sum += a + b;
        return halves(a, b);
    }
    float log() const { return top + std::log(_mm512_reduce_add_ps(sum)); }
};

// log p of one target per row; with `dh` the gradient of each with respect to its h.
void score_rows(const Call& c, const int64_t* targets, float* scores, int from, int rows) {
    Scratch& s = scratch();
    static thread_local Array<uint16_t> kept_exps;
    static thread_local Array<float> kept_tops, total;
    alignas(64) float block[BLOCK * BLOCK];
    const int blocks = (c.outputs / 32 + 15) / 16 * 16;
    const uint16_t* x = cut(c.h + (size_t)from * c.inputs, rows, c.inputs, room(s.x, (size_t)CHUNK * c.inputs));
    uint16_t* exps = room(kept_exps, c.dh ? (size_t)CHUNK * c.outputs : 0);
    float* tops = room(kept_tops, (size_t)CHUNK * blocks);  // that the exps of a row's 32 logits are above, then what they are multiplied with
    ExpSum sums[CHUNK];
    float mine[CHUNK];
    for (int n = 0; n < c.outputs; n += 32)
        for (int t = 0; t < rows; t += 32) {
            const Term term = frozen(x, t, rows, c.forward, n, c.inputs);
            product<2>(&term, 1, rows - t, block, false);
            for (int i = t; i < std::min(t + 32, rows); i++) {
                const float* found = block + (i - t) * 32;
                const int64_t target = targets[from + i] - n;
                if (target >= 0 && target < 32) mine[i] = found[target];
                const Halves above = sums[i].add(_mm512_load_ps(found), _mm512_load_ps(found + 16));
                if (c.dh) _mm512_storeu_si512(exps + place(i, n, c.outputs), above);
                tops[i * blocks + n / 32] = sums[i].top;
            }
        }
    for (int i = 0; i < rows; i++) {
        const float whole = sums[i].log();
        scores[from + i] = mine[i] - whole;
        for (int n = 0; c.dh && n < blocks; n += 16) {
            float* to = tops + i * blocks + n;
            _mm512_storeu_ps(to, -exponential(_mm512_loadu_ps(to) - whole));
        }
    }
    if (!c.dh) return;
    float* dx = room(total, (size_t)CHUNK * c.inputs);  // blocks [inputs / 32][rows / 32][32][32]
    uint16_t* slope = room(s.g, (size_t)CHUNK * VOCABULARY);
    for (int low = 0; low < c.outputs; low += VOCABULARY) {
        const int width = std::min(VOCABULARY, c.outputs - low);
        for (int i = 0; i < up32(rows); i++) {
            for (int n = 0; n < width; n += 32) {
                Halves v = _mm512_setzero_si512();
                if (i < rows) {
                    const Halves a = raw(exps + place(i, low + n, c.outputs));
                    const __m512 by = _mm512_set1_ps(tops[i * blocks + (low + n) / 32]);
                    v = halves(lower(a) * by, upper(a) * by);
                }
                _mm512_storeu_si512(slope + place(i, n, width), v);
            }
            const int64_t target = i < rows ? targets[from + i] - low : -1;
            if (target >= 0 && target < width) slope[place(i, (int)target / 32 * 32, width) + target % 32] = rounded(-std::expm1(scores[from + i]));
        }
        for (int k = 0; k < c.inputs; k += 32)
            for (int t = 0; t < rows; t += 32) {
                const uint16_t* panel = c.backward + (size_t)k * c.outputs + (size_t)low * 16;
                const Term term = in_pieces(slope + (size_t)t * width, width, panel, (size_t)16 * c.outputs, width / 2);
                product<2>(&term, 1, rows - t, dx + (size_t)k * CHUNK + (size_t)t * 32, low > 0);
            }
    }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < c.inputs; k += 32) {
            const float* found = dx + (size_t)k * CHUNK + (size_t)i * 32;
            put(c.dh + (size_t)(from + i) * c.inputs + k, _mm512_load_ps(found), _mm512_load_ps(found + 16));
        }
}

}  // namespace

// A matrix [outputs][inputs] as panels of its outputs, and of its inputs.
extern "C" void crucible_panels(const uint16_t* weight, uint16_t* forward, uint16_t* backward, int outputs, int inputs) {
    for (int n = 0; n < outputs; n++)
        for (int k = 0; k < inputs; k++) {
            const uint16_t one = weight[(size_t)n * inputs + k];
            forward[(size_t)(n / 16) * 16 * inputs + k / 2 * 32 + n % 16 * 2 + k % 2] = one;
            backward[(size_t)(k / 16) * 16 * outputs + n / 2 * 32 + k % 16 * 2 + n % 2] = one;
        }
}
extern "C" void crucible_linear(const Call* c) {
    static thread_local Panels panels;
    const Panels& p = panels;
    if (c->parts) pack_forward(*c, panels);
    in_chunks(*c, [&](int from, int rows, int) { forward_rows(*c, from, rows, p, enter(*c, from, rows, scratch(), false), nullptr); });
}
extern "C" void crucible_linear_back(const Call* c) {
    static thread_local Panels panels;
    static thread_local std::vector<Sums> sums;
    const Panels& p = panels;
    auto& mine = fresh(*c, sums);
    if (c->parts) pack_backward(*c, panels);
    in_chunks(*c, [&](int from, int rows, int thread) { backward_rows(*c, from, rows, p, cut_gradient(*c, from, rows), of_thread(*c, mine, thread), nullptr); });
    gather(*c, mine);
}
extern "C" void crucible_scores(const Call* c, const int64_t* targets, float* scores) {
    in_chunks(*c, [&](int from, int rows, int) { score_rows(*c, targets, scores, from, rows); });
}
// A step whose result goes through a gate into a second one.
extern "C" void crucible_gated(const Call* up, const Call* down) {
    static thread_local Panels panels[2];
    const Panels* p = panels;
    if (up->parts) pack_forward(*up, panels[0]);
    if (down->parts) pack_forward(*down, panels[1]);
    in_chunks(*up, [&](int from, int rows, int) {
        uint16_t* gated = room(scratch().gated, (size_t)CHUNK * down->inputs);
        forward_rows(*up, from, rows, p[0], enter(*up, from, rows, scratch(), false), gated);
        forward_rows(*down, from, rows, p[1], gated, nullptr);
    });
}
extern "C" void crucible_gated_back(const Call* up, const Call* down) {
    static thread_local Panels panels[2];
    static thread_local std::vector<Sums> sums[2];
    const Panels* p = panels;
    auto &above = fresh(*up, sums[0]), &below = fresh(*down, sums[1]);
    if (up->parts) pack_backward(*up, panels[0]);
    if (down->parts) pack_backward(*down, panels[1]);
    in_chunks(*up, [&](int from, int rows, int thread) {
        uint16_t* slopes = room(scratch().slopes, (size_t)CHUNK * up->outputs);
        backward_rows(*down, from, rows, p[1], cut_gradient(*down, from, rows), of_thread(*down, below, thread), slopes);
        backward_rows(*up, from, rows, p[0], slopes, of_thread(*up, above, thread), nullptr);
    });
    gather(*up, above), gather(*down, below);
}
#endif
