/* Smooth L1 for ONNX Runtime: one kernel for each operator of the domain `smoothl1_deploy`.
 *
 * A file of the route `function` is one node of this domain, and carries its body. Where this
 * library is registered ONNX Runtime runs its kernels instead: one pass over the inputs.
 *
 * An operator's name says what it computes (graph/functions.py makes the same names):
 *     [Weighted][Smooth]L1Loss[Row][Sum|Mean|Average][At][Gradient[Upstream]][Float16|BFloat16|Float64]
 * Without Smooth beta is 0; Average divides by the sum of the weights; At takes beta as an input, not as
 * an attribute; Gradient has a second output, the gradient of each element; Upstream multiplies it by
 * the last input, which has the shape of the loss.
 *
 * Any broadcast of at most 64 axes. Sums are added up in a fixed order, in runs of RUN elements
 * whatever the number of threads: the same bits for each of them.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ort.h"

#define RUN ((size_t)1 << 15) /* elements of one task, of which a sum has one partial */
#define BLOCK ((size_t)1 << 10) /* elements that are widened or repeated at a time */
#define THREADED ((size_t)1 << 18) /* elements from which threads gain more than they cost */
#define STREAMED ((size_t)1 << 22) /* outputs from which the cache had better keep the inputs */
#define AXES 64

typedef struct {
    double value, divisor; /* divisor is value, or 1 for 0 */
} Beta;

/* A number to multiply by or, where that would round otherwise, to divide by. */
typedef struct {
    double number;
    bool divides;
} Factor;

/* The gradient of an element: its slope, over a divisor, times what flows into its loss. */
typedef struct {
    double beta, scale; /* input and target are scaled first, lest their difference overflow */
    Factor over_divisor, flowing;
} Slope;

typedef struct {
    _Alignas(64) double lanes[16]; /* a vector of which in two lines of the cache takes twice as long */
    double rests[16], weights[16], weight_rests[16];
} Sum;

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    if (bits < 1u << 23) /* subnormal */
        return float_of(sign | bits_of(float_of(bits + (113u << 23)) - float_of(113u << 23)));
    return float_of(sign | (bits + (112u << 23) * (bits < 31u << 23 ? 1 : 2)));
}

static inline uint16_t float_to_half(float value) {
    uint32_t bits = bits_of(value), size = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) /* rounds to more than float16 holds */
        return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) /* subnormal: added to a half, its last bit is the sum's */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13));
}

static inline uint16_t float_to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* To the nearest float32 that a rounding to half as many bits can't tell from `value`: what is cut
 * off sets the last bit ("rounding to odd"; Boldo and Melquiond, 2008). */
static float odd_float(double value) {
    float nearest = (float)value;
    if (isnan(value) || (double)nearest == value || isinf(nearest))
        return nearest;
    uint32_t bits = bits_of(nearest);
    if (fabs((double)nearest) > fabs(value))
        bits--;
    return float_of(bits | 1);
}

static inline void two_sum(double *sum, double *rest, double term) {
    double whole = *sum + term, virtual = whole - *sum;
    *rest += (*sum - (whole - virtual)) + (term - virtual);
    *sum = whole;
}

typedef struct {
    void (*each_f)(const float *, const float *, const float *, size_t, const Beta *, float *);
    void (*each_d)(const double *, const double *, const double *, size_t, const Beta *, double *);
    void (*sum_f)(const float *, const float *, const float *, size_t, const Beta *, Sum *);
    void (*sum_d)(const double *, const double *, const double *, size_t, const Beta *, Sum *);
    void (*total_f)(const float *, size_t, Sum *);
    void (*total_d)(const double *, size_t, double *, double *);
    void (*widen_half)(const uint16_t *, size_t, float *);
    void (*widen_bfloat)(const uint16_t *, size_t, float *);
    void (*slopes_f)(const void *const *, size_t, const Slope *, float *);
    void (*slopes_odd)(const void *const *, size_t, const Slope *, float *);
    void (*slopes_d)(const void *const *, size_t, const Slope *, double *);
    void (*narrow_half)(const float *, size_t, uint16_t *);
    void (*narrow_bfloat)(const float *, size_t, uint16_t *);
} Loops;

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors wider than registers never leave a file */

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define ISA(name) name##_v2
#define VECTOR_BYTES 16
#define WIDEN(x) (vd_v2){(double)(x)[0], (double)(x)[1]}
#define NARROW(x) (vg_v2){(float)(x)[0], (float)(x)[1]}
#define LESSER(a, b) (vd_v2)_mm_min_pd((__m128d)(a), (__m128d)(b))
#pragma GCC push_options
#pragma GCC target("sse4.2")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v3
#define VECTOR_BYTES 32
#define WIDEN(x) (vd_v3)_mm256_cvtps_pd((__m128)(x))
#define NARROW(x) (vg_v3)_mm256_cvtpd_ps((__m256d)(x))
#define LESSER(a, b) (vd_v3)_mm256_min_pd((__m256d)(a), (__m256d)(b))
#pragma GCC push_options
#pragma GCC target("avx2")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v4
#define VECTOR_BYTES 64
#define WIDEN(x) (vd_v4)_mm512_cvtps_pd((__m256)(x))
#define NARROW(x) (vg_v4)_mm512_cvtpd_ps((__m512d)(x))
#define LESSER(a, b) (vd_v4)_mm512_min_pd((__m512d)(a), (__m512d)(b))
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "loops.h"
#pragma GCC pop_options

