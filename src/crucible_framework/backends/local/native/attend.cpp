// Attention of packed heads and its backward pass, one call each, by blocks of 32 queries and 32 keys. No matrix of probabilities is kept:
// the backward pass makes its blocks again from what the forward pass kept of each row, the logarithm of its sum. Scores, sums and
// gradients are fp32; what is multiplied is of the heads' kind. Work is divided by shapes only, so results do not depend on the number of
// threads. Python's side is attending.py. Sources: Milakov & Gimelshein 2018, arXiv 1805.02867 (softmax in one walk); Dao et al. 2022,
// arXiv 2205.14135 (attention by blocks, and backwards).
#include "attend_bf16.h"
#include "attend_fp32.h"

namespace {

constexpr int SHARE = 16;  // blocks of queries that the forward pass gives a thread at once

// What a thread does before its first share of the work and after its last. Numbers below the smallest normal one become 0: they are slow.
template <class N> unsigned begin(const N*) {
#ifdef HAVE_BF16
    if (sizeof(N) == 2) open_blocks();
#endif
#if defined(__AVX2__)
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);
    return control;
#else
    return 0;
#endif
}
template <class N> void end(const N*, unsigned control) {
    (void)control;
#if defined(__AVX2__)
    _mm_setcsr(control);
#endif
#ifdef HAVE_BF16
    if (sizeof(N) == 2) close_blocks();
#endif
}

// ---------------------------------------------------------------------------------------------------------------- division
// Into how many shares the queries of a run are divided: by shapes alone.
template <class N> int shares(const Heads<N>& h, const Span& span) { return std::max(1, std::min(16 / h.keys, span.rows() / 4)); }

template <class N> void divide(const Heads<N>& h, const std::vector<Seen>& seen, bool back, std::vector<Unit>& units) {
    for (const Seen& one : seen) {
        const int rows = one.span->rows(), parts = back ? shares(h, *one.span) : (rows + SHARE - 1) / SHARE;
        for (int run = 0; run < one.span->count; run++)
            for (int head = 0; head < h.keys; head++)
                for (int part = 0; part < parts && rows > 0; part++) {
                    auto border = [&](int n) {  // of equal work: the later queries see more
                        const double where = (double)n / parts;
                        return n == parts ? rows : (int)(rows * (back && !one.span->mask && !one.span->skip ? std::sqrt(where) : where));
                    };
                    units.push_back({&one, run, head, border(part), border(part + 1), nullptr});
                }
    }
}

// Adds up what several units have of a run's keys.
template <class N> void gather(const Heads<N>& h, const std::vector<Seen>& seen, const std::vector<Unit>& units, N* dx) {
    const size_t share = (size_t)h.size * 2 * BLOCK;
    size_t at = 0;
    for (const Seen& one : seen) {
        const Span& span = *one.span;
        const int parts = span.rows() ? shares(h, span) : 0, heads = span.count * h.keys, columns = span.columns();
        const Unit* first = units.data() + at;
        at += (size_t)heads * parts;
        if (parts == 0 || !first->sums) continue;
#pragma omp for schedule(static)
        for (int n = 0; n < heads * columns; n++) {
            const Unit* unit = first + (size_t)(n / columns) * parts;
            const float* found[16];
            int count = 0;
            for (int part = 0; part < parts; part++)
                if (n % columns < unit[part].blocks()) found[count++] = unit[part].sums + n % columns * share;
            leave(h, span, unit->token(), unit->head, n % columns, found, count, dx);
        }
    }
}

template <class N> void run(const Heads<N>& h, const Span* spans, int count, N* o, float* lse, const Back<N>* back) {
    static thread_local Array<float> sums;
    std::vector<Seen> seen(count);
    std::vector<std::pair<Seen*, int>> looks;
    for (int i = 0; i < count; i++) {
        seen[i].span = spans + i;
        if (!spans[i].mask) continue;
        seen[i].sights.resize((size_t)spans[i].rows() * spans[i].columns());
        for (int row = 0; row < spans[i].rows(); row++) looks.push_back({&seen[i], row});
    }
    std::vector<Unit> units;
    divide(h, seen, back != nullptr, units);
    if (units.empty()) return;
    auto apart = [&](const Unit& unit) { return unit.seen->span->skip > 0 || shares(h, *unit.seen->span) > 1; };
    if (back) {
        const size_t share = (size_t)h.size * 2 * BLOCK;
        size_t all = 0;
        for (Unit& unit : units) all += apart(unit) ? unit.blocks() * share : 0;
        float* at = room(sums, all);
        for (Unit& unit : units)
            if (apart(unit)) unit.sums = at, at += unit.blocks() * share;
    }
    std::vector<int> order(units.size());
    int64_t cost = 0;
    for (size_t i = 0; i < units.size(); i++) order[i] = i, cost += units[i].cost();
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return units[a].cost() > units[b].cost(); });
#pragma omp parallel if (cost * h.groups() * h.size > 4096)
    {
        const unsigned control = begin(h.x);
#pragma omp for schedule(static)
        for (int i = 0; i < (int)looks.size(); i++) looks[i].first->look(looks[i].second);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < (int)order.size(); i++) {
            if (back) backward(h, units[order[i]], *back);
            else forward(h, units[order[i]], o, lse);
        }
        if (back) gather(h, seen, units, back->dx);
        end(h.x, control);
    }
}

}  // namespace

// o [tokens][queries][size]; lse [tokens][queries] or null: the logarithms of the sums of each row, for the backward pass.
// dx [tokens][queries + 2 keys][size] from g like o; keys that a span skips are added to, in the order of the spans.
#define CRUCIBLE_ATTEND(kind, N)                                                                                                                     \
    extern "C" void crucible_attend_##kind(const void* x, void* o, void* lse, const void* spans, int count, int queries, int keys, int size) {       \
        run<N>({(const N*)x, queries, keys, size}, (const Span*)spans, count, (N*)o, (float*)lse, nullptr);                                          \
    }                                                                                                                                                \
    extern "C" void crucible_attend_back_##kind(const void* g, const void* x, const void* o, const void* lse, void* dx, const void* spans,           \
                                                int count, int queries, int keys, int size) {                                                        \
        const Back<N> back = {(const N*)g, (const N*)o, (const float*)lse, (N*)dx};                                                                  \
        run<N>({(const N*)x, queries, keys, size}, (const Span*)spans, count, nullptr, nullptr, &back);                                              \
    }
CRUCIBLE_ATTEND(float32, float)
#ifdef HAVE_BF16
CRUCIBLE_ATTEND(bfloat16, Half)
#endif
