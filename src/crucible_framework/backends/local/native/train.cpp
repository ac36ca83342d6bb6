// The elementwise work between the matrix products of a decoder's forward and backward pass, each as one walk over memory.
// Matrices are row-major; `N` is float or bfloat16, sums are in float. Loops are plain and left to the compiler's vectors.
// Python's side is walks.py, whose torch code gives the same numbers up to rounding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EACH_ROW _Pragma("omp parallel for schedule(static) if ((int64_t)rows * width > 16384)")
#define SIMD _Pragma("omp simd")
#define SUM(x) _Pragma(STRING(omp simd reduction(+ : x)))
#define STRING(x) #x

namespace {

struct Half {  // bfloat16
    uint16_t bits;
};
inline float wide(float x) { return x; }
inline float wide(Half x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
inline void put(float* p, float x) { *p = x; }
inline void put(Half* p, float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// To about 2 ulp, between the smallest normal number and the largest one. Source: Cephes' expf.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.3f), 88.3f);
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float two;
    memcpy(&two, &power, 4);
    return p * two;
}
inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

// ------------------------------------------------------------------------------------------------------------ norm, gate
template <class N> void norm(const N* h, const N* w, N* y, float* r, int rows, int width, float eps) {
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        const N* x = h + (int64_t)t * width;
        N* out = y + (int64_t)t * width;
        float square = 0;
        SUM(square)
        for (int i = 0; i < width; i++) square += wide(x[i]) * wide(x[i]);
        float scale = r[t] = 1.0f / std::sqrt(square / width + eps);
        SIMD
        for (int i = 0; i < width; i++) put(out + i, wide(x[i]) * scale * wide(w[i]));
    }
}

template <class N> void norm_back(const N* g, const N* h, const N* w, const float* r, N* out, int rows, int width) {
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        const N *up = g + (int64_t)t * width, *x = h + (int64_t)t * width;
        N* dx = out + (int64_t)t * width;
        float dot = 0;
        SUM(dot)
        for (int i = 0; i < width; i++) dot += wide(up[i]) * wide(w[i]) * wide(x[i]);
        float scale = r[t], slope = -dot * scale * scale * scale / width;
        SIMD
        for (int i = 0; i < width; i++) put(dx + i, wide(up[i]) * wide(w[i]) * scale + wide(x[i]) * slope);
    }
}

template <class N> void gate(const N* both, N* y, int rows, int width) {
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        const N *a = both + (int64_t)t * 2 * width, *b = a + width;
        N* out = y + (int64_t)t * width;
        SIMD
        for (int i = 0; i < width; i++) put(out + i, wide(a[i]) * logistic(wide(a[i])) * wide(b[i]));
    }
}

