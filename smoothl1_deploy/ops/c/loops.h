/* The loops over elements, compiled once for each instruction set.
 *
 * `ISA(name)` gives each set names of its own; VECTOR_BYTES is the width of its registers. WIDEN
 * (floats to as many doubles), NARROW (its inverse), LESSER (`a < b ? a : b`), BITS (of a mask, one an
 * element) and SPREAD (bytes to as many int32) are what gcc 12 makes long ways of. What is added up goes
 * to 16 lanes, element i of a run to lane i % 16, whatever the width: the bits of a result are those of
 * every set. No product is fused with a sum (-ffp-contract=off).
 */

#define LANES 16
#define FLOATS (VECTOR_BYTES / 4)
#define DOUBLES (VECTOR_BYTES / 8)

typedef float ISA(vf) __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ISA(vi) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t ISA(vu) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t ISA(vh) __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double ISA(vd) __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t ISA(vl) __attribute__((vector_size(VECTOR_BYTES)));
typedef float ISA(vg) __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int32_t ISA(vj) __attribute__((vector_size(VECTOR_BYTES / 2)));

#define LOAD(type, at) ({ ISA(type) loaded_; memcpy(&loaded_, (at), sizeof loaded_); loaded_; })
#define STORE(at, value) ({ __auto_type stored_ = (value); memcpy((at), &stored_, sizeof stored_); })
/* a where the mask is set, b elsewhere. */
#define SELECT(mask, a, b, type, bits) \
    ((ISA(type))(((ISA(bits))(a) & (mask)) | ((ISA(bits))(b) & ~(mask))))

/* The loss of one element as the file's own body has it. */
static inline float ISA(loss_f)(float d, float beta, float divisor) {
    float core = d > beta ? beta : d < -beta ? -beta : d;
    return fabsf(d - core) + (0.5f * core) * (core / divisor);
}

static inline double ISA(loss_d)(double d, double beta, double divisor) {
    double core = d > beta ? beta : d < -beta ? -beta : d;
    return fabs(d - core) + (0.5 * core) * (core / divisor);
}

static inline ISA(vf) ISA(losses_f)(ISA(vf) d, float beta, float divisor) {
    ISA(vf) high = (ISA(vf)){} + beta, low = -high;
    ISA(vf) core = SELECT(d > high, high, d, vf, vi);
    core = SELECT(d < low, low, core, vf, vi);
    ISA(vi) absolute = (ISA(vi)){} + 0x7fffffff;
    return (ISA(vf))((ISA(vi))(d - core) & absolute) + (0.5f * core) * (core / divisor);
}

static inline ISA(vd) ISA(losses_d)(ISA(vd) d, ISA(vd) high, ISA(vd) divisor) {
    ISA(vd) low = -high;
    ISA(vd) core = SELECT(d > high, high, d, vd, vl);
    core = SELECT(d < low, low, core, vd, vl);
    ISA(vl) absolute = (ISA(vl)){} + INT64_MAX;
    return (ISA(vd))((ISA(vl))(d - core) & absolute) + (0.5 * core) * (core / divisor);
}

static void ISA(each_f)(const float *input, const float *target, const float *weight, size_t count,
                        const Beta *beta, float *out) {
    float b = (float)beta->value, divisor = (float)beta->divisor;
    size_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS) {
        ISA(vf) loss = ISA(losses_f)(LOAD(vf, input + i) - LOAD(vf, target + i), b, divisor);
        if (weight)
            loss *= LOAD(vf, weight + i);
        STORE(out + i, loss);
    }
    for (; i < count; i++) {
        float loss = ISA(loss_f)(input[i] - target[i], b, divisor);
        out[i] = weight ? loss * weight[i] : loss;
    }
}

/* Losses of a half format in float32, which can be off by 4 units: where within 8 lies a middle,
 * `settled` ones are put in their place, and where float32 is near the ends of bfloat16's range. Exact
 * ones stay, as a middle of two numbers often is: nothing was rounded off the difference (of two numbers
 * the larger less it is exact: Dekker); and beyond beta, less the loss, which is exact too (Sterbenz), it
 * is half of beta; within, its square is twice beta times the loss, all of few bits and far from the ends. */
