// A pool of threads under libgomp's name, for `nox -s sanitize`: the kernel borrows it as it would
// PyTorch's, whose own waiting the sanitizers cannot see.

#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(run, data);
    run(data);
    for (std::thread &other : others) other.join();
}
