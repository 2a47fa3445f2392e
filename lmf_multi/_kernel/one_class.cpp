// The softmax form of integer labels on CPUs, value and gradient in one pass over the logits.
//
// The steps of lmf_multi.reference, in the algebra of torch/_triton_kernels.py: float32, with what
// differences lose by rounding put back; names with _s are those of s z. A tile of a few rows stays
// in the cache: its logits are read once, and their gradient is written once.
//
// Vectors are those of GCC and Clang. GCC compiles them for three generations of x86, by pragmas:
// target_clones would clone vectors that were taken apart for the oldest already.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "threads.h"
#include "xla.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "labels are read as their lower and their upper half"
#endif

// One call, as lmf_multi/_kernel/__init__.py writes it. Strides count numbers.
struct lmf_multi_call {
    int64_t size;          // of this structure, in bytes
    const void *z;         // logits
    const int64_t *y;      // (N,) labels
    const float *margins;  // (C,), or null without LDAM
    const float *weights;  // (C,), or null for ones
    float *grad;           // of the logits, to be written, or null
    float *losses;         // (N,), to be written, or null
    int64_t N, C, inner;   // row r is (r / inner, r % inner) for the strides
    int64_t z_outer, z_inner, z_class, grad_outer, grad_inner, grad_class;
    int64_t ignore_index;                 // examples with this label take no part
    double alpha, beta;                   // the terms' shares
    double total_weight, total_examples;  // that means divide by; NaN: those of the batch
    float gamma, scale;
    int32_t dtype;                   // of the logits
    int32_t by_weight, by_examples;  // what means divide by
    int32_t threads;
    double loss;  // written: the losses' sum
};

#define INLINE static inline __attribute__((always_inline))  // into each generation's functions

namespace {

constexpr int LANES = 16, ROWS = 64;  // rows of a vector, and at most of a tile
constexpr int64_t FEW = 64;           // classes, with which a vector takes rows and not classes
constexpr int64_t TILE = 16384;       // logits, which stay in the cache, where rows are long
constexpr int64_t CHUNK = 16384;      // logits whose rows' losses are added before the others'
constexpr int64_t ALONE = 32768;      // logits that are not worth a second thread of a pool
constexpr int64_t START = 131072;     // logits for each thread that is started
constexpr float LARGE = 1e18f;        // beyond every log-odds that matters; products stay finite
constexpr float NEGLIGIBLE = -28.f;   // e^-28 is far below a sum's epsilon, its products normal
constexpr float ZERO = -104.f;        // e^-104 is below float32's smallest number

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Status { DONE, UNKNOWN_LABEL, NO_MEMORY, OTHER_SIZE };

struct Call : lmf_multi_call {
    const int32_t *y_32;  // (N,) labels in 32 bits instead, or null
    bool has_ldam, has_focal;
    double a, b;  // what LDAM and focal of a weight of 1 are multiplied by

    // Logits and gradient in the order of (outer, C, inner), or of (N, C).
    void lie_in_order() {
        bool rows = inner == 1;
        if (rows) inner = N;
        z_outer = grad_outer = C * inner;
        z_class = grad_class = rows ? 1 : inner;
        z_inner = grad_inner = rows ? C : 1;
    }
};

// How the work is divided.
struct Plan {
    bool by_rows;   // whether a vector takes rows, and not the classes of one
    int64_t tile;   // rows at a time
    int64_t pitch;  // by rows: of x's and e's classes; else of their rows
    int64_t size;   // floats of x, and of e
    int64_t chunk;  // rows whose losses are added before the others'
};

Plan divide(const Call &call) {
    int64_t C = call.C, padded = (C + LANES - 1) / LANES * LANES;
    Plan plan;
    plan.by_rows = C <= FEW || call.z_class != 1 || call.grad_class != 1;
    int64_t fit = TILE / padded, least = plan.by_rows ? LANES : 1;
    plan.tile = fit < least ? least : fit > ROWS ? ROWS : fit;
    if (plan.by_rows) plan.tile = plan.tile / LANES * LANES;
    plan.pitch = plan.by_rows ? plan.tile : padded;
    plan.size = plan.by_rows ? plan.tile * C : plan.tile * padded;
    plan.chunk = CHUNK / C < plan.tile ? plan.tile : CHUNK / C;
    return plan;
}

// What the means divide by, and whether every label is known.
struct Totals {
    double weight, examples;
    bool known;
};

#if defined(__x86_64__) && !defined(__clang__)
#define HAS_GENERATIONS
#endif

namespace oldest {
#include "tiles.h"
}
#ifdef HAS_GENERATIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
namespace avx2 {
#include "tiles.h"
}
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#include "tiles.h"
}
#pragma GCC pop_options
#endif

struct Generation {
    decltype(&oldest::chunk) chunk;
    decltype(&oldest::totals_of) totals_of;
};

