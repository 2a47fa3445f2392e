// Tiles of rows: their loss and its gradient. loss.cpp declares what is used here, and includes
// this file once for each generation of CPUs.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Singles __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));  // which may overflow
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr int64_t COUNTED = 16;  // classes, at most, that vectors look for one after another

// A tile's rows, and what is known of each. Arrays that vectors are read from come first: a compiler
// moves those as if each began at a vector's boundary.
struct alignas(4 * LANES) Rows {
    int32_t label[ROWS], masked[ROWS];        // -1 for a masked row
    float weight[ROWS], margin[ROWS];         // w_y, 0 for a masked row, and Δ_y
    float adjustment[ROWS], lost[ROWS];       // what z_y is to get, and has lost getting it
    float z_y[ROWS], M[ROWS];                 // the label's logit, the largest of the others'
    float S_s[ROWS], S[ROWS];                 // Σ_{k≠y} of the exponentials
    float omega[ROWS];                        // log-odds of one term
    float slope[ROWS], of_s[ROWS], of[ROWS];  // gradient of z_y, and that of z_k over exponentials
    float loss[ROWS];
    int64_t z_at[ROWS], grad_at[ROWS];
    bool together[ROWS / LANES];  // whether a vector's are neighbours in memory
    int64_t first, n;
};
static_assert(sizeof(float[ROWS]) % sizeof(Floats) == 0, "each array begins where vectors may");
static_assert(offsetof(Rows, z_at) == 15 * sizeof(float[ROWS]), "arrays of vectors come first");

