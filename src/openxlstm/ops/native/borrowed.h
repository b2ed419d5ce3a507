// Work on PyTorch's own threads. Between two of its operations they spin for milliseconds, and threads of ours would share
// their cores with them; so operators, which stand between PyTorch's, are run by the same threads. Decoding is not: it has
// the processor to itself, and its pool (pool.h) gives up a core that is needed elsewhere.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "pool.h"

namespace oxl {

class Borrowed {
  public:
    // GOMP_parallel of the OpenMP runtime in use: calls the function in a team of that many threads, the caller among them.
    typedef void (*Parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

    static void use(Parallel parallel) {
        owner() = getpid();
        entry() = parallel;
    }

    // Like Pool::run; false if there are no threads to borrow. After a fork a team cannot be had.
    static bool run(int64_t count, int threads, Pool::Task task, void *context) {
        const Parallel parallel = entry();
        if (!parallel || threads < 2 || owner() != getpid()) return false;
        Work work{{0}, {0}, count, task, context};
        parallel(
            [](void *data) {
                Work &w = *static_cast<Work *>(data);
                const int worker = w.workers.fetch_add(1, std::memory_order_relaxed);
                for (int64_t t; (t = w.next.fetch_add(1, std::memory_order_relaxed)) < w.count;) w.task(w.context, t, worker);
            },
            &work, static_cast<unsigned>(threads), 0);
        return true;
    }

  private:
    struct Work {
        std::atomic<int64_t> next;
        std::atomic<int> workers;
        int64_t count;
        Pool::Task task;
        void *context;
    };

    static std::atomic<Parallel> &entry() {
        static std::atomic<Parallel> value{nullptr};
        return value;
    }
    static std::atomic<pid_t> &owner() {
        static std::atomic<pid_t> value{0};
        return value;
    }
};

}  // namespace oxl
