// Threads that go through the phases of one token together; see decode.h. Each member has its own stretch of a phase's
// tasks, so that it reads on where it stopped, and helps the others when its own are done. Waiting spins for a few
// microseconds, the usual difference between members, and then sleeps: a core that is needed elsewhere is given up.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "decode.h"
#include "prefetch.h"

namespace oxl {

struct Team {
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

    Team(int64_t phases, int members) : members_(members), taken_(phases * members), done_(phases) {}

    int64_t claim(int64_t phase, int64_t count, int worker) {
        for (int k = 0; k < members_; ++k) {
            const int whose = (worker + k) % members_;
            const int64_t begin = count * whose / members_, size = count * (whose + 1) / members_ - begin;
            std::atomic<int64_t> &taken = taken_[phase * members_ + whose].value;
            if (taken.load(std::memory_order_relaxed) >= size) continue;
            const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
            if (task < size) return begin + task;
        }
        return -1;
    }

    int size() const { return members_; }

    void finish(int64_t phase, int64_t count, int64_t done, Ahead next) {
        std::atomic<int64_t> &all = done_[phase].value;
        if (done > 0 && all.fetch_add(done) + done == count && sleepers_.load() > 0) {
            const std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        for (int spin = 0; spin < SPINS; ++spin) {
            if (all.load(std::memory_order_acquire) == count) return;
            for (int line = 0; line < LINES && next.bytes > 0; ++line, next.data += LINE_BYTES, next.bytes -= LINE_BYTES)
                prefetch(next.data);
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return all.load() == count; });
        sleepers_.fetch_sub(1);
    }

  private:
    static constexpr int SPINS = 2000, LINES = 4;  // more lines at once than the processor can note would be forgotten

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ __volatile__("isb");
#endif
    }

    const int members_;
    std::vector<Counter> taken_, done_;
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace oxl