// --- arithmetic

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats absolute(Floats x) { return x < 0 ? -x : x; }
// y where one of them is NaN
INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }
INLINE Floats &vector(float *x) { return *reinterpret_cast<Floats *>(x); }
INLINE const Floats &vector(const float *x) { return *reinterpret_cast<const Floats *>(x); }
INLINE Ints &vector(int32_t *x) { return *reinterpret_cast<Ints *>(x); }
INLINE bool any(Ints x) {
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

// e^x of x ≤ 0 by Taylor's series of e^(x - n log 2); exactly 0 below `least`.
INLINE Floats exp_(Floats x, float least) {
    constexpr float TO_INTEGER = 12582912.f;  // 1.5 · 2^23, next to which floats are integers
    Floats n = (x * 1.44269504f + TO_INTEGER) - TO_INTEGER;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
    Floats q = r * r;
    Floats odd = 1 / 6.f + q * (1 / 120.f + q * (1 / 5040.f));
    Floats even = 1 / 2.f + q * (1 / 24.f + q * (1 / 720.f));
    Floats p = (1 + r) + q * (even + r * odd);
    Bits power = (Bits)__builtin_convertvector(n, Ints);
    p = (Floats)((Bits)p + (power << 23));
    return x < least ? Floats{} : p;
}

// log((1 + t) / (1 - t)) of 2t, |t| ≤ 1/3; t may be subnormal, that is 0, and its logarithm with it
INLINE Floats two_atanh(Floats two_t) {
    Floats q = two_t * two_t / 4, q_2 = q * q;
    Floats odd = 1 / 5.f + q_2 * (1 / 9.f + q_2 * (1 / 13.f));
    Floats even = 1 / 3.f + q_2 * (1 / 7.f + q_2 * (1 / 11.f));
    return two_t + (two_t * q) * (even + q * odd);
}

// log x of x ≥ 1
INLINE Floats log_(Floats x) {
    constexpr int32_t TWO_THIRDS = 0x3f2aaaab, MANTISSA = 0x7fffff;
    Ints i = (Ints)x - TWO_THIRDS;
    Floats n = __builtin_convertvector(i >> 23, Floats);
    Floats m = (Floats)((i & MANTISSA) + TWO_THIRDS);  // in [2/3, 4/3)
    return n * 0.693147181f + two_atanh(2 * (m - 1) / (m + 1)) + (x - x);  // the last for NaN
}

// log(1 + u) of u in [0, 1], and 1 / (1 + u), by one division, which takes as long as ten products
INLINE Floats log1p_(Floats u, Floats &inverse) {
    Floats both = 1 / ((1 + u) * (2 + u));
    inverse = (2 + u) * both;
    return two_atanh(2 * u * ((1 + u) * both));
}

// a - b, rounded, and what the rounding lost (Knuth's TwoSum)
INLINE Floats difference(Floats a, Floats b, Floats &lost) {
    Floats c = a - b;
    lost = (a - (c + (a - c))) + ((a - c) - b);
    lost = absolute(lost) < INFINITY ? lost : Floats{};
    return c;
}

// s (z - M - Δ) - log S, with what was lost, of z already too, times s, put back
INLINE Floats log_odds(Floats z, Floats M, Floats S, float s, Floats margin, Floats lost) {
    Floats of_M, of_margin;
    Floats d = difference(z, M, of_M), h = difference(d, margin, of_margin);
    return s * h + (s * (of_M + of_margin + lost) - log_(S));
}

// Their product with 0 · ∞ = 0: what counts for nothing may be impossible
INLINE Floats times(Floats coefficient, Floats term) {
    return ((coefficient == 0) & (term == INFINITY)) ? Floats{} : coefficient * term;
}

// --- the terms, in short loops: a processor takes several turns of one at the same time, but few of
// --- a long one

constexpr int64_t MOST = 256;  // numbers, whose terms stay in the cache
static_assert(ROWS <= MOST, "a tile fits");

// e^{-|x|/2}, log(1 + e^{-|x|}) and 1 / (1 + e^{-|x|}), of which sigmoid and softplus are made
struct alignas(4 * LANES) Tails {
    float root[MOST], log[MOST], inverse[MOST];

    Tails(const float *x, int64_t n) {
        for (int64_t i = 0; i < n; i += LANES)
            vector(root + i) = exp_(absolute(vector(x + i)) / -2, ZERO);
        for (int64_t i = 0; i < n; i += LANES) {
            Floats e = vector(root + i) * vector(root + i), of_e;
            vector(log + i) = log1p_(e, of_e);
            vector(inverse + i) = of_e;
        }
    }
};

// Adds softplus(-τ) w a to the losses, with τ = ω(s z) - s Δ; and its slopes.
INLINE void add_ldam(const float *tau, const float *w, int64_t n, float a, float s, float *loss,
                     float *slope) {
    const Tails of(tau, n);
    for (int64_t i = 0; i < n; i += LANES) {
        Floats x = vector(tau + i), share = a * vector(w + i);
        vector(loss + i) += times(share, larger(-x, Floats{}) + vector(of.log + i));
        // e^{-τ} may be subnormal, that is 0, where s times it is not
        Floats r = x > 0 ? vector(of.root + i) : all(1);
        vector(slope + i) = share * (-(s * r) * r * vector(of.inverse + i));
    }
}

// Adds sigmoid(-ω)^γ softplus(-ω) w b to the losses; the power in log space has no bad point.
INLINE void add_focal(const float *omega, const float *w, int64_t n, float b, float gamma,
                      float *loss, float *slope) {
    const Tails of(omega, n);
    for (int64_t i = 0; i < n; i += LANES)
        vector(slope + i) =
            exp_(-gamma * (larger(vector(omega + i), Floats{}) + vector(of.log + i)), ZERO);
    for (int64_t i = 0; i < n; i += LANES) {
        Floats x = vector(omega + i), root = vector(of.root + i), share = b * vector(w + i);
        Floats ce = larger(-x, Floats{}) + vector(of.log + i), modulation = vector(slope + i);
        vector(loss + i) += times(share, modulation * ce);
        Floats u = root * root, p = x > 0 ? all(1) : u, rest = x > 0 ? u : all(1);
        Floats change = gamma * p * (ce > LARGE ? all(LARGE) : ce) + rest;
        vector(slope + i) = share * (-modulation * change * vector(of.inverse + i));
    }
}

// --- a tile: what each row is

// The two halves of a vector's labels
struct Labels {
    Ints low, high;
};

INLINE Labels labels(const Call &call, int64_t first, int64_t n) {
    if (call.y_32) {
        Ints low{};
        for (int i = 0; i < LANES; i++) low[i] = call.y_32[first + (i < n ? i : n - 1)];
        return {low, low >> 31};
    }
    const int64_t *y = call.y + first;
    int64_t some[LANES];
    if (n < LANES) {  // filled up with the last
        for (int i = 0; i < LANES; i++) some[i] = y[i < n ? i : n - 1];
        y = some;
    }
    Ints a, b;
    memcpy(&a, y, sizeof a);
    memcpy(&b, y + LANES / 2, sizeof b);
#undef EVEN
#undef ODD
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#ifdef __clang__
    return {__builtin_shufflevector(a, b, EVEN), __builtin_shufflevector(a, b, ODD)};
#else
    return {__builtin_shuffle(a, b, Ints{EVEN}), __builtin_shuffle(a, b, Ints{ODD})};
#endif
}

INLINE Ints ignored(const Call &call, Labels y) {
    return (y.low == (int32_t)call.ignore_index) & (y.high == (int32_t)(call.ignore_index >> 32));
}

// table[y], and `otherwise` without a table
INLINE Floats at(const float *table, float otherwise, int64_t C, Ints y) {
    Floats x = all(otherwise);
    if (table && C <= COUNTED)
        for (int c = 0; c < C; c++) x = y == c ? all(table[c]) : x;
    else if (table)
        for (int i = 0; i < LANES; i++) x[i] = table[y[i]];
    return x;
}

INLINE void describe(const Call &call, Rows &rows) {
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Labels y = labels(call, rows.first + r, rows.n - r);
        Ints masked = ignored(call, y), unknown = (y.high != 0) | (y.low >= (int32_t)call.C);
        Ints label = masked | unknown ? Ints{} : y.low;
        Floats weight = unknown ? all(NAN) : at(call.weights_32, 1, call.C, label);
        weight = masked ? Floats{} : weight;
        vector(rows.masked + r) = masked;
        vector(rows.label + r) = label;
        vector(rows.weight + r) = weight;
        vector(rows.margin + r) = at(call.margins_32, 0, call.C, label);
        if (call.adjustments_32)
            vector(rows.adjustment + r) = at(call.adjustments_32, 0, call.C, label);
    }
    int64_t i = rows.first / call.inner, j = rows.first % call.inner;
    bool neighbours = call.z_inner == 1 && call.grad_inner == 1;
    for (int64_t r = 0; r < rows.n;) {
        rows.z_at[r] = i * call.z_outer + j * call.z_inner;
        rows.grad_at[r] = i * call.grad_outer + j * call.grad_inner;
        bool starts = r % LANES == 0 && r + LANES <= rows.n;
        if (starts) rows.together[r / LANES] = neighbours && j + LANES <= call.inner;
        int64_t step = starts && rows.together[r / LANES] ? LANES : 1;
        r += step, j += step;
        if (j == call.inner) i++, j = 0;
    }
    for (int64_t r = rows.n; r % LANES != 0; r++) {
        rows.together[r / LANES] = false;
        rows.z_at[r] = rows.z_at[rows.n - 1];
    }
}

