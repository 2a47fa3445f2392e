// The loss on CPUs, value and gradient in one pass over the logits: the softmax form of integer
// labels, by tiles of rows (tiles.h), and the sigmoid form, by elements (elements.h).
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
//
// In the sigmoid form, which has t, N counts elements, one after another in memory, and C labels;
// element i is of label i / inner % C.
struct lmf_multi_call {
    int64_t size;              // of this structure, in bytes
    const void *z;             // logits
    const int64_t *y;          // (N,) labels
    const float *t;            // (N,) probabilities of the positive, or null
    const uint8_t *where;      // (N,) whether an element takes part, or null for all
    const double *margins;      // (C,), of elements (C, 2) or (2,), or null without LDAM
    const double *weights;      // likewise, or null for ones
    const double *adjustments;  // (C,), of elements () too, added to the logits first, or null
    float *grad;               // of the logits, to be written, or null
    float *losses;             // (N,), to be written, or null
    int64_t N, C, inner;       // row r is (r / inner, r % inner) for the strides
    int64_t z_outer, z_inner, z_class, grad_outer, grad_inner, grad_class;
    int64_t ignore_index;                 // examples with this label take no part
    double alpha, beta;                   // the terms' shares
    double total_weight, total_examples;  // that means divide by; NaN: those of the batch
    float gamma, scale, smoothing;
    float ignored;                   // elements with this label take no part, or NaN
    int32_t dtype;                   // of the logits
    int32_t by_weight, by_examples;  // what means divide by
    int32_t margins_by_label, weights_by_label, adjustments_by_label;  // of elements: whether (C, …)
    int32_t threads;
    double loss;  // written: the losses' sum
};

#define INLINE static inline __attribute__((always_inline))  // into each generation's functions

namespace {

constexpr int WIDEST = 16, ROWS = 64;  // rows of the widest vector, and at most of a tile
constexpr int64_t FEW = 64;           // classes, with which a vector takes rows and not classes
constexpr int64_t TILE = 16384;       // logits, which stay in the cache, where rows are long
constexpr int64_t AHEAD = 4096;       // logits of a row, beside which the next one's gradient fits
constexpr int64_t CHUNK = 4096;       // logits whose rows' losses are added before the others'
constexpr int64_t ALONE = 16384;      // logits that are not worth a second thread of a pool
constexpr int64_t START = 131072;     // logits for each thread that is started
constexpr float LARGE = 1e18f;        // beyond every log-odds that matters; products stay finite
constexpr float NEGLIGIBLE = -28.f;   // e^-28 is far below a sum's epsilon, its products normal
constexpr float ZERO = -87.33654f;    // the exponential of less is no normal number
constexpr float SLACK = 0.01f;        // by which probabilities may leave [0, 1]

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Status { DONE, UNKNOWN_LABEL, NO_MEMORY, OTHER_SIZE };

struct Call : lmf_multi_call {
    const int32_t *y_32;  // (N,) labels in 32 bits instead, or null
    const float *margins_32, *weights_32, *adjustments_32;
    bool has_ldam, has_focal;
    double a, b;  // what LDAM and focal of a weight of 1 are multiplied by

