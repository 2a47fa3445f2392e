// How threads share a call of the kernel, and what each is set to meanwhile.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include <dlfcn.h>
#include <pthread.h>
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace {

// Subnormal numbers are 0 where it lives, as on XLA's threads: each costs Intel's processors about a
// hundred cycles. tiles.h lets nothing that matters be one.
class Flushing {
#if defined(__x86_64__) || defined(__i386__)
    static constexpr unsigned FLUSH = 0x8040;  // results to 0, and inputs
    const unsigned before = _mm_getcsr();

public:
    Flushing() { _mm_setcsr(before | FLUSH); }
    ~Flushing() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    static constexpr uint64_t FLUSH = 1 << 24;
    uint64_t before;

public:
    Flushing() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | FLUSH));
    }
    ~Flushing() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

// Chunks in as many shares as there are threads. Each begins with its own, as two that write
// neighbours wait for each other's pages, and takes what is left of the others' then. A thread that
// comes late finds none left, so that nobody waits for one that never comes.
struct Chunks {
    const int64_t number, shares;
    std::vector<std::atomic<int64_t>> taken;  // of each share
    std::atomic<int64_t> threads{0};
    int64_t finished = 0;
    std::mutex lock;
    std::condition_variable changed;

    Chunks(int64_t number, int64_t shares) : number(number), shares(shares), taken(shares) {}

    template <class Function>
    void take(Function each) {
        int64_t own = threads++, some = 0;
        for (int64_t k = 0; k < shares; k++) {
            int64_t share = (own + k) % shares;
            int64_t begin = number * share / shares, end = number * (share + 1) / shares;
            for (int64_t i; (i = begin + taken[share]++) < end; some++) each(i);
        }
        std::lock_guard<std::mutex> locked(lock);
        finished += some;
        if (finished == number) changed.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> locked(lock);
        changed.wait(locked, [this] { return finished == number; });
    }
};

// PyTorch's threads, where they are libgomp's and this process has them: a forked one has not. They
// wait busily for some time after their work, so that threads beside them would wait too.
using Parallel = void(void (*run)(void *), void *data, unsigned threads, unsigned flags);

Parallel *pool() {
    static Parallel *found = (Parallel *)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    static const bool told = !pthread_atfork(nullptr, nullptr, [] { found = nullptr; });
    return told ? found : nullptr;
}

}  // namespace