INLINE void terms(const Call &call, Rows &rows) {
    int64_t n = (rows.n + LANES - 1) / LANES * LANES;
    for (int64_t r = 0; r < n; r++) rows.loss[r] = rows.slope[r] = 0;
    for (int64_t r = 0; r < n; r += LANES) {
        Floats &z_y = vector(rows.z_y + r), lost{};
        if (call.adjustments_32) z_y = difference(z_y, -vector(rows.adjustment + r), lost);
        vector(rows.lost + r) = lost;
    }
    if (call.has_ldam) {
        for (int64_t r = 0; r < n; r += LANES) {
            Floats S_s = larger(all(1), vector(rows.S_s + r));
            vector(rows.omega + r) = log_odds(vector(rows.z_y + r), vector(rows.M + r), S_s,
                                              call.scale, vector(rows.margin + r),
                                              vector(rows.lost + r));
            vector(rows.S_s + r) = S_s;
        }
        add_ldam(rows.omega, rows.weight, n, call.a, call.scale, rows.loss, rows.of_s);
        for (int64_t r = 0; r < n; r += LANES) {
            vector(rows.slope + r) = vector(rows.of_s + r);
            vector(rows.of_s + r) /= -vector(rows.S_s + r);
        }
    }
    if (call.has_focal) {
        for (int64_t r = 0; r < n; r += LANES) {
            Floats S = larger(all(1), vector(rows.S + r));
            vector(rows.omega + r) = log_odds(vector(rows.z_y + r), vector(rows.M + r), S, 1,
                                              Floats{}, vector(rows.lost + r));
            vector(rows.S + r) = S;
        }
        add_focal(rows.omega, rows.weight, n, call.b, call.gamma, rows.loss, rows.of);
        for (int64_t r = 0; r < n; r += LANES) {
            vector(rows.slope + r) += vector(rows.of + r);
            vector(rows.of + r) /= -vector(rows.S + r);
        }
    }
    for (int64_t r = rows.n; r < n; r++) rows.loss[r] = 0;  // of no row
}