    int64_t logits() const { return t ? N : N * C; }

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
    int64_t C = call.C, padded = (C + WIDEST - 1) / WIDEST * WIDEST;
    Plan plan = {};
    if (call.t) {
        plan.chunk = CHUNK;
        return plan;
    }
    plan.by_rows = C <= FEW || call.z_class != 1 || call.grad_class != 1;
    int64_t fit = TILE / padded, least = plan.by_rows ? WIDEST : 1;
    plan.tile = fit < least ? least : fit > ROWS ? ROWS : fit;
    if (plan.by_rows) plan.tile = plan.tile / WIDEST * WIDEST;
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

// LANES is how many float32 a register holds: GCC takes longer vectors apart, number by number
#define LANES 4
namespace oldest {
#include "tiles.h"
#include "elements.h"
}
#undef LANES
#ifdef HAS_GENERATIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define LANES 8
namespace avx2 {
#include "tiles.h"
#include "elements.h"
}
#undef LANES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define LANES 16
namespace avx512 {
#include "tiles.h"
#include "elements.h"
}
#undef LANES
#pragma GCC pop_options
#endif

struct Generation {
    decltype(&oldest::chunk) chunk;
    decltype(&oldest::totals_of) totals_of;
    decltype(&oldest::elements) elements;
    decltype(&oldest::totals_of_elements) totals_of_elements;
};

#define FUNCTIONS(of) {of::chunk, of::totals_of, of::elements, of::totals_of_elements}
#ifdef HAS_GENERATIONS
constexpr Generation GENERATIONS[] = {FUNCTIONS(oldest), FUNCTIONS(avx2), FUNCTIONS(avx512)};

int newest_generation() {
    __builtin_cpu_init();
#define SUPPORTS(name) __builtin_cpu_supports(name)
    if (!(SUPPORTS("avx2") && SUPPORTS("fma") && SUPPORTS("bmi") && SUPPORTS("bmi2"))) return 0;
    bool is_512 = SUPPORTS("avx512f") && SUPPORTS("avx512bw") && SUPPORTS("avx512dq");
    return is_512 && SUPPORTS("avx512vl") ? 2 : 1;
}
#else
constexpr Generation GENERATIONS[] = {FUNCTIONS(oldest)};

int newest_generation() { return 0; }
#endif

}  // namespace

extern "C" {
extern const int lmf_multi_interface = 5;        // INTERFACE in __init__.py, which says when to raise
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
            auto totals_of = call.t ? cpu.totals_of_elements : cpu.totals_of;
            counted.take([&](int64_t i) { totals[i] = totals_of(call, i * plan.chunk, end(i)); });
            counted.wait();
            if (!divide_means(shared)) return;
        }
        float *x = nullptr;
        int64_t size = 2 * plan.size, C = call.C, padded = (C + WIDEST - 1) / WIDEST * WIDEST;
        if (call.t)
            return computed.take([&](int64_t i) {
                losses[i] = cpu.elements(shared, i * plan.chunk, end(i));
            });
        computed.take([&](int64_t i) {
            if (!x) {
                int64_t more = call.adjustments_32 ? padded : 0;
                x = (float *)aligned_alloc(4 * WIDEST, (size + more) * sizeof(float));
                if (x && call.adjustments_32) {  // a copy, as vectors read beyond its end
                    float *copy = x + size;
                    std::fill(std::copy_n(call.adjustments_32, C, copy), copy + more, 0.f);
                    shared.adjustments_32 = copy;
                }
            }
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
extern "C" int lmf_multi_loss(lmf_multi_call *given) try {
    if (given->size != sizeof *given) return OTHER_SIZE;
    Call call = {*given};
    call.has_ldam = given->margins != nullptr;
    call.has_focal = given->beta != 0;
    std::vector<float> vectors;
    vectors.reserve(5 * call.C);
    auto in_32_bits = [&](const double *vector, int signs, bool by_label) {  // (signs, C)
        const float *begin = vectors.data() + vectors.size();
        for (int sign = 0; vector && sign < signs; sign++)
            for (int64_t k = 0; k < call.C; k++)
                vectors.push_back((float)vector[(by_label ? k * signs : 0) + sign]);
        return vector ? begin : nullptr;
    };
    int signs = call.t ? 2 : 1;
    call.margins_32 = in_32_bits(call.margins, signs, !call.t || call.margins_by_label);
    call.weights_32 = in_32_bits(call.weights, signs, !call.t || call.weights_by_label);
    call.adjustments_32 = in_32_bits(call.adjustments, 1, !call.t || call.adjustments_by_label);
    if (!call.t && call.inner == 1) {  // rows of one axis
        call.inner = call.N;
        call.z_inner = call.z_outer;
        call.grad_inner = call.grad_outer;
    }
    Parallel *in_pool = pool();
    int64_t logits = call.logits(), threads = logits > ALONE ? call.threads : 1;
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
// gives NaN, and -2 for an example that takes no part; γ, s, what LDAM and focal are multiplied by,
// and the sigmoid form's smoothing; margins (C,) for LDAM; perhaps weights (C,); what is added to
// the logits (C,). Attributes: whether something is added, whether there is focal, LDAM, and the
// sigmoid form, whose labels are probabilities in the logits' shape, NaN for an unknown one, and
// whose margins and weights are (2, C). Results: each example's loss, and perhaps the gradient.
extern "C" xla::Error *lmf_multi_loss_xla(xla::Frame *frame) {
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
    auto is = [&](int number) { return *(const bool *)frame->attributes.each[number]->value; };
    bool has_adjustment = is(0), is_sigmoid = is(3);
    if (is_sigmoid)
        call.t = (const float *)arguments[1]->data;
    else
        call.y_32 = (const int32_t *)arguments[1]->data;
    call.ignore_index = call.ignored = -2;
    call.losses = (float *)results[0]->data;
    call.grad = frame->results.size > 1 ? (float *)results[1]->data : nullptr;
    call.C = z.dims[1];
    call.inner = z.rank > 2 ? z.dims[2] : 1;
    call.N = z.dims[0] * call.inner * (is_sigmoid ? call.C : 1);
    if (!is_sigmoid) call.lie_in_order();
    call.gamma = settings[0];
    call.scale = settings[1];
    call.a = settings[2];
    call.b = settings[3];
    call.smoothing = settings[4];
    call.has_focal = is(1);
    call.has_ldam = is(2);
    if (call.has_ldam) call.margins_32 = (const float *)arguments[3]->data;
    int weights = call.has_ldam ? 4 : 3;
    int64_t last = frame->arguments.size - 1;
    if (has_adjustment) call.adjustments_32 = (const float *)arguments[last--]->data;
    if (last >= weights) call.weights_32 = (const float *)arguments[weights]->data;

    int64_t threads = 1;
    xla::Threads all = {sizeof(xla::Threads), nullptr, frame->context, &threads};
    if (!succeeds(frame->api, frame->api->number_of_threads(&all))) threads = 1;
    if (call.logits() <= ALONE) threads = 1;
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
                                      nullptr, nullptr, nullptr, lmf_multi_loss_xla, 0};
    return succeeds(api, api->register_handler(&registration));
}