static const Loops *const SETS[] = {&loops_v2, &loops_v3, &loops_v4};

/* The instruction sets that processor and operating system both have: 1, 2 or 3 of SETS. */
static int best_set(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX))
        return 1;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
        return 1;
    unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (low & 0xe6) == 0xe6 && (b & wide) == wide ? 3 : 2;
}

/* Copies past the cache; `to` is aligned to 16 bytes. */
static void stream(void *to, const void *from, size_t bytes) {
    size_t i = 0;
    for (; i + 16 <= bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)to + i),
                         _mm_loadu_si128((const __m128i *)((const char *)from + i)));
    memcpy((char *)to + i, (const char *)from + i, bytes - i);
}

static void end_stream(void) { _mm_sfence(); }
#else
#define ISA(name) name##_any
#define VECTOR_BYTES 16
#define WIDEN(x) (vd_any){(double)(x)[0], (double)(x)[1]}
#define NARROW(x) (vg_any){(float)(x)[0], (float)(x)[1]}
#define LESSER(a, b) SELECT((a) < (b), a, b, vd, vl)
#include "loops.h"
static const Loops *const SETS[] = {&loops_any};
static int best_set(void) { return 1; }
static void stream(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void end_stream(void) {}
#endif

static const Loops *loops;
static OrtApi *inferring; /* the interface while shapes are inferred, where none is handed over */

/* For tests: use set `number` from now on, 1 the least; gives how many this processor has. */
__attribute__((visibility("default"))) int smoothl1_deploy_use(int number) {
    int known = best_set();
    if (1 <= number && number <= known)
        loops = SETS[number - 1];
    return known;
}

/* An input as the elements of the broadcast shape, in their order. */
typedef struct {
    const char *data;
    size_t size; /* of an element, in bytes */
    int type;
    bool is_whole; /* no axis is broadcast */
    size_t steps[AXES]; /* elements from one index of an axis to the next; 0 where broadcast */
} Operand;

typedef struct {
    size_t rank, count;
    int64_t dims[AXES]; /* as the output has them */
    size_t axes, sizes[AXES]; /* without those of size 1, neighbours joined where they can be */
} Space;

static size_t size_of(int type) { return type == ORT_DOUBLE ? 8 : type == ORT_FLOAT ? 4 : 2; }

/* `count` elements from `start`, where they are or repeated into `buffer`. */
static const void *elements(const Operand *from, const Space *space, size_t start, size_t count,
                            void *buffer) {
    if (from->is_whole)
        return from->data + start * from->size;
    size_t index[AXES], offset = 0, rest = start, last = space->axes - 1;
    for (size_t axis = space->axes; axis-- > 0;) {
        index[axis] = rest % space->sizes[axis];
        rest /= space->sizes[axis];
        offset += index[axis] * from->steps[axis];
    }
    char *to = buffer;
    for (size_t done = 0; done < count;) {
        size_t run = space->sizes[last] - index[last];
        if (run > count - done)
            run = count - done;
        const char *at = from->data + offset * from->size;
        if (from->steps[last])
            memcpy(to, at, run * from->size);
        else if (from->size == 2)
            for (size_t i = 0; i < run; i++)
                ((uint16_t *)to)[i] = *(const uint16_t *)at;
        else if (from->size == 4)
            for (size_t i = 0; i < run; i++)
                ((uint32_t *)to)[i] = *(const uint32_t *)at;
        else
            for (size_t i = 0; i < run; i++)
                ((uint64_t *)to)[i] = *(const uint64_t *)at;
        to += run * from->size;
        done += run;
        offset += run * from->steps[last];
        index[last] += run;
        for (size_t axis = last; axis > 0 && index[axis] == space->sizes[axis]; axis--) {
            offset -= index[axis] * from->steps[axis];
            index[axis] = 0;
            index[axis - 1]++;
            offset += from->steps[axis - 1];
        }
    }
    return buffer;
}

/* The same in the dtype that is computed in: float64 for float64, float32 for the others. */
static const void *computable(const Operand *from, const Space *space, size_t start, size_t count,
                              uint64_t *buffer) {
    if (!from->data)
        return NULL;
    if (from->size != 2)
        return elements(from, space, start, count, buffer);
    uint16_t narrow[BLOCK];
    const uint16_t *given = elements(from, space, start, count, narrow);
    (from->type == ORT_FLOAT16 ? loops->widen_half : loops->widen_bfloat)(
        given, count, (float *)buffer);
    return buffer;
}

typedef enum { NONE, SUM, MEAN, AVERAGE } Reduction;

/* An operator of the domain, and the first field of what ONNX Runtime is given of it. */
typedef struct {
    OrtCustomOp ort;
    char name[64];
    Reduction reduction;
    bool by_row, is_weighted, takes_beta, gives_gradient, takes_upstream, is_l1;
    int type; /* of its inputs and its outputs */
    bool is_total; /* of files of version 1: the sum of numbers of any type, as a float64 */
} Operator;

typedef struct {
    const Operator *op;
    OrtApi *api;
    float beta;
} Kernel;

/* What adds up the elements of one row: of what its tasks found. */
typedef struct {
    double sum, rest, weight, weight_rest;
} Partial;

typedef struct {
    const Operator *op;
    Space space;
    Operand input, target, weight, upstream;
    Beta beta;
    Slope slope;
    size_t rows, columns;
    size_t tasks_per_row, rows_per_task; /* one of the two is 1 */
    Partial *partials; /* of each task, where a row has several */
    double *weights; /* what each row's mean was divided by, for the gradient */
    char *out, *gradient;
    bool is_direct;   /* every input is computed with where it lies */
    bool is_streamed; /* outputs as large as the inputs go past the cache */
} Job;

static void put(const Job *job, size_t index, double value) {
    char *to = job->out + index * (job->op->is_total ? 8 : size_of(job->op->type));
    if (job->op->is_total || job->op->type == ORT_DOUBLE)
        memcpy(to, &value, 8);
    else if (job->op->type == ORT_FLOAT) {
        float narrow = (float)value;
        memcpy(to, &narrow, 4);
    } else {
        float odd = odd_float(value);
        uint16_t half = job->op->type == ORT_FLOAT16 ? float_to_half(odd) : float_to_bfloat(odd);
        memcpy(to, &half, 2);
    }
}

static void fold(double *lanes, double *rests, bool is_double) {
    for (size_t step = 8; step; step /= 2)
        for (size_t i = 0; i < step; i++)
            if (is_double) {
                two_sum(&lanes[i], &rests[i], lanes[i + step]);
                rests[i] += rests[i + step];
            } else
                lanes[i] += lanes[i + step];
}

static Partial folded(const Job *job, Sum *sum) {
    bool is_double = job->input.type == ORT_DOUBLE;
    fold(sum->lanes, sum->rests, is_double);
    fold(sum->weights, sum->weight_rests, is_double);
    return (Partial){sum->lanes[0], sum->rests[0], sum->weights[0], sum->weight_rests[0]};
}

/* Adds `count` elements, in the dtype that is computed in, to `sum`. */
static void add(const Job *job, const void *input, const void *target, const void *weight,
                size_t count, Sum *sum) {
    if (job->op->is_total && job->input.type == ORT_DOUBLE)
        loops->total_d(input, count, sum->lanes, sum->rests);
    else if (job->op->is_total)
        loops->total_f(input, count, sum);
    else if (job->op->type == ORT_DOUBLE) {
        loops->sum_d(input, target, weight, count, &job->beta, sum);
        if (job->op->reduction == AVERAGE)
            loops->total_d(weight, count, sum->weights, sum->weight_rests);
    } else
        loops->sum_f(input, target, weight, count, &job->beta, sum);
}

/* Where each input's elements from `start` are, in the dtype that is computed in; NULL for one that
 * the operator has not. */
static void fetch(const Job *job, size_t start, size_t count, uint64_t (*buffers)[BLOCK],
                  const char *at[3]) {
    const Operand *operands[] = {&job->input, &job->target, &job->weight};
    for (int i = 0; i < 3; i++)
        at[i] = computable(operands[i], &job->space, start, count, buffers[i]);
}

/* A mean by weights whose sums overflow: each loss times its share of the weights, as the body has it. */
static double mean_of_shares(const Job *job, size_t row) {
    uint64_t buffers[4][BLOCK];
    const char *at[3];
    double whole = 0, whole_rest = 0, mean = 0, mean_rest = 0, *losses = (double *)buffers[3];
    for (int pass = 0; pass < 2; pass++) {
        for (size_t done = 0; done < job->columns; done += BLOCK) {
            size_t part = job->columns - done < BLOCK ? job->columns - done : BLOCK;
            fetch(job, row * job->columns + done, part, buffers, at);
            const double *weight = (const void *)at[2];
            if (pass)
                loops->each_d((const void *)at[0], (const void *)at[1], NULL, part, &job->beta, losses);
            for (size_t i = 0; i < part; i++)
                if (pass)
                    two_sum(&mean, &mean_rest, weight[i] * 0x1p-60 / whole * losses[i]);
                else
                    two_sum(&whole, &whole_rest, weight[i] * 0x1p-60);
        }
        whole = pass ? whole : whole + whole_rest;
    }
    return mean + mean_rest;
}

static double complete(double sum, double rest) {
    return isfinite(sum) ? sum + rest : sum; /* where the rest is NaN */
}

static void put_row(const Job *job, size_t row, Partial found) {
    const Operator *op = job->op;
    double total = complete(found.sum, found.rest);
    if (op->type != ORT_DOUBLE && !op->is_total)
        total /= job->beta.divisor;
    total += 0; /* a sum is never -0, and what is divided by an infinite beta may be */
    if (op->reduction == MEAN)
        total /= (double)job->columns;
    if (op->reduction == AVERAGE) {
        double weight = complete(found.weight, found.weight_rest), both = total + weight;
        total /= weight;
        if (job->weights)
            job->weights[row] = weight;
        if (op->type == ORT_DOUBLE && !isfinite(both)) {
            double safe = mean_of_shares(job, row);
            total = isfinite(safe) ? safe : total;
        }
    }
    put(job, row, isnan(job->beta.divisor) ? NAN : total);
}

static Partial added(const Job *job, size_t start, size_t count) {
    uint64_t buffers[3][BLOCK];
    const char *at[3];
    Sum sum = {0};
    size_t block = job->is_direct ? RUN : BLOCK;
    for (size_t done = 0; done < count; done += block) {
        size_t part = count - done < block ? count - done : block;
        fetch(job, start + done, part, buffers, at);
        add(job, at[0], at[1], at[2], part, &sum);
    }
    return folded(job, &sum);
}

/* Short rows, as many as a block holds: what they are made of is fetched once for all of them. */
static void add_rows(const Job *job, size_t first, size_t end) {
    uint64_t buffers[3][BLOCK];
    const char *at[3];
    size_t columns = job->columns, at_once = BLOCK / columns;
    size_t step = columns * (job->input.type == ORT_DOUBLE ? 8 : 4);
    for (size_t row = first; row < end; row += at_once) {
        size_t rows = end - row < at_once ? end - row : at_once;
        fetch(job, row * columns, rows * columns, buffers, at);
        for (size_t i = 0; i < rows; i++) {
            Sum sum = {0};
            add(job, at[0] + i * step, at[1] ? at[1] + i * step : NULL,
                at[2] ? at[2] + i * step : NULL, columns, &sum);
            put_row(job, row + i, folded(job, &sum));
        }
    }
}

/* Whether a block is computed in a buffer, and not where it belongs. */
static bool is_staged(const Job *job) { return size_of(job->op->type) == 2 || job->is_streamed; }

/* Brings a block's results from where they are computed to where they belong. */
static void deliver(const Job *job, void *results, size_t count, char *to) {
    uint16_t narrow[BLOCK];
    bool is_half = size_of(job->op->type) == 2, is_streamed = job->is_streamed && !((uintptr_t)to & 15);
    void *done = !is_half ? results : is_streamed ? narrow : (void *)to;
    if (is_half)
        (job->op->type == ORT_FLOAT16 ? loops->narrow_half : loops->narrow_bfloat)(results, count, done);
    if (is_streamed)
        stream(to, done, count * size_of(job->op->type));
    else if (done != to)
        memcpy(to, done, count * size_of(job->op->type));
}

static void losses(const Job *job, size_t start, size_t end) {
    uint64_t buffers[4][BLOCK];
    const char *at[3];
    for (size_t count; start < end; start += count) {
        count = end - start < BLOCK ? end - start : BLOCK;
        char *to = job->out + start * size_of(job->op->type);
        void *results = is_staged(job) ? (void *)buffers[3] : to;
        fetch(job, start, count, buffers, at);
        if (job->op->type == ORT_DOUBLE)
            loops->each_d((const void *)at[0], (const void *)at[1], (const void *)at[2], count,
                          &job->beta, results);
        else
            loops->each_f((const void *)at[0], (const void *)at[1], (const void *)at[2], count,
                          &job->beta, results);
        deliver(job, results, count, to);
    }
}

/* What flows into a row. */
static double upstream_of(const Job *job, size_t row) {
    uint64_t buffer[1];
    const void *at = computable(&job->upstream, &job->space, row, 1, buffer);
    return job->op->type == ORT_DOUBLE ? *(const double *)at : (double)*(const float *)at;
}

/* What divides by `number`, and multiplies where it is a power of two. */
static Factor divided_by(double number) {
    int exponent;
    bool multiplies = frexp(number, &exponent) == 0.5 && isfinite(1 / number);
    return multiplies ? (Factor){1 / number, false} : (Factor){number, true};
}

/* What flows into every loss of a row, less its weight and, without a reduction, its upstream. */
static Factor flowing(const Job *job, size_t row) {
    const Operator *op = job->op;
    double count = op->reduction == MEAN      ? (double)job->columns
                   : op->reduction == AVERAGE ? job->weights[row]
                                              : 1;
    if (!op->is_weighted && !op->takes_upstream)
        return divided_by(count);
    bool has_upstream = op->takes_upstream && op->reduction != NONE;
    return (Factor){(has_upstream ? upstream_of(job, row) : 1) / count, false};
}

static void gradients(const Job *job, size_t start, size_t end) {
    uint64_t buffers[5][BLOCK];
    const char *at[4];
    int type = job->op->type;
    bool by_row = job->op->reduction == AVERAGE || job->op->takes_upstream;
    Slope slope = job->slope;
    for (size_t count; start < end; start += count) {
        size_t row = start / job->columns, stop = by_row ? (row + 1) * job->columns : end;
        count = (stop < end ? stop : end) - start;
        count = count < BLOCK ? count : BLOCK;
        char *to = job->gradient + start * size_of(type);
        void *results = is_staged(job) ? (void *)buffers[4] : to;
        fetch(job, start, count, buffers, at);
        at[3] = job->op->reduction == NONE
                    ? computable(&job->upstream, &job->space, start, count, buffers[3])
                    : NULL;
        slope.flowing = flowing(job, row);
        if (type == ORT_DOUBLE)
            loops->slopes_d((const void *const *)at, count, &slope, results);
        else if (type == ORT_FLOAT)
            loops->slopes_f((const void *const *)at, count, &slope, results);
        else
            loops->slopes_odd((const void *const *)at, count, &slope, results);
        deliver(job, results, count, to);
    }
}

/* The elements of a task. */
static size_t part_of(const Job *job, size_t number, size_t *end) {
    size_t start, stop, last;
    if (job->tasks_per_row > 1) {
        size_t row = number / job->tasks_per_row;
        start = row * job->columns + number % job->tasks_per_row * RUN;
        stop = start + RUN, last = (row + 1) * job->columns;
    } else {
        start = number * job->rows_per_task * job->columns;
        stop = start + job->rows_per_task * job->columns, last = job->rows * job->columns;
    }
    *end = stop < last ? stop : last;
    return start;
}

static void gradient_task(void *data, size_t number) {
    const Job *job = data;
    size_t end, start = part_of(job, number, &end);
    gradients(job, start, end);
    if (job->is_streamed)
        end_stream();
}

static void task(void *data, size_t number) {
    const Job *job = data;
    size_t end, start = part_of(job, number, &end);
    if (job->op->reduction == NONE) {
        losses(job, start, end);
        if (job->is_streamed)
            end_stream();
    } else if (job->tasks_per_row > 1)
        job->partials[number] = added(job, start, end - start);
    else {
        size_t first = number * job->rows_per_task, last = first + job->rows_per_task;
        if (last > job->rows)
            last = job->rows;
        if (0 < job->columns && job->columns <= BLOCK)
            add_rows(job, first, last);
        else
            for (size_t row = first; row < last; row++)
                put_row(job, row, added(job, row * job->columns, job->columns));
    }
    if (job->gradient && !(job->weights && job->partials)) /* or the sum of the weights is not known yet */
        gradient_task(data, number);
}

static OrtStatus *each_task(Job *job, OrtApi *api, const OrtKernelContext *context,
                            void (*one)(void *, size_t), size_t tasks) {
    if (job->space.count >= THREADED && tasks > 1)
        return ort_parallel_for(context, one, tasks, 0, job);
    for (size_t i = 0; i < tasks; i++)
        one(job, i);
    return NULL;
}

static OrtStatus *run(Job *job, OrtApi *api, const OrtKernelContext *context) {
    bool is_sum = job->op->reduction != NONE;
    job->tasks_per_row = job->columns > RUN ? (job->columns + RUN - 1) / RUN : 1;
    job->rows_per_task = job->columns ? RUN / job->columns : RUN;
    job->rows_per_task += !job->rows_per_task;
    size_t tasks = job->tasks_per_row > 1 ? job->rows * job->tasks_per_row
                                          : (job->rows + job->rows_per_task - 1) / job->rows_per_task;
    bool has_partials = is_sum && job->tasks_per_row > 1;
    bool has_weights = job->gradient && job->op->reduction == AVERAGE;
    if (has_partials)
        job->partials = malloc(tasks * sizeof *job->partials);
    if (has_weights)
        job->weights = malloc((job->rows + 1) * sizeof *job->weights);
    OrtStatus *status = NULL;
    if ((has_partials && !job->partials) || (has_weights && !job->weights))
        status = ort_error(ORT_FAIL, "smoothl1_deploy: out of memory");
    if (!status)
        status = each_task(job, api, context, task, tasks);
    if (job->partials && !status)
        for (size_t row = 0; row < job->rows; row++) {
            Partial *first = job->partials + row * job->tasks_per_row, all = first[0];
            for (size_t i = 1; i < job->tasks_per_row; i++) {
                if (job->input.type == ORT_DOUBLE) {
                    two_sum(&all.sum, &all.rest, first[i].sum);
                    two_sum(&all.weight, &all.weight_rest, first[i].weight);
                } else {
                    all.sum += first[i].sum;
                    all.weight += first[i].weight;
                }
                all.rest += first[i].rest;
                all.weight_rest += first[i].weight_rest;
            }
            put_row(job, row, all);
        }
    if (job->partials && job->weights && !status)
        status = each_task(job, api, context, gradient_task, tasks);
    free(job->partials);
    free(job->weights);
    return status;
}

typedef struct {
    int64_t dims[AXES];
    size_t rank;
} Dims;

#define TRY(call) \
    do { \
        OrtStatus *failed_ = (call); \
        if (failed_) \
            return failed_; \
    } while (0)

static OrtStatus *read_operand(OrtApi *api, const OrtKernelContext *context, size_t index, Operand *operand,
                               Dims *dims) {
    const OrtValue *value;
    OrtShapeInfo *info;
    TRY(ort_input(context, index, &value));
    TRY(ort_data((OrtValue *)value, (void **)&operand->data));
    TRY(ort_info(value, &info));
    OrtStatus *status = ort_rank(info, &dims->rank);
    if (!status)
        status = ort_type(info, &operand->type);
    if (!status && dims->rank > AXES)
        status = ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: a tensor of more than 64 axes");
    if (!status)
        status = ort_dims(info, dims->dims, dims->rank);
    ort_release_info(info);
    operand->size = size_of(operand->type);
    if (!operand->data) /* of an empty tensor */
        operand->data = "";
    return status;
}

/* The broadcast shape of all; false where there is none. */
static bool broadcast(Space *space, const Dims *dims, size_t inputs) {
    space->rank = 0;
    for (size_t i = 0; i < inputs; i++)
        if (dims[i].rank > space->rank)
            space->rank = dims[i].rank;
    for (size_t axis = 0; axis < space->rank; axis++)
        space->dims[axis] = 1;
    for (size_t i = 0; i < inputs; i++)
        for (size_t j = 0; j < dims[i].rank; j++) {
            int64_t *size = &space->dims[space->rank - dims[i].rank + j], given = dims[i].dims[j];
            if (*size == 1)
                *size = given;
            else if (given != 1 && given != *size)
                return false;
        }
    space->count = 1;
    for (size_t axis = 0; axis < space->rank; axis++)
        space->count *= (size_t)space->dims[axis];
    return true;
}

/* The steps of an operand over every axis of the space, before any are joined. */
static void set_steps(const Space *space, const Dims *dims, Operand *operand) {
    size_t step = 1;
    operand->is_whole = true;
    for (size_t axis = space->rank; axis-- > 0;) {
        size_t missing = space->rank - dims->rank;
        int64_t size = axis < missing ? 1 : dims->dims[axis - missing];
        bool is_repeated = size == 1 && space->dims[axis] != 1;
        operand->steps[axis] = is_repeated ? 0 : step;
        operand->is_whole &= !is_repeated;
        step *= (size_t)size;
    }
}

/* Leaves out axes of size 1 and joins neighbours that every operand walks through in one go. */
static void join_axes(Space *space, Operand **operands, size_t inputs) {
    space->axes = 0;
    for (size_t axis = 0; axis < space->rank; axis++) {
        size_t size = (size_t)space->dims[axis], last = space->axes - 1;
        if (size == 1)
            continue;
        bool joins = space->axes > 0;
        for (size_t i = 0; i < inputs && joins; i++)
            joins = operands[i]->steps[last] == size * operands[i]->steps[axis];
        if (joins)
            space->sizes[last] *= size;
        else
            last = space->axes++, space->sizes[last] = size;
        for (size_t i = 0; i < inputs; i++)
            operands[i]->steps[last] = operands[i]->steps[axis];
    }
    if (!space->axes) {
        space->sizes[space->axes++] = 1;
        for (size_t i = 0; i < inputs; i++)
            operands[i]->steps[0] = 0;
    }
}

static OrtStatus *read_beta(OrtApi *api, const OrtKernelContext *context, size_t index, double *beta) {
    Operand operand = {0};
    Dims dims;
    TRY(read_operand(api, context, index, &operand, &dims));
    size_t count = 1;
    for (size_t i = 0; i < dims.rank; i++)
        count *= (size_t)dims.dims[i];
    if (count != 1 || (operand.type != ORT_FLOAT && operand.type != ORT_DOUBLE))
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: beta must be one float32 or float64");
    *beta = operand.type == ORT_DOUBLE ? *(const double *)(const void *)operand.data
                                       : (double)*(const float *)(const void *)operand.data;
    return NULL;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    const Kernel *kernel = state;
    const Operator *op = kernel->op;
    OrtApi *api = kernel->api;
    Job job = {.op = op};
    Operand *operands[] = {&job.input, &job.target, &job.weight};
    Dims dims[4];
    size_t inputs = op->is_total ? 1 : op->is_weighted ? 3 : 2;
    for (size_t i = 0; i < inputs; i++)
        TRY(read_operand(api, context, i, operands[i], &dims[i]));
    if (!broadcast(&job.space, dims, inputs))
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: the inputs can't be broadcast to one shape");
    job.is_direct = true;
    for (size_t i = 0; i < inputs; i++) {
        set_steps(&job.space, &dims[i], operands[i]);
        job.is_direct &= operands[i]->is_whole && operands[i]->size > 2;
    }
    join_axes(&job.space, operands, inputs);

    double beta = kernel->beta;
    if (op->takes_beta)
        TRY(read_beta(api, context, inputs, &beta));
    job.beta.value = beta;
    job.beta.divisor = beta > 0 ? beta : beta == 0 ? 1 : NAN;

    if (op->takes_upstream) {
        TRY(read_operand(api, context, inputs + op->takes_beta, &job.upstream, &dims[3]));
        size_t size = 1, wanted = op->reduction == NONE ? job.space.count : 1;
        for (size_t axis = 0; axis < dims[3].rank; axis++)
            size *= (size_t)dims[3].dims[axis];
        if (op->by_row && job.space.rank)
            wanted = (size_t)job.space.dims[0];
        if (size != wanted)
            return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: grad_output hasn't the loss's shape");
        job.upstream.is_whole = true;
    }

    size_t rank = op->reduction == NONE ? job.space.rank : op->by_row;
    if (op->by_row && !job.space.rank)
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: per sample, and the inputs have rank 0");
    OrtValue *out;
    TRY(ort_output(context, 0, job.space.dims, rank, &out));
    TRY(ort_data(out, (void **)&job.out));
    if (op->gives_gradient) {
        TRY(ort_output(context, 1, job.space.dims, job.space.rank, &out));
        TRY(ort_data(out, (void **)&job.gradient));
        bool is_flat = isinf(beta) && beta > 0;
        job.slope.beta = beta;
        job.slope.scale = is_flat && op->type == ORT_DOUBLE ? 0.5 : 1;
        job.slope.over_divisor = divided_by(is_flat ? 1 : job.beta.divisor);
    }
    job.rows = op->by_row ? (size_t)job.space.dims[0] : 1;
    job.columns = 1;
    for (size_t axis = op->by_row; axis < job.space.rank; axis++)
        job.columns *= (size_t)job.space.dims[axis];
    job.is_streamed = job.space.count >= STREAMED;
    return run(&job, api, context);
}

static OrtStatus *create(const OrtCustomOp *ort, OrtApi *api, const OrtKernelInfo *info, void **out) {
    const Operator *op = (const Operator *)ort;
    Kernel *kernel = malloc(sizeof *kernel);
    if (!kernel)
        return ort_error(ORT_FAIL, "smoothl1_deploy: out of memory");
    *kernel = (Kernel){op, api, 0};
    OrtStatus *status = NULL;
    if (!op->takes_beta && !op->is_total && !op->is_l1)
        status = ort_float_attribute(info, "beta", &kernel->beta);
    if (status)
        free(kernel);
    else
        *out = kernel;
    return status;
}

static const char *get_name(const OrtCustomOp *ort) { return ((const Operator *)ort)->name; }
static const char *get_provider(const OrtCustomOp *ort) { (void)ort; return NULL; }
static size_t input_count(const OrtCustomOp *ort) {
    const Operator *op = (const Operator *)ort;
    return op->is_total ? 1 : 2 + (size_t)op->is_weighted + (size_t)op->takes_beta + (size_t)op->takes_upstream;
}
static int input_type(const OrtCustomOp *ort, size_t index) {
    const Operator *op = (const Operator *)ort;
    bool is_beta = op->takes_beta && index == 2 + (size_t)op->is_weighted;
    if (is_beta && op->type != ORT_DOUBLE)
        return ORT_FLOAT; /* of any type, each session would take longer to open */
    return is_beta || op->is_total ? ORT_ANY : op->type;
}
static size_t output_count(const OrtCustomOp *ort) { return 1 + (size_t)((const Operator *)ort)->gives_gradient; }
static int output_type(const OrtCustomOp *ort, size_t index) {
    (void)index;
    return ((const Operator *)ort)->is_total ? ORT_DOUBLE : ((const Operator *)ort)->type;
}
/* Shapes are told where every size or name is certain. Of an axis of two names, of which either may
 * be 1, nothing is; nor of an input of rank 0, which is also how one of any rank looks here. */
static OrtStatus *infer(const OrtCustomOp *ort, OrtShapeInferContext *context) {
    const Operator *op = (const Operator *)ort;
    OrtApi *api = inferring;
    const char *names[AXES], *axis_names[AXES];
    int64_t sizes[AXES], axis_sizes[AXES];
    size_t rank, widest = 0, inputs = op->is_total ? 0 : op->is_weighted ? 3 : 2;
    bool is_certain = true;
    if (op->gives_gradient) {
        OrtShapeInfo *info;
        TRY(ort_inferred_input(context, 0, &info));
        TRY(ort_rank(info, &rank));
        if (rank)
            TRY(ort_infer_output(context, 1, info));
    }
    for (size_t axis = 0; axis < AXES; axis++)
        sizes[axis] = 1, names[axis] = "";
    if (op->reduction != NONE && !op->by_row)
        inputs = 0; /* whose result has rank 0 whatever they are */
    for (size_t i = 0; i < inputs && is_certain; i++) {
        OrtShapeInfo *info;
        TRY(ort_inferred_input(context, i, &info));
        OrtStatus *status = ort_rank(info, &rank);
        is_certain = !status && 0 < rank && rank <= AXES;
        if (!status && is_certain && !(status = ort_dims(info, axis_sizes, rank)))
            status = ort_names(info, axis_names, rank);
        TRY(status);
        if (!is_certain)
            break;
        widest = rank > widest ? rank : widest;
        for (size_t back = 1; back <= rank && is_certain; back++) { /* sizes from the last axis on */
            int64_t *size = &sizes[AXES - back], given = axis_sizes[rank - back];
            const char **name = &names[AXES - back], *other = axis_names[rank - back];
            bool is_unknown = given < 0 && !*other, is_other = given >= 0 ? *size != given : strcmp(*name, other);
            if (given == 1)
                continue;
            if (*size == 1)
                *size = given, *name = other, is_certain = !is_unknown;
            else if (given >= 0 && *size < 0)
                *size = given, *name = ""; /* a name for 1 or for this size */
            else
                is_certain = !is_unknown && (!is_other || (given < 0 && *size >= 0));
        }
    }
    if (!is_certain)
        return NULL;
    OrtShapeInfo *told;
    rank = op->reduction == NONE ? widest : op->by_row;
    TRY(ort_new_info(&told));
    OrtStatus *status = ort_set_type(told, output_type(ort, 0));
    if (!status)
        status = ort_set_dims(told, sizes + AXES - widest, rank);
    if (!status)
        status = ort_set_names(told, names + AXES - widest, rank);
    if (!status)
        status = ort_infer_output(context, 0, told);
    ort_release_info(told);
    return status;
}

static int zero(const OrtCustomOp *ort, size_t index) { (void)ort; (void)index; return 0; }
static int one_of_none(const OrtCustomOp *ort) { (void)ort; return 1; }
static int last_version(const OrtCustomOp *ort) { (void)ort; return INT32_MAX; }

static Operator operators[256];
static size_t operator_count;

static void add_operator(Operator op) {
    op.ort = (OrtCustomOp){
        .version = ORT_API, .name = get_name, .provider = get_provider, .input_type = input_type,
        .input_count = input_count, .output_type = output_type, .output_count = output_count,
        .destroy = free, .input_kind = zero, .output_kind = zero, .input_memory = zero,
        .variadic_input_least = one_of_none, .variadic_input_alike = one_of_none,
        .variadic_output_least = one_of_none, .variadic_output_alike = one_of_none,
        .create_kernel_v2 = create, .compute_v2 = compute, .infer_shape = infer,
        .first_version = one_of_none, .last_version = last_version,
    };
    operators[operator_count++] = op;
}

__attribute__((constructor)) static void prepare(void) {
    static const struct { int type; const char *name; } types[] = {
        {ORT_FLOAT, ""}, {ORT_FLOAT16, "Float16"}, {ORT_BFLOAT16, "BFloat16"}, {ORT_DOUBLE, "Float64"}};
    static const char *const reductions[] = {"", "Sum", "Mean", "Average"};
    smoothl1_deploy_use(best_set());
    for (int type = 0; type < 4; type++)
        for (int reduction = NONE; reduction <= AVERAGE; reduction++)
            for (int flags = 0; flags < 64; flags++) {
                Operator op = {.reduction = (Reduction)reduction, .type = types[type].type,
                               .by_row = flags & 1, .is_weighted = flags & 2, .takes_beta = flags & 4,
                               .gives_gradient = flags & 8, .takes_upstream = flags & 16,
                               .is_l1 = flags & 32};
                if ((reduction == NONE && op.by_row) || (reduction == AVERAGE && !op.is_weighted) ||
                    ((op.type == ORT_DOUBLE || op.gives_gradient) && !op.takes_beta) ||
                    (op.is_l1 && op.takes_beta) ||
                    (op.takes_upstream && !op.gives_gradient))
                    continue; /* no such loss */
                snprintf(op.name, sizeof op.name, "%s%sL1Loss%s%s%s%s%s%s",
                         op.is_weighted ? "Weighted" : "", op.is_l1 ? "" : "Smooth", op.by_row ? "Row" : "",
                         reductions[reduction], op.takes_beta ? "At" : "", op.gives_gradient ? "Gradient" : "",
                         op.takes_upstream ? "Upstream" : "", types[type].name);
                add_operator(op);
            }
    add_operator((Operator){.name = "WideSum", .reduction = SUM, .type = ORT_FLOAT, .is_total = true});
    add_operator((Operator){.name = "WideMean", .reduction = MEAN, .type = ORT_FLOAT, .is_total = true});
}

/* What ONNX Runtime calls when the library is registered with a session's options. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
    static OrtCustomOpDomain *domain; /* of every session; made once, and as long as the process */
    OrtApi *api = base->get_api(ORT_API);
    if (!api)
        return NULL; /* older than 1.17: its sessions run the bodies */
    OrtCustomOpDomain *made = __atomic_load_n(&domain, __ATOMIC_ACQUIRE);
    inferring = api;
    if (!made) {
        TRY(ort_create_domain("smoothl1_deploy", &made));
        for (size_t i = 0; i < operator_count; i++)
            TRY(ort_domain_add(made, &operators[i].ort));
        __atomic_store_n(&domain, made, __ATOMIC_RELEASE);
    }
    return ort_add_domain(options, made);
}