// --- a tile: exponentials and gradient, where a vector takes rows: x and e are (C, pitch)

template <class To, class From>
INLINE To same_bits(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

// Of numbers and their bits, or of vectors of them: float32's exponent has three bits more
template <class Number, class Bits>
INLINE Number of_float16(Bits x) {
    Bits rest = (x & 0x7fff) << 13, bits = rest + (112 << 23);
    Number subnormal = same_bits<Number>(rest + (113 << 23)) - 0x1p-14f;
    bits = rest < (1 << 23) ? same_bits<Bits>(subnormal) : bits;
    bits = rest >= (31 << 23) ? rest + (224 << 23) : bits;  // infinity and NaN
    return same_bits<Number>(bits | (x & 0x8000) << 16);
}

INLINE float widened(float x) { return x; }
INLINE float widened(BFloat16 x) { return same_bits<float>((uint32_t)x.bits << 16); }
INLINE float widened(Float16 x) { return of_float16<float>((int32_t)x.bits); }

INLINE Floats widened_from(const float *z) {
    Floats x;
    memcpy(&x, z, sizeof x);
    return x;
}
INLINE Ints widened_bits(const void *z) {
    Halves x;
    memcpy(&x, z, sizeof x);
    return __builtin_convertvector(x, Ints);
}
INLINE Floats widened_from(const BFloat16 *z) { return (Floats)(widened_bits(z) << 16); }
INLINE Floats widened_from(const Float16 *z) { return of_float16<Floats>(widened_bits(z)); }

// A little less than the largest of adjusted logits, which was rounded: without rounding it is above,
// so that its exponential is 1 or more
INLINE Floats below(Floats M) { return M - absolute(M) * 0x1p-23f; }

// x + adjustment - M, to the last digits of the whole: M is about as large as the sum
INLINE Floats above(Floats x, Floats adjustment, Floats M) {
    Floats lost, sum = difference(x, -adjustment, lost);
    return (sum - M) + lost;
}

// Σ e^{s (x - M)} over the classes of a vector's rows, each of which goes to e; with what is added
// to x, (C,) or null
INLINE Floats exp_and_sum(const Call &call, int64_t pitch, const float *x, float *e, Floats M,
                          float s) {
    Floats S{};
    int64_t C = call.C;
    for (int64_t begin = 0; begin < C; begin += FEW) {  // a sum of sums rounds less
        Floats some{};
        for (int64_t c = begin; c < C && c < begin + FEW; c++) {
            Floats x_c = *(const Floats *)(x + c * pitch);
            Floats d = call.adjustments_32 ? above(x_c, all(call.adjustments_32[c]), M) : x_c - M;
            some += vector(e + c * pitch) = exp_(s * d, NEGLIGIBLE);
        }
        S += some;
    }
    return S;
}

// A vector's rows of C classes, at most WIDE, one after another in memory, as vectors of a class each;
// GCC knows how, where it knows the number. Those of the classes beyond C hold anything.
template <int WIDE, class T>
INLINE void to_classes(const T *z, int64_t C, float *x, int64_t pitch) {
    T wider[LANES * WIDE];
    if (C < WIDE) {
        for (int i = 0; i < LANES; i++)
            memcpy(wider + i * WIDE, z + i * C, (i + 1 < LANES ? WIDE : C) * sizeof(T));
        z = wider;
    }
    for (int i = 0; i < LANES; i++)
        for (int c = 0; c < WIDE; c++) x[c * pitch + i] = widened(z[i * WIDE + c]);
}

// And back; what a row writes too much, the next one overwrites
template <int WIDE>
INLINE void to_rows(const float *x, int64_t pitch, int64_t C, float *grad) {
    float wider[LANES * WIDE], *rows = C < WIDE ? wider : grad;
    for (int i = 0; i < LANES; i++)
        for (int c = 0; c < WIDE; c++) rows[i * WIDE + c] = x[c * pitch + i];
    for (int i = 0; i < LANES && C < WIDE; i++)
        memcpy(grad + i * C, wider + i * WIDE, (i + 1 < LANES ? WIDE : C) * sizeof(float));
}

// Whether the rows that begin at these places are a vector full, and so
INLINE bool packed(const int64_t *at, int64_t n, int64_t C, int64_t of_class) {
    return n >= LANES && C <= 8 && of_class == 1 && at[LANES - 1] == at[0] + (LANES - 1) * C;
}

template <class T>
INLINE void rows_in_vectors(const Call &call, Rows &rows, float *x, float *e, int64_t pitch) {
    const T *z = (const T *)call.z;
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        const int64_t *at = rows.z_at + r;
        bool together = rows.together[r / LANES];
        const T *rows_from = z + at[0];
        if (!together && packed(at, rows.n - r, C, call.z_class)) {
            if (C == 2)
                to_classes<2>(rows_from, C, x + r, pitch);
            else if (C == 3)
                to_classes<3>(rows_from, C, x + r, pitch);
            else if (C == 4)
                to_classes<4>(rows_from, C, x + r, pitch);
            else
                to_classes<8>(rows_from, C, x + r, pitch);
        } else if (!together)
            for (int i = 0; i < LANES; i++)
                for (int64_t c = 0; c < C; c++)
                    x[c * pitch + r + i] = widened(z[at[i] + c * call.z_class]);
        Ints label = vector(rows.label + r), masked = vector(rows.masked + r);
        Floats z_y{}, M = all(-LARGE);
        for (int64_t c = 0; c < C; c++) {
            Floats &x_c = vector(x + c * pitch + r);
            if (together) {
                const T *from = z + at[0] + c * call.z_class;
                x_c = widened_from(from);
                __builtin_prefetch(from + rows.n);  // the next tile's
            }
            Floats z_c = masked ? Floats{} : x_c;
            z_y = label == (int32_t)c ? z_c : z_y;
            x_c = label == (int32_t)c ? all(-LARGE) : z_c;
            M = larger(call.adjustments_32 ? x_c + call.adjustments_32[c] : x_c, M);
        }
        vector(rows.z_y + r) = z_y;
        vector(rows.M + r) = call.adjustments_32 ? below(M) : M;
    }
    for (int64_t r = 0; r < rows.n; r += LANES) {
        Floats M = vector(rows.M + r);
        if (call.has_ldam)
            vector(rows.S_s + r) = exp_and_sum(call, pitch, x + r, e + r, M, call.scale);
        if (call.has_focal) vector(rows.S + r) = exp_and_sum(call, pitch, x + r, x + r, M, 1);
    }
}

