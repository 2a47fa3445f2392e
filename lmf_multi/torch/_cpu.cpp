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

#if defined(__x86_64__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))  // into each of these

namespace {

constexpr int LANES = 16, ROWS = 64;  // of a vector, and at most of a tile
constexpr int64_t FEW = 64;           // classes, with which a vector takes rows and not classes
constexpr int64_t TILE = 16384;       // elements where a vector takes classes
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
            Floats a = (float)call.a * vector(rows.weight + r), S_s = larger(all(1), vector(rows.S_s + r));
            Floats tau = log_odds(z_y, M, S_s, call.scale, vector(rows.margin + r));
            loss += a * ldam(tau, call.scale, part);
            slope += a * part;
            vector(rows.of_s + r) = -slope / S_s;
        }
        if (call.b != 0) {
            Floats b = (float)call.b * vector(rows.weight + r), S = larger(all(1), vector(rows.S + r));
            loss += b * focal(log_odds(z_y, M, S, 1, Floats{}), call.gamma, part);
            slope += b * part;
            vector(rows.of + r) = -(b * part) / S;
        }
        vector(rows.loss + r) = loss;
        vector(rows.slope + r) = slope;
    }
}

// --- a tile: exponentials and gradient, where a vector takes rows: x and e are (C, rows)

INLINE float widened(float x) { return x; }
INLINE float widened(BFloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// Σ e^{s (x - M)} over the classes of a vector's rows, each of which goes to e
INLINE Floats exp_and_sum(int64_t C, const float *x, float *e, Floats M, float s) {
    Floats S{};
    for (int64_t begin = 0; begin < C; begin += FEW) {  // a sum of sums rounds less
        Floats some{};
        for (int64_t c = begin; c < C && c < begin + FEW; c++) {
            Floats d = *(const Floats *)(x + c * ROWS) - M;
            some += vector(e + c * ROWS) = exp_(s * d, NEGLIGIBLE);
        }
        S += some;
    }
    return S;
}

template <class T>
INLINE void rows_in_vectors(const Call &call, Rows &rows, float *x, float *e) {
    const T *z = (const T *)call.z;
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        const int64_t *at = rows.z_at + r;
        if (rows.together[r / LANES]) {
            for (int64_t c = 0; c < C; c++)
                for (int i = 0; i < LANES; i++)
                    x[c * ROWS + r + i] = widened(z[at[0] + c * call.z_class + i]);
        } else {
            for (int i = 0; i < LANES; i++)
                for (int64_t c = 0; c < C; c++)
                    x[c * ROWS + r + i] = widened(z[at[i] + c * call.z_class]);
        }
        for (int i = 0; i < LANES; i++) {
            if (rows.masked[r + i])
                for (int64_t c = 0; c < C; c++) x[c * ROWS + r + i] = 0;
            float &x_y = x[rows.label[r + i] * ROWS + r + i];
            rows.z_y[r + i] = x_y;
            x_y = -LARGE;
        }
    }
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats M = all(-LARGE);
        for (int64_t c = 0; c < C; c++) M = larger(vector(x + c * ROWS + r), M);
        vector(rows.M + r) = M;
        if (call.margins) vector(rows.S_s + r) = exp_and_sum(C, x + r, e + r, M, call.scale);
        if (call.b != 0) vector(rows.S + r) = exp_and_sum(C, x + r, x + r, M, 1);
    }
}

