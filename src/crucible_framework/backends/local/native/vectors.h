// Vectors of 16 numbers, exp, and threads that work on one thing together. It knows no model.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// GCC's and clang's portable vectors of one register: a longer one would be kept in memory. AVX-512 has 16 numbers, AVX2 (or two of NEON) 8.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Lane __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ILane __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t ULane __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t HLane __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t BLane __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t UBLane __attribute__((vector_size(LANES), aligned(1), may_alias));

// A loop whose index is a constant in each turn, so that arrays of vectors become registers.
#define INLINED __attribute__((always_inline))
template <int N, class F> INLINED static inline void unrolled(const F& f) {
    if constexpr (N > 0) unrolled<N - 1>(f), f(std::integral_constant<int, N - 1>{});
}
template <int O, int R, class V> INLINED static inline void clear(V (&acc)[O][R]) {
    unrolled<O>([&](auto o) INLINED { unrolled<R>([&](auto r) INLINED { acc[o][r] = V{}; }); });
}

// EXACT and GROUPED: bf16 numbers and groups of 32 bytes that stand for fp32 ones without a loss, and meet fp32 activations.
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, EXACT = 3, GROUPED = 4 };

static inline float number(float x) { return x; }
static inline float number(int8_t x) { return x; }
static inline float number(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static inline uint16_t rounded(float x) {  // to the nearest bfloat16, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline Lane lane(const float* p) { return *(const Lane*)p; }
static inline Lane lane(const uint16_t* p) {
#if defined(__AVX512F__)  // gcc would put it together from halves
    return (Lane)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    return (Lane)(__builtin_convertvector(*(const HLane*)p, ULane) << 16);
#endif
}
static inline Lane lane(const int8_t* p) {
#if defined(__AVX512F__)
    return (Lane)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (Lane)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const BLane*)p, ILane), Lane);
#endif
}
static inline Lane lane(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (Lane)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const UBLane*)p, ILane), Lane);
#endif
}
static inline ULane rounded(Lane x) {
    ULane bits = (ULane)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void store(float* p, Lane v) { *(Lane*)p = v; }
static inline void store(uint16_t* p, Lane v) { *(HLane*)p = __builtin_convertvector(rounded(v), HLane); }
static inline Lane halved(Lane v) { return (Lane)(rounded(v) << 16); }  // through bfloat16
static inline Lane larger(Lane a, Lane b) { return a > b ? a : b; }
static inline float sum(Lane v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
#endif
}
static inline float highest(Lane v) {
    float result = v[0];
    for (int i = 1; i < LANES; i++) result = std::max(result, v[i]);
    return result;
}

// exp to about 2 ulp, 0 below the smallest normal number. Source: Cephes' expf.
static inline Lane exp16(Lane given) {
    const Lane lowest = Lane{} - 87.3f, most = Lane{} + 88.3f;
    Lane x = given < lowest ? lowest : given;  // a NaN stays one
    x = x > most ? most : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Lane n = (x * 1.44269504088896341f + magic) - magic;
    Lane r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lane p = Lane{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ILane power = (__builtin_convertvector(n, ILane) + 127) << 23;
    return given < lowest ? Lane{} : p * (Lane)power;
}

// 16 numbers: one register, or two.
#if defined(__AVX512F__)
typedef Lane Vec;
template <class T> static inline Vec load(const T* p) { return lane(p); }
static inline Vec all(float x) { return Vec{} + x; }
#else
struct Vec {
    Lane a{}, b{};
    float operator[](int i) const { return i < 8 ? a[i] : b[i - 8]; }
};
template <class T> static inline Vec load(const T* p) { return {lane(p), lane(p + 8)}; }
template <class T> static inline void store(T* p, const Vec& v) { store(p, v.a), store(p + 8, v.b); }
static inline Vec all(float x) { return {Lane{} + x, Lane{} + x}; }
static inline Vec operator-(const Vec& v) { return {-v.a, -v.b}; }
#define CRUCIBLE_VEC(op)                                                                              \
    static inline Vec operator op(const Vec& u, const Vec& v) { return {u.a op v.a, u.b op v.b}; }    \
    static inline Vec operator op(const Vec& u, float x) { return {u.a op x, u.b op x}; }             \
    static inline Vec operator op(float x, const Vec& v) { return {x op v.a, x op v.b}; }
CRUCIBLE_VEC(+) CRUCIBLE_VEC(-) CRUCIBLE_VEC(*) CRUCIBLE_VEC(/)
template <class T> static inline Vec& operator+=(Vec& u, const T& v) { return u = u + v; }
template <class T> static inline Vec& operator*=(Vec& u, const T& v) { return u = u * v; }
static inline Vec larger(const Vec& u, const Vec& v) { return {larger(u.a, v.a), larger(u.b, v.b)}; }
static inline Vec halved(const Vec& v) { return {halved(v.a), halved(v.b)}; }
static inline Vec exp16(const Vec& v) { return {exp16(v.a), exp16(v.b)}; }
static inline float sum(const Vec& v) { return sum(v.a + v.b); }
static inline float highest(const Vec& v) { return highest(larger(v.a, v.b)); }
#endif

// Whether one of the numbers is larger than x.
static inline bool exceeds(const Vec& v, float x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
#else
    const ILane above = (v.a > x) | (v.b > x);
    bool any = false;
    for (int i = 0; i < 8; i++) any |= above[i] != 0;
    return any;
#endif
}
// The numbers whose bit is set, and 0 for the others, whatever they are.
static inline Vec masked(const Vec& v, uint32_t bits) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
    const ILane bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const ILane low = ((ILane{} + (int32_t)bits) & bit) == bit, high = ((ILane{} + (int32_t)(bits >> 8)) & bit) == bit;
    return {(Lane)((ILane)v.a & low), (Lane)((ILane)v.b & high)};
#endif
}
// Stores past the caches, for what is too large for them: p begins a line.
static inline void stream(float* p, const Vec& v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v.a), _mm256_stream_ps(p + 8, (__m256)v.b);
#else
    store(p, v);
#endif
}