static inline __attribute__((always_inline)) void
ISA(settle_as)(const float *input, const float *target, size_t count, const Beta *beta, float *losses,
               bool is_bfloat) {
    uint32_t middle = is_bfloat ? 1u << 15 : 1u << 12, below = 2 * middle - 1;
    uint32_t first = is_bfloat ? 27u << 23 : 113u << 23, last = is_bfloat ? 254u << 23 : 255u << 23;
    float b = (float)beta->value, half = 0.5f * b;
    float twice = bits_of(b) & 0xfff || b < 0x1p-20f || b > 0x1p20f ? NAN : 2 * b;
    for (size_t i = 0; i < count; i += FLOATS) {
        if (count - i < FLOATS) {
            for (; i < count; i++)
                losses[i] = settle_one(input[i], target[i], beta, is_bfloat);
            return;
        }
        ISA(vf) x = LOAD(vf, input + i), y = LOAD(vf, target + i), loss = LOAD(vf, losses + i);
        ISA(vf) d = x - y, size = (ISA(vf))((ISA(vi))d & 0x7fffffff);
        ISA(vu) bits = (ISA(vu))loss, odd = ((ISA(vu))d & 0xfff) | ((bits & below) ^ middle);
        ISA(vi) within = (size < b) & (d * d == twice * loss) & (odd == 0);
        ISA(vi) beyond = (size >= b) & (size - loss == half);
        ISA(vi) is_exact = (x - d == y) & (d + y == x) & (beyond | within);
        ISA(vi) is_near = ((bits - (middle - 8)) & below) <= 16, is_edge = (bits - first) >= last - first;
        if (is_bfloat)
            is_near = (is_near | is_edge) & (x != y);
        else { /* whose subnormal numbers are steps from 0 */
            ISA(vf) steps = loss * 0x1p24f, off = steps - ((steps + 0x1p23f) - 0x1p23f);
            is_near = (is_near & ~is_edge) | (is_edge & ((off > 0.499f) | (off < -0.499f)));
        }
        for (unsigned open = BITS(is_near & ~is_exact); open; open &= open - 1) {
            size_t at = i + (size_t)__builtin_ctz(open);
            losses[at] = settle_one(input[at], target[at], beta, is_bfloat);
        }
    }
}

static void ISA(settle_half)(const float *input, const float *target, size_t count, const Beta *beta,
                             float *losses) {
    ISA(settle_as)(input, target, count, beta, losses, false);
}

static void ISA(settle_bfloat)(const float *input, const float *target, size_t count,
                               const Beta *beta, float *losses) {
    ISA(settle_as)(input, target, count, beta, losses, true);
}

static void ISA(each_d)(const double *input, const double *target, const double *weight,
                        size_t count, const Beta *beta, double *out) {
    double b = beta->value, divisor = beta->divisor;
    ISA(vd) bs = (ISA(vd)){} + b, divisors = (ISA(vd)){} + divisor;
    size_t i = 0;
    for (; i + DOUBLES <= count; i += DOUBLES) {
        ISA(vd) loss = ISA(losses_d)(LOAD(vd, input + i) - LOAD(vd, target + i), bs, divisors);
        if (weight)
            loss *= LOAD(vd, weight + i);
        STORE(out + i, loss);
    }
    for (; i < count; i++) {
        double loss = ISA(loss_d)(input[i] - target[i], b, divisor);
        out[i] = weight ? loss * weight[i] : loss;
    }
}

/* Float32: beta times each loss, exact differences aside, in float64, where nothing of float32's
 * range over- or underflows; the caller divides the sum by beta, once. For beta = 0, |d|. */
static inline double ISA(term)(double distance, double beta) {
    double core = distance < beta ? distance : beta;
    return core * (distance - 0.5 * core);
}

static inline ISA(vd) ISA(terms)(ISA(vd) distance, ISA(vd) beta) {
    ISA(vd) core = LESSER(distance, beta);
    return core * (distance - 0.5 * core);
}