INLINE void gradient_in_vectors(const Call &call, Rows &rows, float *x, float *e, int64_t pitch) {
    int64_t C = call.C;
    for (int64_t r = 0; r < rows.n; r += LANES) {
        const int64_t *at = rows.grad_at + r;
        bool together = rows.together[r / LANES];
        Ints label = vector(rows.label + r);
        Floats of_s = vector(rows.of_s + r), of = vector(rows.of + r);
        Floats slope = vector(rows.slope + r);
        for (int64_t c = 0; c < C; c++) {
            Floats g{};
            if (call.has_ldam) g += vector(e + c * pitch + r) * of_s;
            if (call.has_focal) g += vector(x + c * pitch + r) * of;
            g = label == (int32_t)c ? slope : g;
            float *to = together ? call.grad + at[0] + c * call.grad_class : x + c * pitch + r;
            if (together) __builtin_prefetch(to + rows.n, 1);
            memcpy(to, &g, sizeof g);
        }
        float *rows_to = call.grad + at[0];
        if (!together && packed(at, rows.n - r, C, call.grad_class)) {
            if (C == 2)
                to_rows<2>(x + r, pitch, C, rows_to);
            else if (C == 3)
                to_rows<3>(x + r, pitch, C, rows_to);
            else if (C == 4)
                to_rows<4>(x + r, pitch, C, rows_to);
            else
                to_rows<8>(x + r, pitch, C, rows_to);
        } else if (!together)
            for (int i = 0; i < LANES && r + i < rows.n; i++)
                for (int64_t c = 0; c < C; c++)
                    call.grad[at[i] + c * call.grad_class] = x[c * pitch + r + i];
    }
}

// --- the same where a vector takes classes: x and e are (rows, C), C rounded up

INLINE float sum(Floats x) {
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}

