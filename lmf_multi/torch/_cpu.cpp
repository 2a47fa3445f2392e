// The softmax form of integer labels on CPUs, value and gradient in one pass over the logits.
//
// The steps of lmf_multi.reference, in the algebra of _triton_kernels.py: float32, with the rounding
// errors of differences put back; names with _s are those of s z. A tile of a few rows stays in the
// cache: its logits are read once, and their gradient is written once. Results that are not finite
// are left to the caller, who has operations for infinities.
//
// Vectors are those of GCC and Clang, compiled for three generations of x86 and chosen when loaded.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

#if defined(__x86_64__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))  // into each of these

namespace {

constexpr int LANES = 16, ROWS = 64;  // rows of a vector, and at most of a tile
constexpr int64_t FEW = 64;           // classes, with which a vector takes rows and not classes
constexpr int64_t TILE = 16384;       // logits, which stay in the cache, where rows are long
constexpr int64_t CHUNK = 16384;      // logits whose rows' losses are added before the others'
constexpr int64_t ALONE = 32768;      // logits that are not worth a second thread
constexpr float LARGE = 1e18f;        // beyond every log-odds that matters; products stay finite
constexpr float NEGLIGIBLE = -28.f;   // e^-28 is far below a sum's epsilon, its products normal
constexpr float ZERO = -104.f;        // e^-104 is below float32's smallest number

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

struct Call {
    const void *z;          // logits
    const int64_t *y;       // (N,) labels
    const float *margins;   // (C,) or null, without LDAM
    const float *weights;   // (C,) or null for ones
    float *grad;            // of the logits, or null
    float *losses;          // (N,) or null
    int64_t N, C, inner;    // row r is (r / inner, r % inner) for the strides
    int64_t z_outer, z_inner, z_class, grad_outer, grad_inner, grad_class;
    int64_t ignore_index;   // examples with this label take no part
    double a, b;            // what LDAM and focal of a weight of 1 are multiplied by; b 0: no focal
    float gamma, scale;
};

// A tile's rows, and what is known of each.
struct alignas(4 * LANES) Rows {
    int64_t first, n;
    int64_t z_at[ROWS], grad_at[ROWS], label[ROWS];
    bool masked[ROWS];
    bool together[ROWS / LANES];              // whether a vector's are neighbours in memory
    float weight[ROWS], margin[ROWS];         // w_y and Δ_y
    float z_y[ROWS], M[ROWS];                 // the label's logit, the largest of the others'
    float S_s[ROWS], S[ROWS];                 // Σ_{k≠y} of the exponentials
    float slope[ROWS], of_s[ROWS], of[ROWS];  // gradient of z_y, and that of z_k over exponentials
    float loss[ROWS];
};

// --- arithmetic

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats absolute(Floats x) { return x < 0 ? -x : x; }
// y where one of them is NaN
INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }
INLINE Floats &vector(float *x) { return *reinterpret_cast<Floats *>(x); }

// e^x of x ≤ 0 by Taylor's series of e^(x - n log 2); exactly 0 below `least`.
INLINE Floats exp_(Floats x, float least) {
    constexpr float TO_INTEGER = 12582912.f;  // 1.5 · 2^23, next to which floats are integers
    Floats n = (x * 1.44269504f + TO_INTEGER) - TO_INTEGER;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
    Floats p = 1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f));
    p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * p))));
    Ints power = __builtin_convertvector(n, Ints);
    if (least == NEGLIGIBLE) {
        p = (Floats)((Ints)p + (power << 23));
    } else {  // in two steps, as the result may be subnormal
        Ints half = power >> 1;
        p = p * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
    }
    return x < least ? Floats{} : p;
}

// log((1 + t) / (1 - t)) for |t| ≤ 1/3
INLINE Floats two_atanh(Floats t) {
    Floats q = t * t, p = 1 / 9.f + q * (1 / 11.f + q * (1 / 13.f));
    return 2 * t * (1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * p))));
}

