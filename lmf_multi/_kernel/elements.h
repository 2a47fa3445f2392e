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

// What is constant for each label, as negative and as positive, (2, labels), or as both, (1, labels)
struct Table {
    static constexpr int64_t SHORT = 64;  // labels, whose vectors are read from copies
    const float *given;
    int64_t labels;
    float otherwise;
    float copies[2][SHORT + LANES];

    Table(const float *given, int64_t labels, float otherwise, int signs = 2)
        : given(given), labels(labels), otherwise(otherwise) {
        if (!given || labels == 1 || labels > SHORT) return;
        for (int sign = 0; sign < signs; sign++)
            for (int64_t k = 0; k < labels + LANES; k++)
                copies[sign][k] = k < labels ? given[sign * labels + k] : copies[sign][k - labels];
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
    float t[MOST], presence[MOST];  // 0 where masked, and presence NaN where unknown
    int64_t first, n, padded;
    bool soft;  // whether a label lies between 0 and 1

    Elements(const Call &call, int64_t first, int64_t end)
        : first(first), n(end - first < MOST ? end - first : MOST),
          padded((n + LANES - 1) / LANES * LANES) {
        // a loop over numbers, of which compilers make better vectors of bytes than vectors do
        if (call.where)
            for (int64_t i = 0; i < n; i++) presence[i] = call.where[first + i] != 0;
        const float *given = whole(call.t, t);
        Ints between{};
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats part = call.where ? vector(presence + i) : all(1), label = widened_from(given + i);
            part = label == call.ignored ? Floats{} : part;
            label = part == 0 ? Floats{} : label;
            Ints known = (label >= -SLACK) & (label <= 1 + SLACK);
            label = known ? label : Floats{};
            between |= (label != 0) & (label != 1);
            vector(t + i) = label;
            vector(presence + i) = known ? part : all(NAN);
        }
        for (int64_t i = n; i < padded; i++) presence[i] = 0;
        soft = call.smoothing != 0 || any(between);
    }

    // Numbers of the elements, where vectors may be read of them: a copy, followed by 0, of the last
    template <class T>
    const T *whole(const T *of_all, T *copy) const {
        if (n == padded) return of_all + first;
        memcpy(copy, of_all + first, n * sizeof(T));
        memset(copy + n, 0, (padded - n) * sizeof(T));
        return copy;
    }
};

// One of the labels of each: negative, or positive, or the one that counts
struct alignas(4 * LANES) Side {
    float omega[MOST], tau[MOST], share[MOST];  // share: q w
    float loss[MOST], of_ldam[MOST], of_focal[MOST];  // slopes for omega

    // ω and its margin, and what ω has lost by rounding
    void put(const Call &call, int64_t i, Floats x, Floats lost, Floats of_margin, Floats w) {
        Floats of_difference, h = difference(x, of_margin, of_difference);
        vector(omega + i) = x;
        vector(tau + i) = call.scale * h + call.scale * (of_difference + lost);
        vector(share + i) = w;
    }

    void take(const Call &call, int64_t n) {
        for (int64_t i = 0; i < n; i++) loss[i] = of_ldam[i] = of_focal[i] = 0;
        if (call.has_ldam) add_ldam(tau, share, n, call.a, call.scale, loss, of_ldam);
        if (call.has_focal) add_focal(omega, share, n, call.b, call.gamma, loss, of_focal);
    }

    Floats slope(int64_t i) const { return vector(of_ldam + i) + vector(of_focal + i); }
};

template <class T>
INLINE double elements_of(const Call &call, int64_t begin, int64_t end) {
    const Table margins(call.margins_32, call.C, 0), weights(call.weights_32, call.C, 1);
    const Table adjustments(call.adjustments_32, call.C, 0, 1);
    Place place(call, begin);
    Side negative, positive;  // the first for both where no label lies between
    T copy[MOST];
    float smoothing = call.smoothing;
    Sum losses;
    for (; begin < end; begin += MOST) {
        const Elements some(call, begin, end);
        const T *z = some.whole((const T *)call.z, copy);
        for (int64_t i = 0; i < some.padded; i += LANES, place.next()) {
            Floats x = widened_from(z + i), t = vector(some.t + i);
            Floats presence = vector(some.presence + i);
            Floats w = weights.at(0, place), w_positive = weights.at(1, place);
            Floats margin = margins.at(0, place), margin_positive = margins.at(1, place), lost{};
            x = presence == 0 ? Floats{} : x;
            if (call.adjustments_32) x = difference(x, -adjustments.at(0, place), lost);
            if (some.soft) {
                w *= ((1 - smoothing) * (1 - t) + smoothing / 2) * presence;
                w_positive *= ((1 - smoothing) * t + smoothing / 2) * presence;
                positive.put(call, i, x, lost, margin_positive, w_positive);
                negative.put(call, i, -x, -lost, margin, w);
            } else {
                Ints is_1 = t == 1;
                w = (is_1 ? w_positive : w) * presence;
                margin = is_1 ? margin_positive : margin;
                negative.put(call, i, is_1 ? x : -x, is_1 ? lost : -lost, margin, w);
            }
        }
        negative.take(call, some.padded);
        if (some.soft) positive.take(call, some.padded);
        Floats of_block{};
        for (int64_t i = 0; i < some.padded; i += LANES) {
            Floats loss = vector(negative.loss + i), slope = negative.slope(i);
            if (some.soft) {
                loss += vector(positive.loss + i);
                slope = positive.slope(i) - slope;
            } else {
                slope = vector(some.t + i) == 1 ? slope : -slope;
            }
            of_block += loss;
            vector(negative.loss + i) = loss;
            vector(negative.of_ldam + i) = slope;
        }
        losses.add(of_block);
        if (call.losses) memcpy(call.losses + begin, negative.loss, some.n * sizeof(float));
        if (call.grad) memcpy(call.grad + begin, negative.of_ldam, some.n * sizeof(float));
    }
    return losses.total();
}

double elements(const Call &call, int64_t begin, int64_t end) {
    if (call.dtype == BFLOAT16) return elements_of<BFloat16>(call, begin, end);
    if (call.dtype == FLOAT16) return elements_of<Float16>(call, begin, end);
    return elements_of<float>(call, begin, end);
}

Totals totals_of_elements(const Call &call, int64_t begin, int64_t end) {
    const Table weights(call.weights_32, call.C, 1);
    Place place(call, begin);
    Sum all_weights, all_examples;
    for (; begin < end; begin += MOST) {
        const Elements some(call, begin, end);
        Floats weight{}, examples{};
        for (int64_t i = 0; i < some.padded; i += LANES, place.next()) {
            Floats t = vector(some.t + i), presence = vector(some.presence + i);
            Floats w = (1 - t) * weights.at(0, place) + t * weights.at(1, place);
            weight += w * presence;
            examples += presence;
        }
        all_weights.add(weight);
        all_examples.add(examples);
    }
    double N = all_examples.total();
    return {all_weights.total(), N, N == N};
}