INLINE void gradient_in_vectors(const Call &call, Rows &rows, float *x, float *e) {
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats of_s = vector(rows.of_s + r), of = vector(rows.of + r);
        for (int64_t c = 0; c < C; c++) {
            Floats g{};
            if (call.margins) g += vector(e + c * ROWS + r) * of_s;
            if (call.b != 0) g += vector(x + c * ROWS + r) * of;
            vector(x + c * ROWS + r) = g;
        }
        for (int i = 0; i < LANES; i++) x[rows.label[r + i] * ROWS + r + i] = rows.slope[r + i];
        const int64_t *at = rows.grad_at + r;
        if (rows.together[r / LANES]) {
            for (int64_t c = 0; c < C; c++)
                for (int i = 0; i < LANES; i++)
                    call.grad[at[0] + c * call.grad_class + i] = x[c * ROWS + r + i];
        } else {
            for (int i = 0; i < LANES && r + i < rows.n; i++)
                for (int64_t c = 0; c < C; c++)
                    call.grad[at[i] + c * call.grad_class] = x[c * ROWS + r + i];
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

template <class T> INLINE void take(const Call &call, Rows &rows, bool by_rows, float *x, float *e) {
    describe(call, rows);
    int64_t padded = (call.C + LANES - 1) / LANES * LANES;
    if (by_rows)
        rows_in_vectors<T>(call, rows, x, e);
    else
        classes_in_vectors<T>(call, rows, x, e, padded);
    terms(call, rows);
    if (!call.grad) return;
    if (by_rows)
        gradient_in_vectors(call, rows, x, e);
    else
        gradient_of_rows(call, rows, x, e, padded);
}

FOR_EACH_CPU double chunk(const Call &call, bool bfloat16, bool by_rows, int64_t tile,
                          int64_t begin, int64_t end, float *x, float *e) {
    Rows rows;
    double total = 0;
    for (int64_t first = begin; first < end; first += tile) {
        rows.first = first;
        rows.n = end - first < tile ? end - first : tile;
        if (bfloat16)
            take<BFloat16>(call, rows, by_rows, x, e);
        else
            take<float>(call, rows, by_rows, x, e);
        for (int64_t r = 0; r < rows.n; r++) {
            total += rows.loss[r];
            if (call.losses) call.losses[first + r] = rows.loss[r];
        }
    }
    return total;
}

}  // namespace

// The loss, summed, and its gradient. Means divide LDAM by the total class weight and focal by the
// number of examples, those of the batch where `total_weight` is NaN; `by_weight` 0 divides both by
// the examples, `by_examples` 0 neither. Returns 0, or 1 for a label that is out of range, before
// anything is written.
extern "C" int lmf_multi_one_class(
    const void *z, int bfloat16, const int64_t *y, const float *margins,
    const float *weights, float *grad, float *losses, double *loss, int64_t N, int64_t C,
    int64_t inner, int64_t z_outer, int64_t z_inner, int64_t z_class, int64_t grad_outer,
    int64_t grad_inner, int64_t grad_class, int64_t ignore_index, double alpha,
    double beta, double gamma, double scale, int by_weight, int by_examples, double total_weight,
    double total_examples, int threads) {
    Call call = {z, y, margins, weights, grad, losses, N, C, inner,
                 z_outer, z_inner, z_class, grad_outer, grad_inner, grad_class,
                 ignore_index, alpha, beta, (float)gamma, (float)scale};
    if (inner == 1) {  // rows of one axis
        call.inner = N;
        call.z_inner = z_outer;
        call.grad_inner = grad_outer;
    }
    int64_t size_of_chunk = CHUNK / C < 1 ? 1 : CHUNK / C;
    int64_t chunks = (N + size_of_chunk - 1) / size_of_chunk;
    int64_t padded = (C + LANES - 1) / LANES * LANES;
    if (N * C <= ALONE) threads = 1;
    double *sums = (double *)calloc(2 * chunks, sizeof(double));
    int unknown = 0;
#pragma omp parallel for num_threads(threads) reduction(| : unknown)
    for (int64_t i = 0; i < chunks; i++) {
        double weight = 0, examples = 0;
        for (int64_t r = i * size_of_chunk; r < N && r < (i + 1) * size_of_chunk; r++) {
            bool valid = y[r] != ignore_index, known = y[r] >= 0 && y[r] < C;
            unknown |= valid && !known;
            weight += !(valid && known) ? 0 : weights ? weights[y[r]] : 1;
            examples += valid;
        }
        sums[i] = weight;
        sums[chunks + i] = examples;
    }
    double weight = 0, examples = 0;
    for (int64_t i = 0; i < chunks; i++) weight += sums[i], examples += sums[chunks + i];
    if (total_weight == total_weight) weight = total_weight, examples = total_examples;
    if (examples < 1) examples = 1;
    if (!by_weight) weight = examples;
    call.a = alpha / (by_examples && weight != 0 ? weight : 1);
    call.b = beta / (by_examples ? examples : 1);

    bool by_rows = C <= FEW || z_class != 1 || (grad && grad_class != 1);
    int64_t tile = by_rows ? ROWS : TILE / padded, size = by_rows ? ROWS * C : 0;
    tile = tile < 1 ? 1 : tile > ROWS ? ROWS : tile;
    size = (by_rows ? size : tile * padded) * sizeof(float);
    if (!unknown) {
#pragma omp parallel num_threads(threads)
        {
            float *x = (float *)aligned_alloc(4 * LANES, 2 * size);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < chunks; i++) {
                int64_t begin = i * size_of_chunk, end = begin + size_of_chunk;
                float *e = x + size / sizeof(float);
                end = end < N ? end : N;
                sums[i] = chunk(call, bfloat16, by_rows, tile, begin, end, x, e);
            }
            free(x);
        }
        *loss = 0;
        for (int64_t i = 0; i < chunks; i++) *loss += sums[i];
    }
    free(sums);
    return unknown;
}