// log x of x ≥ 1
INLINE Floats log_(Floats x) {
    constexpr int32_t TWO_THIRDS = 0x3f2aaaab, MANTISSA = 0x7fffff;
    Ints i = (Ints)x - TWO_THIRDS;
    Floats n = __builtin_convertvector(i >> 23, Floats);
    Floats m = (Floats)((i & MANTISSA) + TWO_THIRDS);  // in [2/3, 4/3)
    return n * 0.693147181f + two_atanh((m - 1) / (m + 1)) + (x - x);  // the last for NaN
}

INLINE Floats log1p_(Floats u) { return two_atanh(u / (2 + u)); }

// a - b, rounded, and what the rounding lost (Knuth's TwoSum)
INLINE Floats difference(Floats a, Floats b, Floats &lost) {
    Floats c = a - b;
    lost = (a - (c + (a - c))) + ((a - c) - b);
    lost = absolute(lost) < INFINITY ? lost : Floats{};
    return c;
}

// s (z - M - Δ) - log S, with what was lost, times s, put back
INLINE Floats log_odds(Floats z, Floats M, Floats S, float s, Floats margin) {
    Floats lost, also_lost;
    Floats d = difference(z, M, lost), h = difference(d, margin, also_lost);
    return s * h + (s * (lost + also_lost) - log_(S));
}

// softplus(-τ) and its slope, with τ = ω(s z) - s Δ
INLINE Floats ldam(Floats tau, float s, Floats &slope) {
    Floats u = exp_(-absolute(tau), ZERO);
    slope = -s * ((tau > 0 ? u : all(1)) / (1 + u));
    return larger(-tau, Floats{}) + log1p_(u);
}

// sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point
INLINE Floats focal(Floats omega, float gamma, Floats &slope) {
    Floats u = exp_(-absolute(omega), ZERO), log1p_u = log1p_(u);
    Floats ce = larger(-omega, Floats{}) + log1p_u;
    Floats modulation = exp_(-gamma * (larger(omega, Floats{}) + log1p_u), ZERO);
    Floats small = u / (1 + u), large = 1 / (1 + u);
    Floats p = omega > 0 ? large : small, rest = omega > 0 ? small : large;
    slope = -modulation * (gamma * p * (ce > LARGE ? all(LARGE) : ce) + rest);
    return modulation * ce;
}

// --- a tile: what each row is

INLINE void describe(const Call &call, Rows &rows) {
    int64_t i = rows.first / call.inner, j = rows.first % call.inner;
    bool neighbours = call.z_inner == 1 && call.grad_inner == 1;
    for (int64_t r = 0; r < rows.n; r++) {
        int64_t y = call.y[rows.first + r];
        rows.masked[r] = y == call.ignore_index;
        y = rows.label[r] = rows.masked[r] ? 0 : y;
        rows.weight[r] = rows.masked[r] ? 0 : call.weights ? call.weights[y] : 1;
        rows.margin[r] = call.margins ? call.margins[y] : 0;
    }
    for (int64_t r = 0; r < rows.n;) {
        rows.z_at[r] = i * call.z_outer + j * call.z_inner;
        rows.grad_at[r] = i * call.grad_outer + j * call.grad_inner;
        bool starts = r % LANES == 0 && r + LANES <= rows.n;
        if (starts) rows.together[r / LANES] = neighbours && j + LANES <= call.inner;
        int64_t step = starts && rows.together[r / LANES] ? LANES : 1;
        r += step, j += step;
        if (j == call.inner) i++, j = 0;
    }
    for (int64_t r = rows.n; r % LANES != 0; r++) {  // the last vector is filled up
        rows.together[r / LANES] = rows.masked[r] = false;
        rows.z_at[r] = rows.z_at[0];
        rows.label[r] = rows.label[0];
        rows.weight[r] = rows.weight[0];
        rows.margin[r] = rows.margin[0];
    }
}