static inline __attribute__((always_inline)) void
ISA(sum_f_as)(const float *input, const float *target, const float *weight, const uint8_t *mask, size_t count,
              double beta, bool is_l1, bool is_weighted, bool is_masked, Sum *sum) {
    ISA(vd) lanes[LANES / DOUBLES], weights[LANES / DOUBLES];
    ISA(vj) absolute = (ISA(vj)){} + 0x7fffffff, kept = (ISA(vj)){} - 1;
    memcpy(lanes, sum->lanes, sizeof lanes);
    memcpy(weights, sum->weights, sizeof weights);
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
#pragma GCC unroll 8
        for (size_t j = 0; j < LANES / DOUBLES; j++) {
            size_t at = i + j * DOUBLES;
            ISA(vg) d = LOAD(vg, input + at) - LOAD(vg, target + at);
            if (is_masked)
                kept = SPREAD(mask + at) != 0;
            ISA(vd) distance = WIDEN((ISA(vg))((ISA(vj))d & absolute & kept));
            ISA(vd) term = is_l1 ? distance : ISA(terms)(distance, (ISA(vd)){} + beta);
            if (is_weighted) {
                ISA(vd) w = WIDEN((ISA(vg))(LOAD(vj, weight + at) & kept));
                term *= w;
                weights[j] += w;
            }
            lanes[j] += term;
        }
    memcpy(sum->lanes, lanes, sizeof lanes);
    memcpy(sum->weights, weights, sizeof weights);
    for (size_t lane = 0; i < count; i++, lane++) {
        if (is_masked && !mask[i])
            continue;
        double distance = fabsf(input[i] - target[i]);
        double term = is_l1 ? distance : ISA(term)(distance, beta);
        if (is_weighted) {
            term *= (double)weight[i];
            sum->weights[lane] += (double)weight[i];
        }
        sum->lanes[lane] += term;
    }
}

static void ISA(sum_f)(const float *input, const float *target, const float *weight, const uint8_t *mask,
                       size_t count, const Beta *beta, Sum *sum) {
    double b = beta->value;
    bool is_l1 = b == 0;
    if (weight && mask)
        ISA(sum_f_as)(input, target, weight, mask, count, b, is_l1, true, true, sum);
    else if (weight)
        ISA(sum_f_as)(input, target, weight, mask, count, b, is_l1, true, false, sum);
    else if (mask)
        ISA(sum_f_as)(input, target, weight, mask, count, b, is_l1, false, true, sum);
    else if (is_l1)
        ISA(sum_f_as)(input, target, weight, mask, count, b, true, false, false, sum);
    else
        ISA(sum_f_as)(input, target, weight, mask, count, b, false, false, false, sum);
}

/* Float64: beside every lane what its additions round off (Knuth's TwoSum): a sum is as good as in
 * twice the precision. */
static inline void ISA(add_exactly)(ISA(vd) *lane, ISA(vd) *rest, ISA(vd) term) {
    ISA(vd) whole = *lane + term, virtual = whole - *lane;
    *rest += (*lane - (whole - virtual)) + (term - virtual);
    *lane = whole;
}

/* Each loss as the body has it. */
static void ISA(sum_d)(const double *input, const double *target, const double *weight,
                       size_t count, const Beta *beta, Sum *sum) {
    ISA(vd) lanes[LANES / DOUBLES], rests[LANES / DOUBLES];
    memcpy(lanes, sum->lanes, sizeof lanes);
    memcpy(rests, sum->rests, sizeof rests);
    double b = beta->value, divisor = beta->divisor;
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (size_t j = 0; j < LANES / DOUBLES; j++) {
            size_t at = i + j * DOUBLES;
            ISA(vd) term = ISA(losses_d)(LOAD(vd, input + at) - LOAD(vd, target + at), (ISA(vd)){} + b,
                                            (ISA(vd)){} + divisor);
            if (weight)
                term *= LOAD(vd, weight + at);
            ISA(add_exactly)(&lanes[j], &rests[j], term);
        }
    memcpy(sum->lanes, lanes, sizeof lanes);
    memcpy(sum->rests, rests, sizeof rests);
    for (size_t lane = 0; i < count; i++, lane++) {
        double term = ISA(loss_d)(input[i] - target[i], b, divisor);
        two_sum(&sum->lanes[lane], &sum->rests[lane], weight ? term * weight[i] : term);
    }
}

static void ISA(total_f)(const float *values, size_t count, double *sums) {
    ISA(vd) lanes[LANES / DOUBLES];
    memcpy(lanes, sums, sizeof lanes);
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (size_t j = 0; j < LANES / DOUBLES; j++)
            lanes[j] += WIDEN(LOAD(vg, values + i + j * DOUBLES));
    memcpy(sums, lanes, sizeof lanes);
    for (size_t lane = 0; i < count; i++, lane++)
        sums[lane] += values[i];
}

