// The walk over a call's rows, chunk by chunk, and what every walk does: rows into pieces, a frozen matrix's next panels, blocks of products.
#pragma once
#include "adapters.h"

namespace {

template <class N> struct Blocks {  // what a thread needs while it multiplies
    Blocks() {
#ifdef HAVE_BF16
        if (sizeof(N) == 2) open_blocks();
#endif
    }
    ~Blocks() {
#if defined(__AVX2__)
        _mm_sfence();  // what went past the caches is there for other threads
#endif
#ifdef HAVE_BF16
        if (sizeof(N) == 2) close_blocks();
#endif
    }
};
template <class N, class F> void in_chunks(const Call<N>& c, const F& work) {
    if (c.rows == 0) return;
    const int threads = omp_get_max_threads();
    int count = (c.rows + CHUNK<N> - 1) / CHUNK<N>;
    count = (count + threads - 1) / threads * threads;
    const int size = up32((c.rows + count - 1) / count);
    count = (c.rows + size - 1) / size;
#pragma omp parallel if (count > 1)
    {
        Blocks<N> blocks;
#pragma omp for schedule(static)
        for (int i = 0; i < count; i++) work(i * size, std::min(size, c.rows - i * size), omp_get_thread_num());
    }
}

// Rows [rows][width] in pieces, with zeros up to a multiple of 32 rows.
template <class N> const N* cut(const N* from, int rows, int width, N* to) {
    for (int t = 0; t < up32(rows); t++)
        for (int k = 0; k < width; k += 32) set(to + place(t, k, width), t < rows ? raw(from + (size_t)t * width + k) : zeros<N>());
    return to;
}

template <class N> using TermOf = decltype(in_pieces((const N*)nullptr, 0, (const N*)nullptr, 0, 0));
// A term of the rows from t on with the two panels from output n on, that fetches its share of the next two: the other rows fetch theirs.
template <class N> TermOf<N> frozen(const N* x, int t, int rows, const N* panels, int n, int width) {
    auto term = in_pieces(x + (size_t)t * width, width, panels + (size_t)n * width, (size_t)16 * width, width);
    constexpr int line = 64 / sizeof(N);
    const int blocks = up32(rows) / 32;
    term.lines = 1024 / line / blocks;
    term.ahead = term.w + (size_t)32 * width + (size_t)t / 32 * (width / 32) * term.lines * line;
    return term;
}

// The product of 32 rows with up to 32 outputs.
template <class N> void one_block(const TermOf<N>& term, int outputs, int rows, float* block, bool add = false) {
    if (outputs > 16) product<2>(&term, 1, rows, block, add);
    else product<1>(&term, 1, rows, block, add);
}

}  // namespace
