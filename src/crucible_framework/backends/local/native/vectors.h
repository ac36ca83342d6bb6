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
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// GCC's and clang's portable vectors: one AVX-512 register, two of AVX2, four of NEON.
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t BVec __attribute__((vector_size(16), aligned(1), may_alias));

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline Vec load(const uint16_t* p) { return (Vec)(__builtin_convertvector(*(const HVec*)p, UVec) << 16); }
static inline Vec load(const int8_t* p) { return __builtin_convertvector(__builtin_convertvector(*(const BVec*)p, IVec), Vec); }
static inline void store(float* p, Vec v) { *(Vec*)p = v; }
static inline Vec all(float x) { return Vec{} + x; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

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
static inline UVec rounded(Vec x) {
    UVec bits = (UVec)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void store(uint16_t* p, Vec v) { *(HVec*)p = __builtin_convertvector(rounded(v), HVec); }

static inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float result = 0;
    for (int i = 0; i < 16; i++) result += v[i];
    return result;
#endif
}
static inline float highest(Vec v) {
    float result = v[0];
    for (int i = 1; i < 16; i++) result = std::max(result, v[i]);
    return result;
}

// exp to about 2 ulp, 0 below the smallest normal number. Source: Cephes' expf.
static inline Vec exp16(Vec given) {
    Vec x = given < -87.3f ? all(-87.3f) : given;  // a NaN stays one
    x = x > 88.3f ? all(88.3f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Vec n = (x * 1.44269504088896341f + magic) - magic;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
    return given < -87.3f ? Vec{} : p * (Vec)power;
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