// Memory that begins with a line of the cache: a register of 64 bytes that lies across two lines is read twice.
template <class T> struct Aligned {
    typedef T value_type;
    Aligned() = default;
    template <class U> Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
template <class T> using Array = std::vector<T, Aligned<T>>;

// Room for so many numbers that hold anything.
template <class T> static inline T* room(Array<T>& array, size_t count) {
    if (array.size() < count) array.clear(), array.resize(count);
    return array.data();
}

// ---------------------------------------------------------------------------------------------------------- threads
// `run` gives a function to all threads. Inside it `meet` waits for all, and `next` hands out the pieces of a phase one by one, so that
// a thread whose processor is taken away holds up nobody for more than a piece.
class Team {
  public:
    explicit Team(int count) : count_(count) {
        for (int i = 1; i < count; i++) others_.emplace_back([this, i] { wait(i); });
    }
    ~Team() {
        { std::lock_guard<std::mutex> lock(mutex_); closed_ = true; round_++; }
        wake_.notify_all();
        for (auto& thread : others_) thread.join();
    }
    void run(const std::function<void(int)>& work) {
        piece_.store(0);
        { std::lock_guard<std::mutex> lock(mutex_); work_ = &work; busy_.store(count_ - 1); round_++; }
        wake_.notify_all();
        work(0);
        pause([this] { return busy_.load(std::memory_order_acquire) == 0; });
    }
    int next() { return piece_.fetch_add(1, std::memory_order_relaxed); }
    void meet() {
        int before = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            piece_.store(0, std::memory_order_relaxed);
            phase_.store(before + 1, std::memory_order_release);
        } else {
            pause([&] { return phase_.load(std::memory_order_acquire) != before; });
        }
    }
    int count() const { return count_; }

  private:
    template <class Done> static void pause(Done done) {
        for (int tries = 0; !done(); tries++) {
            if (tries > 300) {
                std::this_thread::yield();  // others need the processor too
            } else {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        }
    }
    void wait(int id) {
        uint64_t seen = 0;
        while (true) {
            const std::function<void(int)>* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (closed_) return;
                work = work_;
            }
            (*work)(id);
            busy_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }
    int count_;
    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* work_ = nullptr;
    uint64_t round_ = 0;
    bool closed_ = false;
    std::atomic<int> busy_{0}, arrived_{0}, phase_{0}, piece_{0};
};