#ifdef HAS_GENERATIONS
constexpr Generation GENERATIONS[] = {{oldest::chunk, oldest::totals_of},
                                      {avx2::chunk, avx2::totals_of},
                                      {avx512::chunk, avx512::totals_of}};

int newest_generation() {
    __builtin_cpu_init();
#define SUPPORTS(name) __builtin_cpu_supports(name)
    if (!(SUPPORTS("avx2") && SUPPORTS("fma") && SUPPORTS("bmi") && SUPPORTS("bmi2"))) return 0;
    bool is_512 = SUPPORTS("avx512f") && SUPPORTS("avx512bw") && SUPPORTS("avx512dq");
    return is_512 && SUPPORTS("avx512vl") ? 2 : 1;
}
#else
constexpr Generation GENERATIONS[] = {{oldest::chunk, oldest::totals_of}};

int newest_generation() { return 0; }
#endif

}  // namespace

extern "C" {
extern const int lmf_multi_interface = 2;        // INTERFACE in __init__.py, which says when to raise
int lmf_multi_generation = newest_generation();  // tests lower it
}

namespace {

// One call, whose threads hold it together: its chunks are counted, where means need their totals,
// and then computed.
struct Work {
    const Call call;
    const Plan plan;
    const int64_t chunks;
    const bool counts;
    Chunks counted, computed;
    // of each chunk; they are added in the same order for any number of threads
    std::vector<Totals> totals;
    std::vector<double> losses;
    std::atomic<bool> no_memory{false};

    Work(const Call &call, int64_t threads, bool counts)
        : call(call), plan(divide(call)), chunks((call.N + plan.chunk - 1) / plan.chunk),
          counts(counts), counted(chunks, threads), computed(chunks, threads),
          totals(counts ? chunks : 0), losses(chunks) {}

    // Does what nobody else has taken.
    void take() {
        Flushing flushing;
        const Generation &cpu = GENERATIONS[lmf_multi_generation];
        auto end = [&](int64_t i) { return i + 1 < chunks ? (i + 1) * plan.chunk : call.N; };
        Call shared = call;
        if (counts) {
            counted.take([&](int64_t i) { totals[i] = cpu.totals_of(call, i * plan.chunk, end(i)); });
            counted.wait();
            if (!divide_means(shared)) return;
        }
        float *x = nullptr;
        computed.take([&](int64_t i) {
            if (!x) x = (float *)aligned_alloc(4 * LANES, 2 * plan.size * sizeof(float));
            if (!x)
                no_memory = true;
            else
                losses[i] = cpu.chunk(shared, plan, i * plan.chunk, end(i), x);
        });
        free(x);
    }

    // What LDAM and focal are multiplied by; false if a label is unknown.
    bool divide_means(Call &shared) const {
        Totals found = {0, 0, true};
        for (const Totals &some : totals) {
            found.weight += some.weight;
            found.examples += some.examples;
            found.known &= some.known;
        }
        if (call.total_weight == call.total_weight) {
            found.weight = call.total_weight;
            found.examples = call.total_examples;
        }
        double examples = found.examples < 1 ? 1 : found.examples;
        double weight = !call.by_weight ? examples : found.weight == 0 ? 1 : found.weight;
        shared.a = call.alpha / (call.by_examples ? weight : 1);
        shared.b = call.beta / (call.by_examples ? examples : 1);
        return found.known;
    }
};

}  // namespace

// For PyTorch: the loss, summed, and its gradient; what is not finite is left to its operations.
// Means divide LDAM by the total class weight and focal by the number of examples; `by_weight` 0
// divides both by the examples, `by_examples` 0 neither. Before anything is written it returns
// whether a label is out of range, memory is short, or the structure is another one.
extern "C" int lmf_multi_one_class(lmf_multi_call *given) try {
    if (given->size != sizeof *given) return OTHER_SIZE;
    Call call = {*given, nullptr, given->margins != nullptr, given->beta != 0, 0, 0};
    if (call.inner == 1) {  // rows of one axis
        call.inner = call.N;
        call.z_inner = call.z_outer;
        call.grad_inner = call.grad_outer;
    }
    Parallel *in_pool = pool();
    int64_t logits = call.N * call.C, threads = logits > ALONE ? call.threads : 1;
    if (!in_pool) threads = std::min(threads, std::max<int64_t>(logits / START, 1));
    auto work = std::make_shared<Work>(call, threads, true);
    if (in_pool && threads > 1) {
        in_pool([](void *work) { ((Work *)work)->take(); }, work.get(), threads, 0);
    } else {
        for (int64_t i = 1; i < threads; i++) try {
                std::thread([work] { work->take(); }).detach();
            } catch (const std::system_error &) {
                break;  // there are no more
            }
        work->take();
    }
    if (!work->divide_means(call)) return UNKNOWN_LABEL;
    work->computed.wait();
    if (work->no_memory) return NO_MEMORY;
    given->loss = 0;
    for (double some : work->losses) given->loss += some;
    return DONE;
} catch (const std::bad_alloc &) {
    return NO_MEMORY;
}