INLINE void terms(const Call &call, Rows &rows) {
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats z_y = vector(rows.z_y + r), M = vector(rows.M + r);
        Floats loss{}, slope{}, part;
        if (call.margins) {
            Floats a = (float)call.a * vector(rows.weight + r);
            Floats S_s = larger(all(1), vector(rows.S_s + r));
            Floats tau = log_odds(z_y, M, S_s, call.scale, vector(rows.margin + r));
            loss += a * ldam(tau, call.scale, part);
            slope += a * part;
            vector(rows.of_s + r) = -slope / S_s;
        }
        if (call.b != 0) {
            Floats b = (float)call.b * vector(rows.weight + r);
            Floats S = larger(all(1), vector(rows.S + r));
            loss += b * focal(log_odds(z_y, M, S, 1, Floats{}), call.gamma, part);
            slope += b * part;
            vector(rows.of + r) = -(b * part) / S;
        }
        vector(rows.loss + r) = loss;
        vector(rows.slope + r) = slope;
    }
}

// --- a tile: exponentials and gradient, where a vector takes rows: x and e are (C, pitch)

INLINE float widened(float x) { return x; }
INLINE float widened(BFloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// Σ e^{s (x - M)} over the classes of a vector's rows, each of which goes to e
INLINE Floats exp_and_sum(int64_t C, int64_t pitch, const float *x, float *e, Floats M, float s) {
    Floats S{};
    for (int64_t begin = 0; begin < C; begin += FEW) {  // a sum of sums rounds less
        Floats some{};
        for (int64_t c = begin; c < C && c < begin + FEW; c++) {
            Floats d = *(const Floats *)(x + c * pitch) - M;
            some += vector(e + c * pitch) = exp_(s * d, NEGLIGIBLE);
        }
        S += some;
    }
    return S;
}

template <class T>
INLINE void rows_in_vectors(const Call &call, Rows &rows, float *x, float *e, int64_t pitch) {
    const T *z = (const T *)call.z;
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        const int64_t *at = rows.z_at + r;
        if (rows.together[r / LANES]) {
            for (int64_t c = 0; c < C; c++)
                for (int i = 0; i < LANES; i++)
                    x[c * pitch + r + i] = widened(z[at[0] + c * call.z_class + i]);
        } else {
            for (int i = 0; i < LANES; i++)
                for (int64_t c = 0; c < C; c++)
                    x[c * pitch + r + i] = widened(z[at[i] + c * call.z_class]);
        }
        for (int i = 0; i < LANES; i++) {
            if (rows.masked[r + i])
                for (int64_t c = 0; c < C; c++) x[c * pitch + r + i] = 0;
            float &x_y = x[rows.label[r + i] * pitch + r + i];
            rows.z_y[r + i] = x_y;
            x_y = -LARGE;
        }
    }
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats M = all(-LARGE);
        for (int64_t c = 0; c < C; c++) M = larger(vector(x + c * pitch + r), M);
        vector(rows.M + r) = M;
        if (call.margins) vector(rows.S_s + r) = exp_and_sum(C, pitch, x + r, e + r, M, call.scale);
        if (call.b != 0) vector(rows.S + r) = exp_and_sum(C, pitch, x + r, x + r, M, 1);
    }
}

INLINE void gradient_in_vectors(const Call &call, Rows &rows, float *x, float *e, int64_t pitch) {
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats of_s = vector(rows.of_s + r), of = vector(rows.of + r);
        for (int64_t c = 0; c < C; c++) {
            Floats g{};
            if (call.margins) g += vector(e + c * pitch + r) * of_s;
            if (call.b != 0) g += vector(x + c * pitch + r) * of;
            vector(x + c * pitch + r) = g;
        }
        for (int i = 0; i < LANES; i++) x[rows.label[r + i] * pitch + r + i] = rows.slope[r + i];
        const int64_t *at = rows.grad_at + r;
        if (rows.together[r / LANES]) {
            for (int64_t c = 0; c < C; c++)
                for (int i = 0; i < LANES; i++)
                    call.grad[at[0] + c * call.grad_class + i] = x[c * pitch + r + i];
        } else {
            for (int i = 0; i < LANES && r + i < rows.n; i++)
                for (int64_t c = 0; c < C; c++)
                    call.grad[at[i] + c * call.grad_class] = x[c * pitch + r + i];
        }
    }
}