static void ISA(total_d)(const double *values, size_t count, double *sums, double *sum_rests) {
    ISA(vd) lanes[LANES / DOUBLES], rests[LANES / DOUBLES];
    memcpy(lanes, sums, sizeof lanes);
    memcpy(rests, sum_rests, sizeof rests);
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (size_t j = 0; j < LANES / DOUBLES; j++)
            ISA(add_exactly)(&lanes[j], &rests[j], LOAD(vd, values + i + j * DOUBLES));
    memcpy(sums, lanes, sizeof lanes);
    memcpy(sum_rests, rests, sizeof rests);
    for (size_t lane = 0; i < count; i++, lane++)
        two_sum(&sums[lane], &sum_rests[lane], values[i]);
}

/* Adds `count` numbers to `width` sums in turn. */
static void ISA(total_down)(const double *values, size_t count, size_t width, double *sums, double *rests) {
    size_t whole = count - count % width, j = 0;
    for (; j + DOUBLES <= width; j += DOUBLES) {
        ISA(vd) lane = LOAD(vd, sums + j), rest = LOAD(vd, rests + j);
        for (size_t i = j; i < whole; i += width)
            ISA(add_exactly)(&lane, &rest, LOAD(vd, values + i));
        STORE(sums + j, lane);
        STORE(rests + j, rest);
    }
    for (; j < width; j++)
        for (size_t i = j; i < whole; i += width)
            two_sum(&sums[j], &rests[j], values[i]);
    for (j = 0; whole + j < count; j++)
        two_sum(&sums[j], &rests[j], values[whole + j]);
}

/* What is an odd float where it isn't exact: a rounding to half as many bits can't tell it. */
static inline ISA(vg) ISA(odd)(ISA(vd) value) {
    ISA(vg) nearest = NARROW(value);
    __asm__("" : "+m"(nearest)); /* gcc 12 takes what was narrowed and widened again for what it was */
    ISA(vg) lost = NARROW((value - WIDEN(nearest)) * 0x1p100); /* NaN for an infinity */
    ISA(vj) bits = (ISA(vj))nearest, is_off = (lost < 0) | (lost > 0);
    ISA(vj) is_beyond = is_off & (((ISA(vj))lost ^ bits) < 0);
    return (ISA(vg))((bits + is_beyond) | (is_off & 1));
}

static inline __attribute__((always_inline)) ISA(vd)
ISA(load)(const void *from, size_t at, bool is_double) {
    if (is_double)
        return LOAD(vd, (const double *)from + at);
    return WIDEN(LOAD(vg, (const float *)from + at));
}

static inline ISA(vd) ISA(times)(ISA(vd) value, Factor factor) {
    return factor.divides ? value / factor.number : value * factor.number;
}

/* The slope of as many differences, times the divisor that it has: clipped; of beta 0 the sign, and of an
 * infinite one 0. */
static inline __attribute__((always_inline)) ISA(vd)
ISA(clipped)(ISA(vd) d, ISA(vd) high, bool has_zero, bool has_infinity) {
    ISA(vd) low = -high, one = (ISA(vd)){} + 1;
    ISA(vd) sign = (ISA(vd))(((ISA(vl))one & (d > 0)) | ((ISA(vl))(-one) & (d < 0)));
    ISA(vd) value = SELECT(d > high, high, d, vd, vl);
    value = SELECT(d < low, low, value, vd, vl);
    if (has_zero)
        value = SELECT(high == 0, sign, value, vd, vl);
    if (has_infinity) {
        ISA(vd) flat = SELECT((d == INFINITY) | (d == -INFINITY), sign, d * 0, vd, vl);
        value = SELECT(high == INFINITY, flat, value, vd, vl);
    }
    return value;
}

/* The gradients of as many elements as a vector holds, as the body has them. `from` has input, target,
 * and NULL or the weight and what flows in. */