template <class N> void gate_back(const N* g, const N* both, N* out, int rows, int width) {
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        const N *up = g + (int64_t)t * width, *a = both + (int64_t)t * 2 * width, *b = a + width;
        N *da = out + (int64_t)t * 2 * width, *db = da + width;
        SIMD
        for (int i = 0; i < width; i++) {
            float x = wide(a[i]), s = logistic(x), slope = wide(up[i]);
            put(da + i, slope * wide(b[i]) * s * (1.0f + x * (1.0f - s)));
            put(db + i, slope * x * s);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------- dropout
// 16 random bits per number: word e / 4 of a counter through the finaliser of splitmix64, lane e % 4.
inline void random_row(uint64_t start, int64_t row, int width, std::vector<uint64_t>& words) {
    int count = width / 4;
    words.resize(count);
    uint64_t first = start + (uint64_t)(row * count + 1) * 0x9E3779B97F4A7C15ull, *out = words.data();
    SIMD
    for (int i = 0; i < count; i++) {
        uint64_t z = first + (uint64_t)i * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        out[i] = z ^ (z >> 31);
    }
}

template <class N, bool ADD> void drop(const N* x, N* y, int rows, int width, uint64_t start, int threshold) {
    _Pragma("omp parallel if ((int64_t)rows * width > 16384)") {
        std::vector<uint64_t> words;
        _Pragma("omp for schedule(static)")
        for (int t = 0; t < rows; t++) {
            random_row(start, t, width, words);
            const uint16_t* random = (const uint16_t*)words.data();
            const N* in = x + (int64_t)t * width;
            N* out = y + (int64_t)t * width;
            SIMD
            for (int i = 0; i < width; i++) {
                float kept = random[i] >= threshold ? wide(in[i]) : 0.0f;
                put(out + i, ADD ? wide(out[i]) + kept : kept);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- attention
template <class N> void rotate(N* x, int rows, int stride, int heads, int size, const N* cos, const N* sin, float sign) {
    int half = size / 2, width = heads * size;
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        const N *c = cos + (int64_t)t * half, *s = sin + (int64_t)t * half;
        for (int head = 0; head < heads; head++) {
            N *a = x + (int64_t)t * stride + head * size, *b = a + half;
            SIMD
            for (int i = 0; i < half; i++) {
                float first = wide(a[i]), second = wide(b[i]), turn = sign * wide(s[i]);
                put(a + i, first * wide(c[i]) - second * turn);
                put(b + i, second * wide(c[i]) + first * turn);
            }
        }
    }
}

struct Span {  // `count` runs of `length` tokens from `start` on; the first `skip` of each are left out
    int32_t start, count, length, skip;
};

// Some heads of packed tokens [T, stride] to [count, heads, length - skip, size], times `scale`.
template <class N> void fold(const N* x, N* out, const Span* span, int stride, int first, int heads, int size, float scale) {
    int kept = span->length - span->skip, rows = span->count * heads, width = kept * size;
    EACH_ROW
    for (int row = 0; row < rows; row++) {
        int run = row / heads, head = row % heads;
        const N* from = x + (int64_t)(span->start + run * span->length + span->skip) * stride + (first + head) * size;
        N* to = out + (int64_t)row * width;
        for (int t = 0; t < kept; t++) {
            SIMD
            for (int i = 0; i < size; i++) put(to + t * size + i, wide(from[(int64_t)t * stride + i]) * scale);
        }
    }
}

// The way back; the first `add` tokens of a run are added to, the others written over.
template <class N> void unfold(const N* in, N* x, const Span* span, int stride, int first, int heads, int size, float scale, int add) {
    int kept = span->length - span->skip, rows = span->count * heads, width = kept * size;
    EACH_ROW
    for (int row = 0; row < rows; row++) {
        int run = row / heads, head = row % heads;
        const N* from = in + (int64_t)row * width;
        N* to = x + (int64_t)(span->start + run * span->length + span->skip) * stride + (first + head) * size;
        for (int t = 0; t < kept; t++) {
            N* place = to + (int64_t)t * stride;
            float before = t < add ? 1.0f : 0.0f;
            SIMD
            for (int i = 0; i < size; i++) put(place + i, wide(from[t * size + i]) * scale + (t < add ? before * wide(place[i]) : 0.0f));
        }
    }
}

// Softmax in place of `rows` scores of `length` numbers; row i is token skip + i % kept of its run and sees those up to itself, or
// what the mask [kept, length], which is added, lets it.
template <class N> void softmax(N* scores, const float* mask, int rows, int kept, int length, int skip) {
    int width = length;
    EACH_ROW
    for (int row = 0; row < rows; row++) {
        N* s = scores + (int64_t)row * length;
        int count = mask ? length : skip + row % kept + 1;
        if (mask) {
            const float* seen = mask + (int64_t)(row % kept) * length;
            SIMD
            for (int i = 0; i < count; i++) put(s + i, wide(s[i]) + seen[i]);
        }
        float top = -INFINITY, sum = 0;
        _Pragma("omp simd reduction(max : top)")
        for (int i = 0; i < count; i++) top = std::max(top, wide(s[i]));
        SUM(sum)
        for (int i = 0; i < count; i++) sum += exponential(wide(s[i]) - top);
        float scale = 1.0f / sum;
        SIMD
        for (int i = 0; i < count; i++) {
            float z = wide(s[i]) - top, p = exponential(z) * scale;
            put(s + i, z > -87.0f ? p : 0.0f);
        }
        memset(s + count, 0, (length - count) * sizeof(N));
    }
}

// The gradient of scores from that of probabilities, in place of it.
template <class N> void softmax_back(N* g, const N* p, int rows, int kept, int length, int skip, bool causal) {
    int width = length;
    EACH_ROW
    for (int row = 0; row < rows; row++) {
        N* up = g + (int64_t)row * length;
        const N* mine = p + (int64_t)row * length;
        int count = causal ? skip + row % kept + 1 : length;
        float dot = 0;
        SUM(dot)
        for (int i = 0; i < count; i++) dot += wide(up[i]) * wide(mine[i]);
        SIMD
        for (int i = 0; i < count; i++) put(up + i, wide(mine[i]) * (wide(up[i]) - dot));
        memset(up + count, 0, (length - count) * sizeof(N));
    }
}

// ------------------------------------------------------------------------------------------------------------------ head
// log p of one target per row of logits; with `slope`, the gradient of each with respect to the logits in place of them.
template <class N> void score(N* logits, const int64_t* targets, float* scores, int rows, int width, bool slope) {
    EACH_ROW
    for (int t = 0; t < rows; t++) {
        N* z = logits + (int64_t)t * width;
        float top = -INFINITY, sum = 0;
        _Pragma("omp simd reduction(max : top)")
        for (int i = 0; i < width; i++) top = std::max(top, wide(z[i]));
        SUM(sum)
        for (int i = 0; i < width; i++) sum += exponential(wide(z[i]) - top);
        float whole = top + std::log(sum), mine = wide(z[targets[t]]) - whole;
        scores[t] = std::isfinite(sum) ? mine : NAN;
        if (!slope) continue;
        SIMD
        for (int i = 0; i < width; i++) put(z + i, -exponential(wide(z[i]) - whole));
        put(z + targets[t], 1.0f - exponential(mine));
    }
}

}  // namespace

#define BOTH(name, arguments, call)                                      \
    extern "C" void crucible_##name##_float32 arguments { typedef float N; call; } \
    extern "C" void crucible_##name##_bfloat16 arguments { typedef Half N; call; }

BOTH(norm, (void* h, void* w, void* y, void* r, int rows, int width, float eps), norm((N*)h, (N*)w, (N*)y, (float*)r, rows, width, eps))
BOTH(norm_back, (void* g, void* h, void* w, void* r, void* out, int rows, int width),
     norm_back((N*)g, (N*)h, (N*)w, (float*)r, (N*)out, rows, width))
BOTH(gate, (void* both, void* y, int rows, int width), gate((N*)both, (N*)y, rows, width))
BOTH(gate_back, (void* g, void* both, void* out, int rows, int width), gate_back((N*)g, (N*)both, (N*)out, rows, width))
BOTH(drop, (void* x, void* y, int rows, int width, uint64_t start, int threshold), (drop<N, false>((N*)x, (N*)y, rows, width, start, threshold)))
BOTH(drop_add, (void* x, void* y, int rows, int width, uint64_t start, int threshold), (drop<N, true>((N*)x, (N*)y, rows, width, start, threshold)))
BOTH(rotate, (void* x, int rows, int stride, int heads, int size, void* cos, void* sin, float sign),
     rotate((N*)x, rows, stride, heads, size, (N*)cos, (N*)sin, sign))
BOTH(fold, (void* x, void* out, void* span, int stride, int first, int heads, int size, float scale),
     fold((N*)x, (N*)out, (Span*)span, stride, first, heads, size, scale))
BOTH(unfold, (void* in, void* x, void* span, int stride, int first, int heads, int size, float scale, int add),
     unfold((N*)in, (N*)x, (Span*)span, stride, first, heads, size, scale, add))
BOTH(softmax, (void* scores, void* mask, int rows, int kept, int length, int skip), softmax((N*)scores, (float*)mask, rows, kept, length, skip))
BOTH(softmax_back, (void* g, void* p, int rows, int kept, int length, int skip, int causal),
     softmax_back((N*)g, (N*)p, rows, kept, length, skip, causal != 0))
BOTH(score, (void* logits, void* targets, void* scores, int rows, int width, int slope),
     score((N*)logits, (int64_t*)targets, (float*)scores, rows, width, slope != 0))