// --- the same where a vector takes classes: x and e are (rows, C), C rounded up

INLINE float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE float exp_and_sum_of_row(int64_t padded, const float *x, float *e, float M, float s) {
    Floats S{};
    for (int64_t begin = 0; begin < padded; begin += FEW * LANES) {
        Floats some{};
        for (int64_t c = begin; c < padded && c < begin + FEW * LANES; c += LANES) {
            Floats d = *(const Floats *)(x + c) - M;
            some += vector(e + c) = exp_(s * d, NEGLIGIBLE);
        }
        S += some;
    }
    return sum(S);
}

template <class T>
INLINE void classes_in_vectors(const Call &call, Rows &rows, float *x, float *e, int64_t padded) {
    for (int64_t r = 0; r < rows.n; r++, x += padded, e += padded) {
        const T *z = (const T *)call.z + rows.z_at[r];
        for (int64_t c = 0; c < call.C; c++) x[c] = widened(z[c]);
        for (int64_t c = call.C; c < padded; c++) x[c] = -LARGE;
        if (rows.masked[r])
            for (int64_t c = 0; c < call.C; c++) x[c] = 0;
        rows.z_y[r] = x[rows.label[r]];
        x[rows.label[r]] = -LARGE;
        Floats most = all(-LARGE);
        for (int64_t c = 0; c < padded; c += LANES) most = larger(vector(x + c), most);
        float M = -LARGE;
        for (int i = 0; i < LANES; i++) M = most[i] > M ? most[i] : M;
        rows.M[r] = M;
        if (call.margins) rows.S_s[r] = exp_and_sum_of_row(padded, x, e, M, call.scale);
        if (call.b != 0) rows.S[r] = exp_and_sum_of_row(padded, x, x, M, 1);
    }
}

INLINE void gradient_of_rows(const Call &call, Rows &rows, float *x, float *e, int64_t padded) {
    for (int64_t r = 0; r < rows.n; r++, x += padded, e += padded) {
        float *grad = call.grad + rows.grad_at[r];
        float of_s = call.margins ? rows.of_s[r] : 0, of = call.b != 0 ? rows.of[r] : 0;
        for (int64_t c = 0; c < padded; c += LANES) {
            Floats g{};
            if (call.margins) g += vector(e + c) * of_s;
            if (call.b != 0) g += vector(x + c) * of;
            vector(x + c) = g;
        }
        x[rows.label[r]] = rows.slope[r];
        for (int64_t c = 0; c < call.C; c++) grad[c] = x[c];
    }
}

// --- all of them

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

template <class T>
INLINE void take(const Call &call, const Plan &plan, Rows &rows, float *x, float *e) {
    describe(call, rows);
    if (plan.by_rows)
        rows_in_vectors<T>(call, rows, x, e, plan.pitch);
    else
        classes_in_vectors<T>(call, rows, x, e, plan.pitch);
    terms(call, rows);
    if (!call.grad) return;
    if (plan.by_rows)
        gradient_in_vectors(call, rows, x, e, plan.pitch);
    else
        gradient_of_rows(call, rows, x, e, plan.pitch);
}