// --- for XLA, whose threads share the work

namespace {

void help(void *data) {
    std::unique_ptr<std::shared_ptr<Work>> work((std::shared_ptr<Work> *)data);
    (*work)->take();
}

bool succeeds(const xla::Api *api, xla::Error *error) {
    if (error) {
        xla::OldError old = {sizeof(xla::OldError), nullptr, error};
        api->destroy_error(&old);
    }
    return !error;
}

}  // namespace

// Arguments: logits (outer, C, inner) or (N, C); labels of 32 bits, -1 for an unknown one, which
// gives NaN, and -2 for an example that takes no part; γ, s and what LDAM and focal are multiplied
// by; margins (C,) for LDAM; perhaps weights (C,). Attributes: whether there is focal, and LDAM.
// Results: each example's loss, and perhaps the gradient.
extern "C" xla::Error *lmf_multi_one_class_xla(xla::Frame *frame) {
    if (frame->extensions && frame->extensions->type == xla::METADATA) {
        xla::Metadata *metadata = ((xla::MetadataExtension *)frame->extensions)->metadata;
        // an older XLA refuses newer versions; before 0.2 it did not tell its own here
        int minor = frame->api ? frame->api->version.minor_version : 0;
        if (minor < xla::OLDEST_MINOR || minor > xla::MINOR) minor = xla::MINOR;
        metadata->version = {sizeof(xla::Version), nullptr, xla::MAJOR, minor};
        metadata->traits = 0;
        return nullptr;
    }
    if (frame->stage != xla::EXECUTE) return nullptr;
    xla::Buffer **arguments = frame->arguments.each, **results = frame->results.each;
    const xla::Buffer &z = *arguments[0];
    const float *settings = (const float *)arguments[2]->data;
    Call call = {};
    call.z = z.data;
    call.dtype = z.dtype == xla::BF16 ? BFLOAT16 : z.dtype == xla::F16 ? FLOAT16 : FLOAT32;
    call.y_32 = (const int32_t *)arguments[1]->data;
    call.ignore_index = -2;
    call.losses = (float *)results[0]->data;
    call.grad = frame->results.size > 1 ? (float *)results[1]->data : nullptr;
    call.C = z.dims[1];
    call.inner = z.rank > 2 ? z.dims[2] : 1;
    call.N = z.dims[0] * call.inner;
    call.lie_in_order();
    call.gamma = settings[0];
    call.scale = settings[1];
    call.a = settings[2];
    call.b = settings[3];
    call.has_focal = *(const bool *)frame->attributes.each[0]->value;
    call.has_ldam = *(const bool *)frame->attributes.each[1]->value;
    if (call.has_ldam) call.margins = (const float *)arguments[3]->data;
    int weights = call.has_ldam ? 4 : 3;
    if (frame->arguments.size > weights) call.weights = (const float *)arguments[weights]->data;

    int64_t threads = 1;
    xla::Threads all = {sizeof(xla::Threads), nullptr, frame->context, &threads};
    if (!succeeds(frame->api, frame->api->number_of_threads(&all))) threads = 1;
    if (call.N * call.C <= ALONE) threads = 1;
    auto work = std::make_shared<Work>(call, threads, false);
    for (int64_t i = 1; i < threads && i < work->chunks; i++) {
        auto *shared = new std::shared_ptr<Work>(work);
        xla::Task task = {sizeof(xla::Task), nullptr, frame->context, help, shared};
        if (!succeeds(frame->api, frame->api->schedule(&task))) {
            delete shared;
            break;
        }
    }
    work->take();
    work->computed.wait();
    if (!work->no_memory) return nullptr;
    xla::NewError error = {sizeof(xla::NewError), nullptr,
                           "lmf_multi: no memory for a tile of rows", xla::RESOURCE_EXHAUSTED};
    return frame->api->create_error(&error);
}

// Tells an XLA of the function above, by a name, through its interface; 1 if it takes it. JAX has a
// function for that, TensorFlow has none.
extern "C" int lmf_multi_register_xla(const xla::Api *api, const char *name) {
    int minor = api->version.minor_version;
    if (api->version.major_version != xla::MAJOR || minor < xla::OLDEST_MINOR || minor > xla::MINOR)
        return 0;
    xla::Registration registration = {sizeof(xla::Registration), nullptr,
                                      {name, strlen(name)},
                                      {"Host", strlen("Host")},
                                      nullptr, nullptr, nullptr, lmf_multi_one_class_xla, 0};
    return succeeds(api, api->register_handler(&registration));
}
