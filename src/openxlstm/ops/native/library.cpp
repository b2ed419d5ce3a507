// The C interface: which instruction sets there are, and one function per operator.
//
// Functions take the index of an instruction set and a number of threads, keep nothing but the thread pool and one block of
// working space, and return 0, or 1 when memory ran out.
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "borrowed.h"
#include "decode.h"
#include "kernels.h"
#include "pool.h"
#include "team.h"

#define OXL_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
extern const oxl::Kernels oxl_kernels_avx512_bf16, oxl_kernels_avx512, oxl_kernels_avx2;
#elif defined(__aarch64__)
extern const oxl::Kernels oxl_kernels_neon;
#endif
extern const oxl::Kernels oxl_kernels_portable;

namespace {

// Best first.
const oxl::Kernels *const TABLE[] = {
#if defined(__x86_64__)
    &oxl_kernels_avx512_bf16,
    &oxl_kernels_avx512,
    &oxl_kernels_avx2,
#elif defined(__aarch64__)
    &oxl_kernels_neon,
#endif
    &oxl_kernels_portable,
};
constexpr int COUNT = sizeof TABLE / sizeof *TABLE;

constexpr int64_t HUGE_PAGE = 2 << 20;

// Ask for huge pages in the whole ones among these bytes: the first touch of large blocks, and giving them back, then
// cost a fraction. Only a hint; nothing happens where the system has no such pages.
void advise(void *data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const int64_t address = reinterpret_cast<int64_t>(data), first = oxl::round_up(address, HUGE_PAGE);
    const int64_t last = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (data && last > first) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Aligned memory for one call. The largest block is kept for the next call, unless it is very large: fresh pages cost about
// as much as what the kernels do on them.
class Buffer {
  public:
    explicit Buffer(int64_t floats) {
        const int64_t bytes = 4 * floats + 64, alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
        {
            const std::lock_guard<std::mutex> hold(lock());
            if (kept().bytes >= bytes) std::swap(block, kept());
        }
        if (!block.data) {
            block = {std::aligned_alloc(alignment, oxl::round_up(bytes, alignment)), bytes};
            advise(block.data, bytes);
        }
        data = static_cast<float *>(block.data);
    }
    ~Buffer() {
        if (block.data && block.bytes <= MOST_KEPT) {
            const std::lock_guard<std::mutex> hold(lock());
            if (block.bytes > kept().bytes) std::swap(block, kept());
        }
        std::free(block.data);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    static void release() {
        Block freed;
        {
            const std::lock_guard<std::mutex> hold(lock());
            std::swap(freed, kept());
        }
        std::free(freed.data);
    }

    float *data;  // null if there is no memory

  private:
    static constexpr int64_t MOST_KEPT = 128 << 20;
    struct Block {
        void *data = nullptr;
        int64_t bytes = 0;
    };
    static std::mutex &lock() {
        static std::mutex mutex;
        return mutex;
    }
    static Block &kept() {
        static Block block;
        return block;
    }
    Block block;
};

template <class Args>
struct Call {
    const Args &args;
    void (*kernel)(const Args &, int64_t, float *);
    float *scratch;
    int64_t scratch_each;
};

enum class On { BORROWED, OWN };  // threads, see borrowed.h

template <class Args>
int run(const Args &args, void (*kernel)(const Args &, int64_t, float *), int64_t tasks, int threads,
        int64_t scratch_each, On on = On::BORROWED) {
    scratch_each = oxl::round_up(scratch_each, 16);
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads < 1) threads = 1;
    const Buffer scratch(scratch_each * threads);
    if (!scratch.data) return 1;
    Call<Args> call{args, kernel, scratch.data, scratch_each};
    const oxl::Pool::Task one = [](void *context, int64_t task, int worker) {
        const auto &c = *static_cast<Call<Args> *>(context);
        c.kernel(c.args, task, c.scratch + worker * c.scratch_each);
    };
    if (on == On::OWN || !oxl::Borrowed::run(tasks, threads, one, &call)) oxl::Pool::instance().run(tasks, threads, one, &call);
    return 0;
}

// Split the batch only as far as the threads need it: rows that run together share the reading of the weight.
void split_rows(oxl::Rnn &a, int threads) {
    const int64_t groups = a.heads % threads == 0 || a.heads >= 4 * threads ? 1 : threads;
    a.rows_per_task = oxl::round_up((a.batch + groups - 1) / groups, 4);
    a.row_groups = (a.batch + a.rows_per_task - 1) / a.rows_per_task;
}

int run_rnn(oxl::Rnn a, const oxl::Kernels &kernels, int threads, bool backward) {
    if (threads < 1) threads = 1;
    split_rows(a, threads);
    const int64_t wide = oxl::recurrent_gates(a.cell) * a.d;
    const int64_t inputs = backward ? wide : a.d, outputs = backward ? a.d : wide;
    const int64_t padded = oxl::round_up(outputs, kernels.tile);
    const Buffer packed(a.heads * padded * inputs);
    if (!packed.data) return 1;
    for (int64_t head = 0; head < a.heads; ++head)
        kernels.pack(a.weight + head * wide * a.d, inputs, outputs, !backward, packed.data + head * padded * inputs);
    a.packed = packed.data;
    const int64_t rows = a.rows_per_task;
    const int64_t scratch = rows * (padded + 4 * a.d) + oxl::round_up(inputs, 16) + 2 * rows + 64;
    return run(a, backward ? kernels.rnn_backward : kernels.rnn_forward, a.heads * a.row_groups, threads, scratch);
}

}  // namespace

namespace oxl {
int64_t team_claim(Team &team, int64_t phase, int64_t count, int worker) { return team.claim(phase, count, worker); }
int team_size(const Team &team) { return team.size(); }
void team_finish(Team &team, int64_t phase, int64_t count, int64_t done, Ahead next) {
    team.finish(phase, count, done, next);
}
}  // namespace oxl

// Lend the threads of an OpenMP runtime to the operators.
OXL_EXPORT void oxl_borrow(oxl::Borrowed::Parallel parallel) { oxl::Borrowed::use(parallel); }

// Give the working space that is kept between calls back to the system.
OXL_EXPORT void oxl_release() { Buffer::release(); }

OXL_EXPORT int oxl_isa_count() { return COUNT; }

OXL_EXPORT const char *oxl_isa_name(int isa) { return TABLE[isa]->name; }

// Whether this processor has the instruction set of that index.
OXL_EXPORT int oxl_isa_available(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (TABLE[isa] == &oxl_kernels_avx512_bf16)
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (TABLE[isa] == &oxl_kernels_avx512) return avx512;
    if (TABLE[isa] == &oxl_kernels_avx2) return avx2;
#endif
    (void)isa;
    return 1;
}

OXL_EXPORT int oxl_mlstm_step(int isa, int threads, oxl::MlstmStep *args) {
    oxl::MlstmStep a = *args;
    a.splits = a.pairs % threads == 0 || a.pairs >= 4 * threads || a.dv < 32 * threads ? 1 : threads;
    const int64_t scratch = 2 * oxl::round_up(a.dk, 16) + oxl::round_up(a.dv, 16);
    return run(a, TABLE[isa]->mlstm_step, a.pairs * a.splits, threads, scratch);
}

OXL_EXPORT int oxl_mlstm_forward(int isa, int threads, oxl::Mlstm *args) {
    oxl::Mlstm a = *args;
    const int64_t pairs = a.batch * a.heads, rows = pairs * a.time, size = a.bfloat16 ? 2 : 4;
    advise(a.h, rows * a.dv * size);
    a.splits = pairs % threads == 0 || pairs >= 4 * threads || a.dv < 64 * threads ? 1 : threads;
    return run(a, TABLE[isa]->mlstm_forward, pairs * a.splits, threads, TABLE[isa]->mlstm_forward_scratch(a));
}

OXL_EXPORT int oxl_mlstm_backward(int isa, int threads, oxl::Mlstm *args) {
    const int64_t rows = args->batch * args->heads * args->time, size = args->bfloat16 ? 2 : 4;
    advise(args->dq_out, rows * args->dk * size);
    advise(args->dk_out, rows * args->dk * size);
    advise(args->dv_out, rows * args->dv * size);
    return run(*args, TABLE[isa]->mlstm_backward, args->batch * args->heads, threads,
               TABLE[isa]->mlstm_backward_scratch(*args));
}

OXL_EXPORT int oxl_rnn_forward(int isa, int threads, oxl::Rnn *args) {
    return run_rnn(*args, *TABLE[isa], threads, false);
}

OXL_EXPORT int oxl_rnn_backward(int isa, int threads, oxl::Rnn *args) {
    return run_rnn(*args, *TABLE[isa], threads, true);
}

OXL_EXPORT int oxl_convolution_forward(int isa, int threads, oxl::Convolution *args) {
    return run(*args, TABLE[isa]->convolution_forward, args->batch * args->blocks, threads, 0);
}

OXL_EXPORT int oxl_convolution_backward(int isa, int threads, oxl::Convolution *args) {
    const int64_t ring = args->taps * args->channels + oxl::round_up(2 * args->taps, 16);
    return run(*args, TABLE[isa]->convolution_backward, args->batch * args->blocks, threads, ring);
}

OXL_EXPORT int oxl_head_norm_forward(int isa, int threads, oxl::HeadNorm *args) {
    return run(*args, TABLE[isa]->head_norm_forward, args->blocks, threads, 0);
}

OXL_EXPORT int oxl_head_norm_backward(int isa, int threads, oxl::HeadNorm *args) {
    return run(*args, TABLE[isa]->head_norm_backward, args->blocks, threads, args->d);
}

OXL_EXPORT int oxl_product(int isa, int threads, oxl::Product *args) {
    oxl::Product a = *args;
    const int64_t tasks = 8 * static_cast<int64_t>(threads < 1 ? 1 : threads);  // several each: some cores are slower
    a.rows_per_task = oxl::round_up((a.weight.rows + tasks - 1) / tasks, 8);
    return run(a, TABLE[isa]->product, (a.weight.rows + a.rows_per_task - 1) / a.rows_per_task, threads, 0);
}

OXL_EXPORT int oxl_matrix_product(int isa, int threads, oxl::MatrixProduct *args) {
    oxl::MatrixProduct a = *args;
    if (threads < 1) threads = 1;
    TABLE[isa]->matrix_product_plan(a, threads);
    advise(a.c, a.m * a.n * 4);
    const int64_t down = (a.m + a.rows_per_task - 1) / a.rows_per_task;
    const int64_t across = (a.n + a.columns_per_task - 1) / a.columns_per_task;
    return run(a, TABLE[isa]->matrix_product, down * across, threads, a.scratch);
}

OXL_EXPORT int oxl_quantized_product(int isa, int threads, oxl::QuantizedProduct *args) {
    oxl::QuantizedProduct a = *args;
    if (threads < 1) threads = 1;
    TABLE[isa]->quantized_plan(a, threads);
    const int64_t vectors = oxl::round_up(a.batch, 48), tasks = (a.batch + a.vectors_per_task - 1) / a.vectors_per_task;
    const Buffer space(2 * vectors + (a.code_bytes + 3) / 4);
    if (!space.data) return 1;
    a.scales = space.data;
    a.sums = reinterpret_cast<int32_t *>(space.data + vectors);
    a.codes = reinterpret_cast<int16_t *>(space.data + 2 * vectors);
    if (run(a, TABLE[isa]->quantize_activations, tasks, threads, a.vector_scratch)) return 1;
    return run(a, TABLE[isa]->quantized_product, (a.weight.rows + a.rows_per_task - 1) / a.rows_per_task, threads, a.row_scratch);
}

OXL_EXPORT int oxl_cross_entropy(int isa, int threads, oxl::CrossEntropy *args) {
    oxl::CrossEntropy a = *args;
    const int64_t tasks = 8 * static_cast<int64_t>(threads < 1 ? 1 : threads);
    a.rows_per_task = (a.rows + tasks - 1) / tasks;
    if (a.rows_per_task < 1) return 0;
    return run(a, TABLE[isa]->cross_entropy, (a.rows + a.rows_per_task - 1) / a.rows_per_task, threads,
               oxl::round_up(a.columns, 16));
}

OXL_EXPORT int oxl_probe(int isa, int threads, oxl::Probe *args) {
    oxl::Probe a = *args;
    if (a.count < 1) return 0;
    const int64_t tasks = 8 * static_cast<int64_t>(threads < 1 ? 1 : threads);
    a.each = oxl::round_up((a.count + tasks - 1) / tasks, 16);
    const Buffer seen(tasks);
    if (!seen.data) return 1;
    a.seen = reinterpret_cast<int32_t *>(seen.data);
    return run(a, TABLE[isa]->probe, (a.count + a.each - 1) / a.each, threads, 0, On::OWN);
}

// Puts what is in memory there, and its neighbours, into huge pages: reading it is then a fifth faster. Only a hint, see
// advise(); where pages are those of a file, its file system decides.
OXL_EXPORT int oxl_huge_pages(int isa, int threads, oxl::Span *args) {
    (void)isa, (void)threads;
#if defined(__linux__)
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1
    const int64_t address = reinterpret_cast<int64_t>(args->data), end = address + args->bytes;
    for (int64_t page = address / HUGE_PAGE * HUGE_PAGE; page < end; page += HUGE_PAGE)
        madvise(reinterpret_cast<void *>(page), HUGE_PAGE, COLLAPSE);
#else
    (void)args;
#endif
    return 0;
}

// Sets workspace_floats to what oxl_decode needs for this batch and number of threads.
OXL_EXPORT int oxl_decode_workspace(int isa, int threads, oxl::Decode *args) {
    (void)isa;
    const Workspace w(*args, nullptr);
    args->workspace_floats = w.floats + threads * w.own_floats;
    return 0;
}

OXL_EXPORT int oxl_decode(int isa, int threads, oxl::Decode *args) {
    struct Call {
        const oxl::Decode &args;
        const oxl::Kernels &kernels;
        oxl::Team team;
    };
    constexpr int64_t PHASES_PER_LAYER = 6, OTHER_PHASES = 2;
    try {
        Call call{*args, *TABLE[isa], oxl::Team(PHASES_PER_LAYER * args->num_layers + OTHER_PHASES, threads)};
        oxl::Pool::instance().run(
            threads, threads,
            [](void *context, int64_t, int worker) {
                auto &c = *static_cast<Call *>(context);
                c.kernels.decode(c.args, c.team, worker);
            },
            &call);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
