// Elements of the sigmoid form: their loss and its gradient, after tiles.h in each generation of CPUs.

// Where element i lies: its label, and how many of that label's neighbours are before it
struct Place {
    int64_t label, begun;
    const int64_t labels, inner, step, rest;

    Place(const Call &call, int64_t i)
        : label(i / call.inner % call.C), begun(i % call.inner), labels(call.C), inner(call.inner),
          step(LANES / call.inner % call.C), rest(LANES % call.inner) {}

    void next() {
        label += step, begun += rest;
        if (begun >= inner) begun -= inner, label++;
        if (label >= labels) label -= labels;
    }
};

constexpr int64_t ELEMENTS = 256;  // whose terms stay in the cache

// What is constant for each label, as negative and as positive, (2, labels), or as both, (1, labels)
struct Table {
    static constexpr int64_t SHORT = 64;  // labels, whose vectors are read from copies
    const float *given;
    int64_t labels;
    float otherwise;
    float copies[2][SHORT + LANES];

    Table(const float *given, int64_t labels, float otherwise, int signs = 2)
        : given(given), labels(labels), otherwise(otherwise) {
        if (!given || labels > SHORT) return;
        for (int sign = 0; sign < signs; sign++)
            for (int64_t k = 0; k < labels + LANES; k++)
                copies[sign][k] = given[sign * labels + k % labels];
    }

    // A vector's, negative or positive, from a place on
    Floats at(int sign, const Place &place) const {
        if (!given) return all(otherwise);
        const float *row = given + sign * labels;
        int64_t label = place.label, begun = place.begun, inner = place.inner;
        if (labels == 1 || begun + LANES <= inner) return all(row[label]);
        if (inner == 1 && labels <= SHORT) return widened_from(copies[sign] + label);
        Floats x{};
        for (int i = 0; i < LANES; i++) {
            x[i] = row[label];
            if (++begun == inner) begun = 0, label = label + 1 == labels ? 0 : label + 1;
        }
        return x;
    }
};

// Some elements, and what is known of each; up to the next vector's boundary they take no part
struct alignas(4 * LANES) Elements {
    float t[ELEMENTS], presence[ELEMENTS];  // 0 where masked, and presence NaN where unknown
    int64_t first, n;
    bool soft;  // whether a label lies between 0 and 1
};

// One of the labels of each: negative, or positive, or the one that counts
struct alignas(4 * LANES) Side {
    float omega[ELEMENTS], margin[ELEMENTS], share[ELEMENTS];  // share: q w
    float lost[ELEMENTS];                                      // of omega, by rounding
    float loss[ELEMENTS], slope[ELEMENTS];                     // slope: for omega
};

// In loops over numbers, of which compilers make better vectors of bytes than vectors do
INLINE void describe(const Call &call, Elements &some) {
    const float *t = call.t + some.first;
    int64_t n = some.n, padded = (n + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < n; i++) some.presence[i] = t[i] != call.ignored;
    if (call.where)
        for (int64_t i = 0; i < n; i++) some.presence[i] *= call.where[some.first + i] != 0;
    for (int64_t i = n; i < padded; i++) some.presence[i] = some.t[i] = 0;
    int32_t soft = call.smoothing != 0;
    for (int64_t i = 0; i < n; i++) {
        float given = some.presence[i] == 0 ? 0 : t[i];
        bool known = given >= -SLACK && given <= 1 + SLACK;
        some.presence[i] = known ? some.presence[i] : NAN;
        some.t[i] = known ? given : 0;
        soft |= some.t[i] != 0 && some.t[i] != 1;
    }
    some.soft = soft;
}

// In short loops, as terms()
INLINE void label_terms(const Call &call, Side &side, int64_t n) {
    for (int64_t i = 0; i < n; i++) side.loss[i] = side.slope[i] = 0;
    if (call.has_ldam)
        for (int64_t i = 0; i < n; i += LANES) {
            Floats lost, slope, a = (float)call.a * vector(side.share + i);
            Floats h = difference(vector(side.omega + i), vector(side.margin + i), lost);
            if (call.adjustments) lost += vector(side.lost + i);
            Floats tau = call.scale * h + call.scale * lost;
            vector(side.loss + i) = times(a, ldam(tau, call.scale, slope));
            vector(side.slope + i) = a * slope;
        }
    if (call.has_focal)
        for (int64_t i = 0; i < n; i += LANES) {
            Floats slope, b = (float)call.b * vector(side.share + i);
            vector(side.loss + i) += times(b, focal(vector(side.omega + i), call.gamma, slope));
            vector(side.slope + i) += b * slope;
        }
}