static inline __attribute__((always_inline)) ISA(vd)
ISA(slopes)(const void *const *from, size_t at, const Slope *slope, bool is_double) {
    ISA(vd) d = ISA(load)(from[0], at, is_double) * slope->scale -
                ISA(load)(from[1], at, is_double) * slope->scale;
    double beta = slope->beta;
    ISA(vd) value = ISA(clipped)(d, (ISA(vd)){} + beta, beta == 0, beta == INFINITY);
    value = ISA(times)(value, slope->over_divisor);
    if (!from[2] && !from[3])
        return ISA(times)(value, slope->flowing);
    ISA(vd) flowing = slope->flowing.number - (ISA(vd)){}; /* 0 added would make 0 of -0 */
    if (from[3])
        flowing = ISA(load)(from[3], at, is_double);
    if (from[2])
        flowing = ISA(load)(from[2], at, is_double) * flowing;
    return flowing * value;
}

static inline __attribute__((always_inline)) void
ISA(slopes_as)(const void *const *from, size_t count, const Slope *given, char *to, bool is_double,
               bool is_odd) {
    const Slope slope = *given; /* which nothing that is stored can change */
    size_t size = is_double ? 8 : 4;
    char ends[5][sizeof(ISA(vd))] = {{0}}; /* the last elements, where they are fewer than a vector */
    for (size_t i = 0; i < count; i += DOUBLES) {
        size_t rest = count - i, first = i;
        const void *at[4] = {from[0], from[1], from[2], from[3]};
        char *out = to + i * size;
        if (rest < DOUBLES) {
            first = 0;
            out = ends[4];
            for (size_t j = 0; j < 4; j++)
                at[j] = at[j] ? memcpy(ends[j], (const char *)at[j] + i * size, rest * size) : NULL;
        }
        ISA(vd) value = ISA(slopes)(at, first, &slope, is_double);
        if (is_double)
            STORE(out, value);
        else
            STORE(out, is_odd ? ISA(odd)(value) : NARROW(value));
        if (rest < DOUBLES)
            memcpy(to + i * size, out, rest * size);
    }
}

static void ISA(slopes_f)(const void *const *from, size_t count, const Slope *slope, float *to) {
    ISA(slopes_as)(from, count, slope, (char *)to, false, false);
}

static void ISA(slopes_odd)(const void *const *from, size_t count, const Slope *slope, float *to) {
    ISA(slopes_as)(from, count, slope, (char *)to, false, true);
}

static void ISA(slopes_d)(const void *const *from, size_t count, const Slope *slope, double *to) {
    ISA(slopes_as)(from, count, slope, (char *)to, true, false);
}

/* The second family in float64, of one beta or of as many as elements: the losses of as many elements as
 * a vector holds, or their gradients. `from` has input and target, and NULL or the weight, what flows in
 * (of float64), and the betas. */
static inline __attribute__((always_inline)) ISA(vd)
ISA(wide)(const void *const *from, size_t at, const Wide *wide, bool is_double, bool is_half,
          bool has_betas) {
    ISA(vd) b = wide->beta - (ISA(vd)){}, nan = (ISA(vd)){} + NAN, value;
    if (has_betas)
        b = ISA(load)(from[4], at, is_double);
    b = SELECT(b >= wide->least, b, nan, vd, vl);
    ISA(vd) x = ISA(load)(from[0], at, is_double), y = ISA(load)(from[1], at, is_double), d = x - y;
    ISA(vd) one = (ISA(vd)){} + 1, weight = one;
    if (from[2])
        weight = ISA(load)(from[2], at, is_double);
    if (wide->gives_slope) {
        ISA(vl) is_flat = b == INFINITY;
        if (wide->is_huber)
            value = SELECT(b == b, ISA(clipped)(d, b, false, false), nan, vd, vl);
        else {
            d = SELECT(is_flat, x * 0.5 - y * 0.5, d, vd, vl); /* lest finite numbers' overflow */
            value = ISA(clipped)(d, b, true, true) / SELECT(is_flat | (b == 0), one, b, vd, vl);
        }
        return weight * ISA(load)(from[3], at, true) * value;
    }
    if (!is_double && !is_half) /* as every float32 loss has it */
        d = WIDEN(LOAD(vg, (const float *)from[0] + at) - LOAD(vg, (const float *)from[1] + at));
    if (wide->is_huber)
        value = ISA(terms)((ISA(vd))((ISA(vl))d & INT64_MAX), b);
    else
        value = ISA(losses_d)(d, b, SELECT(b == 0, one, b, vd, vl));
    return from[2] ? value * weight : value;
}