// The row that comes next is fetched meanwhile, as processors look ahead within a page of memory
template <class T>
INLINE float exp_and_sum_of_row(const Call &call, int64_t padded, const float *x, float *e, float M,
                                float s, const T *next) {
    Floats S{};
    for (int64_t begin = 0; begin < padded; begin += FEW * LANES) {
        Floats some{};
        for (int64_t c = begin; c < padded && c < begin + FEW * LANES; c += LANES) {
            __builtin_prefetch(next + c);
            Floats x_c = *(const Floats *)(x + c);
            Floats d = x_c - M;
            if (call.adjustments_32) d = above(x_c, widened_from(call.adjustments_32 + c), all(M));
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
        for (int64_t c = 0; c < padded; c += LANES) {
            Floats x_c = vector(x + c);
            if (call.adjustments_32) x_c += widened_from(call.adjustments_32 + c);
            most = larger(x_c, most);
        }
        float M = -LARGE;
        for (int i = 0; i < LANES; i++) M = most[i] > M ? most[i] : M;
        if (call.adjustments_32) M = below(all(M))[0];
        rows.M[r] = M;
        const T *next = z + call.z_inner;
        if (call.has_ldam) rows.S_s[r] = exp_and_sum_of_row(call, padded, x, e, M, call.scale, next);
        if (call.has_focal) rows.S[r] = exp_and_sum_of_row(call, padded, x, x, M, 1, next);
    }
}

INLINE void gradient_of_rows(const Call &call, Rows &rows, float *x, float *e, int64_t padded) {
    for (int64_t r = 0; r < rows.n; r++, x += padded, e += padded) {
        float *grad = call.grad + rows.grad_at[r];
        float of_s = call.has_ldam ? rows.of_s[r] : 0, of = call.has_focal ? rows.of[r] : 0;
        for (int64_t c = 0; c < padded; c += LANES) {
            if (padded <= AHEAD) __builtin_prefetch(grad + padded + c, 1);
            Floats g{};
            if (call.has_ldam) g += vector(e + c) * of_s;
            if (call.has_focal) g += vector(x + c) * of;
            vector(x + c) = g;
        }
        x[rows.label[r]] = rows.slope[r];
        for (int64_t c = 0; c < call.C; c++) grad[c] = x[c];
    }
}

// --- all of them

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

// The sum of many numbers, in float64
struct Sum {
    Doubles some{};

    void add(Floats x) {
        Singles halves[2];
        memcpy(halves, &x, sizeof x);
        for (Singles half : halves) some += __builtin_convertvector(half, Doubles);
    }

    double total() const {
        double all = 0;
        for (int i = 0; i < LANES / 2; i++) all += some[i];
        return all;
    }
};

double chunk(const Call &call, const Plan &plan, int64_t begin, int64_t end, float *x) {
    Rows rows;
    Sum losses;
    for (rows.first = begin; rows.first < end; rows.first += plan.tile) {
        rows.n = end - rows.first < plan.tile ? end - rows.first : plan.tile;
        if (call.dtype == BFLOAT16)
            take<BFloat16>(call, plan, rows, x, x + plan.size);
        else if (call.dtype == FLOAT16)
            take<Float16>(call, plan, rows, x, x + plan.size);
        else
            take<float>(call, plan, rows, x, x + plan.size);
        Floats of_tile{};
        for (int64_t r = 0; r < rows.n; r += LANES) of_tile += vector(rows.loss + r);
        losses.add(of_tile);
        if (call.losses) memcpy(call.losses + rows.first, rows.loss, rows.n * sizeof(float));
    }
    return losses.total();
}

INLINE int64_t sum(Ints x) {
    int64_t total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

Totals totals_of(const Call &call, int64_t begin, int64_t end) {
    Totals found = {0, 0, true};
    int64_t r = begin, C = call.C;
    if (C <= COUNTED) {  // vectors count each class
        Ints counts[COUNTED] = {}, others{};
        for (; r + LANES <= end; r += LANES) {
            Labels y = labels(call, r, LANES);
            Ints masked = ignored(call, y), known;
            known = (y.high == 0) & (y.low >= 0) & (y.low < (int32_t)C);
            Ints label = known & ~masked ? y.low : Ints{} - 1;
            others -= masked;
            for (int c = 0; c < C; c++) counts[c] -= label == c;
        }
        for (int c = 0; c < C; c++) {
            int64_t n = sum(counts[c]);
            found.examples += n;
            found.weight += n * (call.weights_32 ? (double)call.weights_32[c] : 1);
        }
        found.known = found.examples + sum(others) == r - begin;
    }
    for (; r < end; r++) {
        int64_t y = call.y[r];
        bool valid = y != call.ignore_index, known = y >= 0 && y < C;
        found.known &= known || !valid;
        found.weight += !(valid && known) ? 0 : call.weights_32 ? call.weights_32[y] : 1;
        found.examples += valid;
    }
    return found;
}