FOR_EACH_CPU double chunk(const Call &call, const Plan &plan, bool bfloat16, int64_t begin,
                          int64_t end, float *x) {
    Rows rows;
    double total = 0;
    for (rows.first = begin; rows.first < end; rows.first += plan.tile) {
        rows.n = end - rows.first < plan.tile ? end - rows.first : plan.tile;
        if (bfloat16)
            take<BFloat16>(call, plan, rows, x, x + plan.size);
        else
            take<float>(call, plan, rows, x, x + plan.size);
        for (int64_t r = 0; r < rows.n; r++) {
            total += rows.loss[r];
            if (call.losses) call.losses[rows.first + r] = rows.loss[r];
        }
    }
    return total;
}

// What the means divide by, and whether every label is known.
struct Totals {
    double weight, examples;
    bool known;
};

Totals totals(const Call &call, const Plan &plan, int64_t chunks, int threads, double *sums) {
    int unknown = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : unknown)
    for (int64_t i = 0; i < chunks; i++) {
        double weight = 0, examples = 0;
        for (int64_t r = i * plan.chunk; r < call.N && r < (i + 1) * plan.chunk; r++) {
            int64_t y = call.y[r];
            bool valid = y != call.ignore_index, known = y >= 0 && y < call.C;
            unknown |= valid && !known;
            weight += !(valid && known) ? 0 : call.weights ? call.weights[y] : 1;
            examples += valid;
        }
        sums[i] = weight;
        sums[chunks + i] = examples;
    }
    Totals found = {0, 0, !unknown};
    for (int64_t i = 0; i < chunks; i++) {  // in the same order for any number of threads
        found.weight += sums[i];
        found.examples += sums[chunks + i];
    }
    return found;
}

}  // namespace

// The loss, summed, and its gradient. Means divide LDAM by the total class weight and focal by the
// number of examples, those of the batch where `total_weight` is NaN; `by_weight` 0 divides both by
// the examples, `by_examples` 0 neither. Returns 0; before anything is written, 1 for a label that
// is out of range and 2 where memory is short.
extern "C" int lmf_multi_one_class(
    const void *z, int bfloat16, const int64_t *y, const float *margins, const float *weights,
    float *grad, float *losses, double *loss, int64_t N, int64_t C, int64_t inner,
    int64_t z_outer, int64_t z_inner, int64_t z_class, int64_t grad_outer, int64_t grad_inner,
    int64_t grad_class, int64_t ignore_index, double alpha, double beta, double gamma, double scale,
    int by_weight, int by_examples, double total_weight, double total_examples, int threads) {
    Call call = {z, y, margins, weights, grad, losses, N, C, inner,
                 z_outer, z_inner, z_class, grad_outer, grad_inner, grad_class,
                 ignore_index, alpha, beta, (float)gamma, (float)scale};
    if (inner == 1) {  // rows of one axis
        call.inner = N;
        call.z_inner = z_outer;
        call.grad_inner = grad_outer;
    }
    Plan plan = divide(call);
    int64_t chunks = (N + plan.chunk - 1) / plan.chunk;
    if (N * C <= ALONE) threads = 1;
    float *work = (float *)aligned_alloc(4 * LANES, threads * 2 * plan.size * sizeof(float));
    double *sums = (double *)calloc(2 * chunks, sizeof(double));
    if (!work || !sums) {
        free(work);
        free(sums);
        return 2;
    }
    Totals found = totals(call, plan, chunks, threads, sums);
    if (found.known) {
        if (total_weight == total_weight) found = {total_weight, total_examples, true};
        double examples = found.examples < 1 ? 1 : found.examples;
        double weight = !by_weight ? examples : found.weight == 0 ? 1 : found.weight;
        call.a = alpha / (by_examples ? weight : 1);
        call.b = beta / (by_examples ? examples : 1);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < chunks; i++) {
            int64_t begin = i * plan.chunk, end = begin + plan.chunk;
            float *x = work + omp_get_thread_num() * 2 * plan.size;
            sums[i] = chunk(call, plan, bfloat16, begin, end < N ? end : N, x);
        }
        *loss = 0;
        for (int64_t i = 0; i < chunks; i++) *loss += sums[i];
    }
    free(work);
    free(sums);
    return !found.known;
}