static inline __attribute__((always_inline)) void
ISA(wide_of)(const void *const *given, size_t count, Wide wide, char *to, bool is_double, bool is_half,
             bool stays_wide, bool has_betas) {
    const void *from[5] = {given[0], given[1], given[2], given[3], given[4]};
    size_t given_size = is_double ? 8 : 4, size = stays_wide ? 8 : 4, i = 0;
    size_t sizes[5] = {given_size, given_size, given_size, 8, given_size};
    for (; i + DOUBLES <= count; i += DOUBLES) {
        ISA(vd) value = ISA(wide)(from, i, &wide, is_double, is_half, has_betas);
        if (stays_wide)
            STORE(to + i * size, value);
        else
            STORE(to + i * size, is_half ? ISA(odd)(value) : NARROW(value));
    }
    if (i == count)
        return;
    char ends[6][sizeof(ISA(vd))] = {{0}};
    for (size_t j = 0; j < 5; j++)
        if (from[j])
            from[j] = memcpy(ends[j], (const char *)from[j] + i * sizes[j], (count - i) * sizes[j]);
    ISA(vd) value = ISA(wide)(from, 0, &wide, is_double, is_half, has_betas);
    if (stays_wide)
        STORE(ends[5], value);
    else
        STORE(ends[5], is_half ? ISA(odd)(value) : NARROW(value));
    memcpy(to + i * size, ends[5], (count - i) * size);
}

static inline __attribute__((always_inline)) void
ISA(wide_as)(const void *const *from, size_t count, const Wide *wide, void *to, bool is_double, bool is_half,
             bool stays_wide) {
    Wide slope = *wide, loss = *wide;
    slope.gives_slope = true, loss.gives_slope = false;
    if (wide->gives_slope && from[4])
        ISA(wide_of)(from, count, slope, to, is_double, is_half, stays_wide, true);
    else if (wide->gives_slope)
        ISA(wide_of)(from, count, slope, to, is_double, is_half, stays_wide, false);
    else if (from[4])
        ISA(wide_of)(from, count, loss, to, is_double, is_half, stays_wide, true);
    else
        ISA(wide_of)(from, count, loss, to, is_double, is_half, stays_wide, false);
}

static void ISA(wide_f)(const void *const *from, size_t count, const Wide *wide, void *to) {
    ISA(wide_as)(from, count, wide, to, false, false, false);
}

static void ISA(wide_odd)(const void *const *from, size_t count, const Wide *wide, void *to) {
    ISA(wide_as)(from, count, wide, to, false, true, false);
}

static void ISA(wide_d)(const void *const *from, size_t count, const Wide *wide, void *to) {
    ISA(wide_as)(from, count, wide, to, true, false, true);
}

/* Of float32 too, or of a half format in it: for sums. */
static void ISA(wide_terms)(const void *const *from, size_t count, const Wide *wide, void *to) {
    ISA(wide_as)(from, count, wide, to, false, false, true);
}

#define LESS(name, real) \
    static void ISA(name)(const real *input, const real *target, size_t count, real *to) { \
        _Pragma("GCC ivdep") for (size_t i = 0; i < count; i++) \
            to[i] = input[i] - target[i]; \
    }
LESS(less_f, float)
LESS(less_d, double)
#undef LESS

