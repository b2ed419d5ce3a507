// A small thread pool. Workers sleep when there is nothing to do; the caller works too and never waits for a worker
// that has not begun, so a busy machine costs speed but nothing ever spins or stalls.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace oxl {

class Pool {
  public:
    typedef void (*Task)(void *context, int64_t task, int worker);

    // The pool of this process; after a fork the child gets a new one. Never destroyed: threads may outlive main.
    static Pool &instance() {
        static std::mutex guard;
        static Pool *pool = nullptr;
        static pid_t owner = 0;
        const std::lock_guard<std::mutex> lock(guard);
        if (!pool || owner != getpid()) {
            pool = new Pool;
            owner = getpid();
        }
        return *pool;
    }

    // Run tasks 0 .. count - 1 on up to `threads` threads. `worker` is below `threads` and unique at any moment.
    void run(int64_t count, int threads, Task task, void *context) {
        if (threads > count) threads = static_cast<int>(count);
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (threads <= 1 || !turn.owns_lock()) {  // another caller has the workers: work alone
            for (int64_t t = 0; t < count; ++t) task(context, t, 0);
            return;
        }
        grow(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            task_ = task, context_ = context, count_ = count;
            next_.store(0, std::memory_order_relaxed);
            seats_ = threads - 1, seated_ = 0;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void grow(int workers) {
        for (; workers_ < workers; ++workers_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error &) {
                return;  // no more threads to be had: the caller and the others do the work
            }
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_, ++active_;
            const int worker = ++seated_;
            lock.unlock();
            work(worker);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    void work(int worker) {
        for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, t, worker);
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int64_t> next_{0};
    Task task_ = nullptr;
    void *context_ = nullptr;
    int64_t count_ = 0;
    int workers_ = 0, seats_ = 0, seated_ = 0, active_ = 0;
};

}  // namespace oxl