template <class T>
INLINE double elements_of(const Call &call, int64_t begin, int64_t end) {
    const Table margins(call.margins, call.C, 0), weights(call.weights, call.C, 1);
    const Table adjustments(call.adjustments, call.C, 0, 1);
    Place place(call, begin);
    Elements some;
    Side negative, positive;  // the first for both where no label lies between
    float smoothing = call.smoothing;
    double total = 0;
    for (some.first = begin; some.first < end; some.first += ELEMENTS) {
        some.n = end - some.first < ELEMENTS ? end - some.first : ELEMENTS;
        describe(call, some);
        int64_t n = some.n, padded = (n + LANES - 1) / LANES * LANES;
        const T *z = (const T *)call.z + some.first;
        for (int64_t i = 0; i < n; i++)
            negative.omega[i] = some.presence[i] == 0 ? 0 : widened(z[i]);
        for (int64_t i = n; i < padded; i++) negative.omega[i] = 0;
        for (int64_t i = 0; i < n; i += LANES, place.next()) {
            Floats x = vector(negative.omega + i), t = vector(some.t + i);
            Floats presence = vector(some.presence + i);
            Floats w = weights.at(0, place), w_positive = weights.at(1, place);
            Floats margin = margins.at(0, place), margin_positive = margins.at(1, place), lost{};
            if (call.adjustments) x = difference(x, -adjustments.at(0, place), lost);
            if (some.soft) {
                w *= (1 - smoothing) * (1 - t) + smoothing / 2;
                w_positive *= (1 - smoothing) * t + smoothing / 2;
                vector(positive.omega + i) = x;
                vector(positive.lost + i) = lost;
                vector(positive.margin + i) = margin_positive;
                vector(positive.share + i) = w_positive * presence;
                x = -x, lost = -lost;
            } else {
                x = t == 1 ? x : -x;
                lost = t == 1 ? lost : -lost;
                margin = t == 1 ? margin_positive : margin;
                w = t == 1 ? w_positive : w;
            }
            vector(negative.omega + i) = x;
            vector(negative.lost + i) = lost;
            vector(negative.margin + i) = margin;
            vector(negative.share + i) = w * presence;
        }
        label_terms(call, negative, padded);
        float *loss = negative.loss, *slope = negative.slope;
        if (some.soft) {
            label_terms(call, positive, padded);
            for (int64_t i = 0; i < padded; i++) loss[i] += positive.loss[i];
            for (int64_t i = 0; i < padded; i++) slope[i] = positive.slope[i] - slope[i];
        } else {
            for (int64_t i = 0; i < padded; i++) slope[i] = some.t[i] == 1 ? slope[i] : -slope[i];
        }
        Floats losses{};
        for (int64_t i = 0; i < padded; i += LANES) losses += vector(loss + i);
        total += sum(losses);
        if (call.losses) memcpy(call.losses + some.first, loss, n * sizeof(float));
        if (call.grad) memcpy(call.grad + some.first, slope, n * sizeof(float));
    }
    return total;
}

double elements(const Call &call, int64_t begin, int64_t end) {
    if (call.dtype == BFLOAT16) return elements_of<BFloat16>(call, begin, end);
    if (call.dtype == FLOAT16) return elements_of<Float16>(call, begin, end);
    return elements_of<float>(call, begin, end);
}

Totals totals_of_elements(const Call &call, int64_t begin, int64_t end) {
    const Table weights(call.weights, call.C, 1);
    Place place(call, begin);
    Elements some;
    Totals found = {0, 0, true};
    for (some.first = begin; some.first < end; some.first += ELEMENTS) {
        some.n = end - some.first < ELEMENTS ? end - some.first : ELEMENTS;
        describe(call, some);
        Floats weight{}, examples{};
        for (int64_t i = 0; i < some.n; i += LANES, place.next()) {
            Floats t = vector(some.t + i), presence = vector(some.presence + i);
            Floats w = (1 - t) * weights.at(0, place) + t * weights.at(1, place);
            weight += w * presence;
            examples += presence;
        }
        found.weight += sum(weight);
        found.examples += sum(examples);
    }
    found.known = found.examples == found.examples;
    return found;
}