/* Outside the mask 0; `to` may be `from`. */
#define KEEP(bits) \
    static void ISA(keep_##bits)(const void *from, const uint8_t *mask, size_t count, void *to) { \
        const uint##bits##_t *given = from; \
        uint##bits##_t *kept = to; \
        _Pragma("GCC ivdep") for (size_t i = 0; i < count; i++) \
            kept[i] = given[i] & (uint##bits##_t)-(mask[i] != 0); \
    }
KEEP(16)
KEEP(32)
KEEP(64)
#undef KEEP

static size_t ISA(selected)(const uint8_t *mask, size_t count) {
    size_t found = 0;
    while (count) {
        size_t part = count < 192 ? count : 192; /* which a byte holds */
        uint8_t few = 0;
        for (size_t i = 0; i < part; i++)
            few += mask[i] != 0;
        found += few, mask += part, count -= part;
    }
    return found;
}

static void ISA(widen_half)(const uint16_t *from, size_t count, float *to) {
    size_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS) {
#ifdef WIDEN_HALF
        STORE(to + i, WIDEN_HALF(LOAD(vh, from + i)));
#else
        ISA(vu) half = __builtin_convertvector(LOAD(vh, from + i), ISA(vu));
        ISA(vu) bits = (half & 0x7fff) << 13;
        /* The exponent's bias, 15 against 127; twice for infinities and NaN. */
        ISA(vu) normal = bits + (112u << 23) + ((ISA(vu))(bits >= (31u << 23)) & (112u << 23));
        ISA(vf) least = (ISA(vf))((ISA(vu)){} + (113u << 23));
        ISA(vu) subnormal = (ISA(vu))((ISA(vf))(bits + (113u << 23)) - least);
        ISA(vu) is_tiny = (ISA(vu))(bits < (1u << 23));
        STORE(to + i, (subnormal & is_tiny) | (normal & ~is_tiny) | ((half & 0x8000) << 16));
#endif
    }
    for (; i < count; i++)
        to[i] = half_to_float(from[i]);
}

static void ISA(widen_bfloat)(const uint16_t *from, size_t count, float *to) {
    size_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS)
        STORE(to + i, __builtin_convertvector(LOAD(vh, from + i), ISA(vu)) << 16);
    for (; i < count; i++)
        to[i] = float_of((uint32_t)from[i] << 16);
}

static void ISA(narrow_half)(const float *from, size_t count, uint16_t *to) {
    size_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS) {
#ifdef NARROW_HALF
        STORE(to + i, NARROW_HALF(LOAD(vf, from + i)));
#else
        ISA(vu) bits = LOAD(vu, from + i), size = bits & 0x7fffffffu;
        ISA(vu) normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        /* Added to a half, a subnormal's last bit is the sum's, and the sum rounds to it. */
        ISA(vu) tiny = (ISA(vu))((ISA(vf))size + 0.5f) - 0x3f000000u;
        ISA(vu) is_tiny = (ISA(vu))(size < 0x38800000u), is_huge = (ISA(vu))(size >= 0x477ff000u);
        ISA(vu) huge = 0x7c00u | ((ISA(vu))(size > 0x7f800000u) & (0x200u | ((size >> 13) & 0x3ffu)));
        ISA(vu) half = (tiny & is_tiny) | (normal & ~is_tiny & ~is_huge) | (huge & is_huge);
        STORE(to + i, __builtin_convertvector(half | ((bits >> 16) & 0x8000u), ISA(vh)));
#endif
    }
    for (; i < count; i++)
        to[i] = float_to_half(from[i]);
}

static void ISA(narrow_bfloat)(const float *from, size_t count, uint16_t *to) {
    size_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS) {
        ISA(vu) bits = LOAD(vu, from + i);
        ISA(vu) rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ISA(vu) is_nan = (ISA(vu))((bits & 0x7fffffffu) > 0x7f800000u);
        ISA(vu) out = (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
        STORE(to + i, __builtin_convertvector(out, ISA(vh)));
    }
    for (; i < count; i++)
        to[i] = float_to_bfloat(from[i]);
}

static const Loops ISA(loops) = {
    ISA(each_f), ISA(each_d), ISA(sum_f), ISA(sum_d), ISA(total_f), ISA(total_d),
    ISA(widen_half), ISA(widen_bfloat), ISA(slopes_f), ISA(slopes_odd), ISA(slopes_d),
    ISA(narrow_half), ISA(narrow_bfloat), ISA(less_f), ISA(less_d), ISA(settle_half), ISA(settle_bfloat),
    ISA(wide_f), ISA(wide_odd), ISA(wide_d), ISA(wide_terms), ISA(total_down),
    ISA(keep_16), ISA(keep_32), ISA(keep_64), ISA(selected),
};

#undef LANES
#undef FLOATS
#undef DOUBLES
#undef LOAD
#undef STORE
#undef SELECT
#undef WIDEN
#undef NARROW
#undef LESSER
#undef BITS
#undef SPREAD
#undef WIDEN_HALF
#undef NARROW_HALF
#undef ISA
#undef VECTOR_BYTES
