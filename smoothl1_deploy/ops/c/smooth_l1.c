/* The operators on the CPU: one pass over the inputs.
 *
 * A file of the route `function` is one node of the domain `smoothl1_deploy`, and carries its body.
 * Where this library is registered ONNX Runtime runs its kernels instead.
 *
 * Sums are added up in a fixed order, in runs of RUN elements whatever the number of threads: the
 * same bits for each of them.
 */
#include <stdlib.h>

#include "job.h"

#define RUN ((size_t)1 << 15) /* elements of one task, of which a sum has one partial */
#define BLOCK ((size_t)1 << 10) /* elements that are widened or repeated at a time */
#define LEAST ((size_t)1 << 8) /* columns of one task where sums lie side by side */
#define SHORT ((size_t)1 << 4) /* elements of which several runs are copied together, or rows added up */
#define SIDE BLOCK /* sums side by side of one task */
#define FEW ((size_t)1 << 8) /* elements of a row that are added up one by one */
#define LANED ((size_t)1 << 7) /* lanes of fewer sums side by side */
#define THREADED ((size_t)1 << 18) /* elements from which threads gain more than they cost */
#define STREAMED ((size_t)1 << 22) /* outputs from which the cache had better keep the inputs */

/* What a block is fetched of, and where what is computed of it goes. */
enum { INPUT, TARGET, WEIGHT, FLOWING, BETAS, MASK, FETCHED, RESULTS = FETCHED, BUFFERS };

typedef struct {
    _Alignas(64) double lanes[16]; /* a vector of which in two lines of the cache takes twice as long */
    double rests[16], weights[16], weight_rests[16];
} Sum;

/* What the second family's losses or gradients are computed with. */
typedef struct {
    double beta; /* where all have one */
    double least; /* of a beta, which a Huber loss has none of 0 for */
    bool is_huber; /* or Smooth L1 times beta */
    bool gives_slope;
} Wide;

typedef struct {
    void (*each_f)(const float *, const float *, const float *, size_t, const Beta *, float *);
    void (*each_d)(const double *, const double *, const double *, size_t, const Beta *, double *);
    void (*sum_f)(const float *, const float *, const float *, const uint8_t *, size_t, const Beta *, Sum *);
    void (*sum_d)(const double *, const double *, const double *, size_t, const Beta *, Sum *);
    void (*total_f)(const float *, size_t, double *);
    void (*total_d)(const double *, size_t, double *, double *);
    void (*widen_half)(const uint16_t *, size_t, float *);
    void (*widen_bfloat)(const uint16_t *, size_t, float *);
    void (*slopes_f)(const void *const *, size_t, const Slope *, float *);
    void (*slopes_odd)(const void *const *, size_t, const Slope *, float *);
    void (*slopes_d)(const void *const *, size_t, const Slope *, double *);
    void (*narrow_half)(const float *, size_t, uint16_t *);
    void (*narrow_bfloat)(const float *, size_t, uint16_t *);
    void (*less_f)(const float *, const float *, size_t, float *);
    void (*less_d)(const double *, const double *, size_t, double *);
    void (*settle_half)(const float *, const float *, size_t, const Beta *, float *);
    void (*settle_bfloat)(const float *, const float *, size_t, const Beta *, float *);
    void (*wide_f)(const void *const *, size_t, const Wide *, void *);
    void (*wide_odd)(const void *const *, size_t, const Wide *, void *);
    void (*wide_d)(const void *const *, size_t, const Wide *, void *);
    void (*wide_terms)(const void *const *, size_t, const Wide *, void *);
    void (*total_down)(const double *, size_t, size_t, double *, double *);
    void (*keep_16)(const void *, const uint8_t *, size_t, void *);
    void (*keep_32)(const void *, const uint8_t *, size_t, void *);
    void (*keep_64)(const void *, const uint8_t *, size_t, void *);
    size_t (*selected)(const uint8_t *, size_t);
} Loops;

/* Not inline: the loops that ask for it seldom keep their registers. */
static __attribute__((noinline)) float settle_one(float input, float target, const Beta *beta,
                                                  bool is_bfloat) {
    return settled(input, target, beta, is_bfloat);
}

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors wider than registers never leave a file */

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define ISA(name) name##_v2
#define VECTOR_BYTES 16
#define WIDEN(x) (vd_v2){(double)(x)[0], (double)(x)[1]}
#define NARROW(x) (vg_v2){(float)(x)[0], (float)(x)[1]}
#define LESSER(a, b) (vd_v2)_mm_min_pd((__m128d)(a), (__m128d)(b))
#define BITS(x) (unsigned)_mm_movemask_ps((__m128)(x))
#define SPREAD(at) (vj_v2){(at)[0], (at)[1]}
#pragma GCC push_options
#pragma GCC target("sse4.2")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v3
#define VECTOR_BYTES 32
#define WIDEN(x) (vd_v3)_mm256_cvtps_pd((__m128)(x))
#define NARROW(x) (vg_v3)_mm256_cvtpd_ps((__m256d)(x))
#define LESSER(a, b) (vd_v3)_mm256_min_pd((__m256d)(a), (__m256d)(b))
#define BITS(x) (unsigned)_mm256_movemask_ps((__m256)(x))
#define SPREAD(at) \
    ({ int four_; memcpy(&four_, (at), 4); (vj_v3)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four_)); })
#define WIDEN_HALF(x) (vf_v3)_mm256_cvtph_ps((__m128i)(x))
#define NARROW_HALF(x) (vh_v3)_mm256_cvtps_ph((__m256)(x), _MM_FROUND_TO_NEAREST_INT)
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v4
#define VECTOR_BYTES 64
#define WIDEN(x) (vd_v4)_mm512_cvtps_pd((__m256)(x))
#define NARROW(x) (vg_v4)_mm512_cvtpd_ps((__m512d)(x))
#define LESSER(a, b) (vd_v4)_mm512_min_pd((__m512d)(a), (__m512d)(b))
#define BITS(x) (unsigned)_mm512_movepi32_mask((__m512i)(x))
#define SPREAD(at) (vj_v4)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at)))
#define WIDEN_HALF(x) (vf_v4)_mm512_cvtph_ps((__m256i)(x))
#define NARROW_HALF(x) (vh_v4)_mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "loops.h"
#pragma GCC pop_options

static const Loops *const SETS[] = {&loops_v2, &loops_v3, &loops_v4};

/* The instruction sets that processor and operating system both have: 1, 2 or 3 of SETS. */
static int best_set(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_F16C))
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
#define BITS(x) (unsigned)(((x)[0] & 1) | ((x)[1] & 2) | ((x)[2] & 4) | ((x)[3] & 8))
#define SPREAD(at) (vj_any){(at)[0], (at)[1]}
#include "loops.h"
static const Loops *const SETS[] = {&loops_any};
static int best_set(void) { return 1; }
static void stream(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void end_stream(void) {}
#endif

static const Loops *loops;

/* For tests: use set `number` from now on, 1 the least; gives how many this processor has. */
__attribute__((visibility("default"))) int smoothl1_deploy_use(int number) {
    int known = best_set();
    if (1 <= number && number <= known)
        loops = SETS[number - 1];
    return known;
}

__attribute__((constructor)) static void choose(void) { smoothl1_deploy_use(best_set()); }

/* Many short runs, column by column. */
#define COPY(bits) \
    for (size_t j = 0; j < run; j++) \
        for (size_t i = 0; i < rows; i++) \
            ((uint##bits##_t *)to)[i * run + j] = ((const uint##bits##_t *)at)[i * down + j * step]
static void copy_rows(const Operand *from, const void *at, size_t down, size_t step, size_t rows, size_t run,
                      void *to) {
    if (from->size == 1)
        COPY(8);
    else if (from->size == 2)
        COPY(16);
    else if (from->size == 4)
        COPY(32);
    else
        COPY(64);
}

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
        size_t rows = last && run < SHORT ? space->sizes[last - 1] - index[last - 1] : 1;
        rows = rows * run > count - done ? (count - done) / run : rows;
        if (rows > 1 && !index[last]) {
            copy_rows(from, at, from->steps[last - 1], from->steps[last], rows, run, to);
            index[last - 1] += rows - 1;
            offset += (rows - 1) * from->steps[last - 1];
            to += (rows - 1) * run * from->size;
            done += (rows - 1) * run;
        } else if (from->steps[last])
            memcpy(to, at, run * from->size);
        else if (from->size == 1)
            memset(to, *at, run);
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

/* The same in the dtype that is computed in: float64 for float64, float32 for the others; 0 outside the
 * mask, if there is one, so that nothing there has a loss or a gradient. */
static const void *computable(const Operand *from, const Space *space, size_t start, size_t count,
                              const uint8_t *mask, uint64_t *buffer) {
    if (!from->data)
        return NULL;
    if (from->size != 2) {
        const void *given = elements(from, space, start, count, buffer);
        if (!mask)
            return given;
        (from->size == 4 ? loops->keep_32 : loops->keep_64)(given, mask, count, buffer);
        return buffer;
    }
    uint16_t narrow[BLOCK];
    const uint16_t *given = elements(from, space, start, count, narrow);
    if (mask) {
        loops->keep_16(given, mask, count, narrow);
        given = narrow;
    }
    (from->type == ORT_FLOAT16 ? loops->widen_half : loops->widen_bfloat)(
        given, count, (float *)buffer);
    return buffer;
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

/* Whether sums are added up with what their additions round off. */
static bool is_exact(const Job *job) { return job->input.type == ORT_DOUBLE || job->is_wide; }

static Partial folded(const Job *job, Sum *sum, double selected) {
    bool is_double = is_exact(job);
    fold(sum->lanes, sum->rests, is_double);
    fold(sum->weights, sum->weight_rests, is_double);
    return (Partial){sum->lanes[0], sum->rests[0], sum->weights[0], sum->weight_rests[0], selected};
}

static Wide wide_of(const Job *job) {
    const Operator *op = job->op;
    bool is_huber = op->is_huber || job->is_undivided;
    return (Wide){job->beta.value, op->is_huber ? 0x1p-1074 : 0, is_huber, op->form == SLOPES};
}

/* Adds `count` elements, in the dtype that is computed in, to `sum`. */
static void add(const Job *job, const void *const *at, size_t count, Sum *sum) {
    const void *input = at[INPUT], *target = at[TARGET], *weight = at[WEIGHT];
    bool is_double = job->input.type == ORT_DOUBLE, is_summed = job->is_wide || is_double;
    if (job->is_wide) {
        Wide wide = wide_of(job);
        double terms[BLOCK];
        (is_double ? loops->wide_d : loops->wide_terms)(at, count, &wide, terms);
        loops->total_d(terms, count, sum->lanes, sum->rests);
    } else if (job->op->is_total && is_double)
        loops->total_d(input, count, sum->lanes, sum->rests);
    else if (job->op->is_total)
        loops->total_f(input, count, sum->lanes);
    else if (is_double)
        loops->sum_d(input, target, weight, count, &job->beta, sum);
    else
        loops->sum_f(input, target, weight, at[MASK], count, &job->beta, sum);
    if (is_summed && weight && (job->op->reduction == AVERAGE || job->op->form)) {
        if (is_double)
            loops->total_d(weight, count, sum->weights, sum->weight_rests);
        else
            loops->total_f(weight, count, sum->weights);
    }
}

/* Whether what is outside the mask is left to the loop, as only sum_f can. */
static bool reads_mask(const Job *job) {
    return job->op->reduction == SUM && job->op->type != ORT_DOUBLE && !job->is_wide;
}

/* Where each input's elements from `start` are, in the dtype that is computed in; NULL for one that
 * the operator has not. */
static void fetch(const Job *job, size_t start, size_t count, uint64_t (*buffers)[BLOCK],
                  const void *at[FETCHED]) {
    static const Operand none;
    const Operand *flowing = job->op->form == SLOPES ? &job->upstream : &none;
    const Operand *operands[] = {&job->input, &job->target, &job->weight, flowing};
    const Space *space = &job->space;
    const uint8_t *mask = at[MASK] = job->mask ? elements(job->mask, space, start, count, buffers[MASK]) : NULL;
    at[BETAS] = job->betas ? elements(job->betas, space, start, count, buffers[BETAS]) : NULL;
    if (reads_mask(job))
        mask = NULL;
    for (int i = INPUT; i <= FLOWING; i++)
        at[i] = computable(operands[i], space, start, count, mask, buffers[i]);
}

/* A mean by weights whose sums overflow: each loss times its share of the weights, as the body has it. */
static double mean_of_shares(const Job *job, size_t row) {
    uint64_t buffers[BUFFERS][BLOCK];
    const void *at[FETCHED];
    double whole = 0, whole_rest = 0, mean = 0, mean_rest = 0, *losses = (double *)buffers[RESULTS];
    for (int pass = 0; pass < 2; pass++) {
        for (size_t done = 0; done < job->columns; done += BLOCK) {
            size_t part = job->columns - done < BLOCK ? job->columns - done : BLOCK;
            fetch(job, row * job->columns + done, part, buffers, at);
            const double *weight = at[WEIGHT];
            if (pass)
                loops->each_d(at[INPUT], at[TARGET], NULL, part, &job->beta, losses);
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

static void put_row(const Job *job, size_t row, Partial found) {
    const Operator *op = job->op;
    double total = result_of(op, &job->beta, job->columns, &found);
    if (op->form) {
        ((double *)(void *)job->out)[row] = total;
        job->selected[row] = job->mask ? found.selected : (double)job->columns;
        if (op->is_weighted)
            job->weight_sums[row] = complete(found.weight, found.weight_rest);
        return;
    }
    if (op->reduction == AVERAGE) {
        double weight = complete(found.weight, found.weight_rest);
        if (job->weights)
            job->weights[row] = weight;
        if (op->type == ORT_DOUBLE && !isfinite(complete(found.sum, found.rest) + weight)) {
            double safe = mean_of_shares(job, row);
            total = isfinite(safe) ? safe : total;
        }
    }
    put(op, job->out, row, total);
}

static double selected_of(const void *const *at, size_t count) {
    return at[MASK] ? (double)loops->selected(at[MASK], count) : 0;
}

static Partial added(const Job *job, size_t start, size_t count) {
    uint64_t buffers[FETCHED][BLOCK];
    const void *at[FETCHED];
    Sum sum = {0};
    double selected = 0;
    size_t block = job->is_direct ? RUN : BLOCK;
    for (size_t done = 0; done < count; done += block) {
        size_t part = count - done < block ? count - done : block;
        fetch(job, start + done, part, buffers, at);
        add(job, at, part, &sum);
        selected += selected_of(at, part);
    }
    return folded(job, &sum, selected);
}

/* Short rows, as many as a block holds: what they are made of is fetched once for all of them. */
static void add_rows(const Job *job, size_t first, size_t end) {
    uint64_t buffers[FETCHED][BLOCK];
    const void *at[FETCHED];
    size_t columns = job->columns, at_once = BLOCK / columns;
    size_t step = columns * (job->input.type == ORT_DOUBLE ? 8 : 4), steps[FETCHED];
    for (size_t row = first; row < end; row += at_once) {
        size_t rows = end - row < at_once ? end - row : at_once;
        fetch(job, row * columns, rows * columns, buffers, at);
        for (int j = 0; j < FETCHED; j++)
            steps[j] = !at[j] ? 0 : j == MASK ? columns : step;
        for (size_t i = 0; i < rows; i++) {
            Sum sum = {0};
            add(job, at, columns, &sum);
            put_row(job, row + i, folded(job, &sum, selected_of(at, columns)));
            for (int j = 0; j < FETCHED; j++)
                at[j] = (const char *)at[j] + steps[j];
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
    uint64_t buffers[BUFFERS][BLOCK];
    const void *at[FETCHED];
    Wide wide = wide_of(job);
    int type = job->op->type;
    bool is_half = size_of(type) == 2;
    for (size_t count; start < end; start += count) {
        count = end - start < BLOCK ? end - start : BLOCK;
        char *to = job->out + start * size_of(type);
        void *results = is_staged(job) ? (void *)buffers[RESULTS] : to;
        fetch(job, start, count, buffers, at);
        if (job->op->beside == DIFFERENCES && type == ORT_DOUBLE)
            loops->less_d(at[INPUT], at[TARGET], count, results);
        else if (job->op->beside == DIFFERENCES)
            loops->less_f(at[INPUT], at[TARGET], count, results);
        else if (job->is_wide)
            (type == ORT_DOUBLE ? loops->wide_d
             : is_half          ? loops->wide_odd
                                : loops->wide_f)(at, count, &wide, results);
        else if (type == ORT_DOUBLE)
            loops->each_d(at[INPUT], at[TARGET], at[WEIGHT], count, &job->beta, results);
        else
            loops->each_f(at[INPUT], at[TARGET], at[WEIGHT], count, &job->beta, results);
        if (is_half && !at[WEIGHT] && !job->is_wide && job->op->beside != DIFFERENCES)
            (type == ORT_FLOAT16 ? loops->settle_half : loops->settle_bfloat)(
                at[INPUT], at[TARGET], count, &job->beta, results);
        deliver(job, results, count, to);
    }
}

/* What flows into a row. */
static double upstream_of(const Job *job, size_t row) {
    uint64_t buffer[1];
    const void *at = computable(&job->upstream, &job->space, row, 1, NULL, buffer);
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
    uint64_t buffers[BUFFERS][BLOCK];
    const void *at[FETCHED];
    int type = job->op->type;
    bool by_row = job->op->reduction == AVERAGE || job->op->takes_upstream;
    Slope slope = job->slope;
    for (size_t count; start < end; start += count) {
        size_t row = start / job->columns, stop = by_row ? (row + 1) * job->columns : end;
        count = (stop < end ? stop : end) - start;
        count = count < BLOCK ? count : BLOCK;
        char *to = job->gradient + start * size_of(type);
        void *results = is_staged(job) ? (void *)buffers[RESULTS] : to;
        fetch(job, start, count, buffers, at);
        if (job->op->reduction == NONE)
            at[FLOWING] = computable(&job->upstream, &job->space, start, count, NULL, buffers[FLOWING]);
        slope.flowing = flowing(job, row);
        if (type == ORT_DOUBLE)
            loops->slopes_d(at, count, &slope, results);
        else if (type == ORT_FLOAT)
            loops->slopes_f(at, count, &slope, results);
        else
            loops->slopes_odd(at, count, &slope, results);
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

/* Gives what there is of each element beside: of those that were just added up or, where sums are over
 * other axes than the last, of as many. */
static void give_each(const Job *job, size_t start, size_t end) {
    if (!job->each)
        return;
    losses(job->each, start, end);
    if (job->each->is_streamed)
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
    give_each(job, start, end);
    if (job->gradient && !(job->weights && job->partials)) /* or the sum of the weights is not known yet */
        gradient_task(data, number);
}

/* Whether sums are added up side by side, or of few elements. */
static bool has_strips(const Job *job) {
    return job->op->form == TOTALS && (job->width > 1 || job->columns < SHORT);
}

/* A strip: of one row at most SIDE sums side by side. */
static size_t strips_of(const Job *job) { return (job->width + SIDE - 1) / SIDE; }

static size_t side_of(const Job *job, size_t strip) {
    size_t first = strip % strips_of(job) * SIDE;
    return job->width - first < SIDE ? job->width - first : SIDE;
}

typedef struct {
    double sums[SIDE], rests[SIDE];
} Lanes;

/* How many lanes a strip is added up in, turn by turn: so many for each of its sums that they fill
 * vectors, and that few columns in a row go to one. */
static size_t lanes_of(size_t width, size_t columns) {
    size_t most = width < LANED ? LANED / width : 1;
    return width * (columns < 1 ? 1 : columns < most ? columns : most);
}

/* Losses, and where they are asked for weights and ones for what is selected, as float64. */
static void fetch_numbers(const Job *job, size_t start, size_t count, double (*numbers)[BLOCK]) {
    uint64_t buffers[FETCHED][BLOCK];
    const void *at[FETCHED];
    Wide wide = wide_of(job);
    bool is_double = job->input.type == ORT_DOUBLE;
    fetch(job, start, count, buffers, at);
    (is_double ? loops->wide_d : loops->wide_terms)(at, count, &wide, numbers[0]);
    const uint8_t *mask = at[MASK];
    for (size_t i = 0; at[WEIGHT] && i < count; i++)
        numbers[1][i] = is_double ? ((const double *)at[WEIGHT])[i] : (double)((const float *)at[WEIGHT])[i];
    for (size_t i = 0; mask && i < count; i++)
        numbers[2][i] = mask[i] != 0;
}

static void add_numbers(const Job *job, double (*numbers)[BLOCK], size_t first, size_t count, size_t lanes,
                        Lanes *to) {
    const bool is_asked[] = {true, job->op->is_weighted, job->mask};
    for (int i = 0; i < 3; i++)
        if (is_asked[i])
            loops->total_down(numbers[i] + first, count, lanes, to[i].sums, to[i].rests);
}

static void clear_lanes(size_t lanes, Lanes *to) {
    for (int i = 0; i < 3; i++) {
        memset(to[i].sums, 0, lanes * sizeof(double));
        memset(to[i].rests, 0, lanes * sizeof(double));
    }
}

/* Of the sums side by side the one of number `first`. */
static Partial folded_lanes(const Lanes *from, size_t first, size_t width, size_t lanes) {
    Partial found = {0};
    for (size_t i = first; i < lanes; i += width) {
        Partial lane = {from[0].sums[i], from[0].rests[i], from[1].sums[i], from[1].rests[i], from[2].sums[i]};
        join(true, &found, &lane);
    }
    return found;
}

static void give_sums(const Job *job, size_t strip, const Lanes *sums, size_t lanes, Partial *to) {
    size_t strips = strips_of(job), first = strip % strips * SIDE, row = strip / strips;
    for (size_t i = 0, side = side_of(job, strip); i < side; i++) {
        Partial found = folded_lanes(sums, i, side, lanes);
        if (to)
            to[i] = found;
        else
            put_row(job, row * job->width + first + i, found);
    }
}

/* Some columns of a strip; where there are more they are other tasks'. */
static void add_strip(const Job *job, size_t strip, size_t column, size_t end, Partial *to) {
    double numbers[3][BLOCK];
    Lanes sums[3];
    size_t strips = strips_of(job), side = side_of(job, strip), lanes = side, at_once = 1;
    size_t start = strip / strips * job->columns * job->width + strip % strips * SIDE;
    if (strips == 1) { /* the columns lie one behind another */
        lanes = lanes_of(side, end - column);
        at_once = BLOCK / lanes * (lanes / side);
    }
    clear_lanes(lanes, sums);
    for (size_t count; column < end; column += count) {
        count = end - column < at_once ? end - column : at_once;
        fetch_numbers(job, start + column * job->width, count * side, numbers);
        add_numbers(job, numbers, 0, count * side, lanes, sums);
    }
    give_sums(job, strip, sums, lanes, to);
}

/* Short rows, as many as a block holds. */
static void add_strips(const Job *job, size_t row, size_t end) {
    double numbers[3][BLOCK];
    size_t width = job->width, count = job->columns * width, at_once = BLOCK / count;
    for (size_t rows; row < end; row += rows) {
        rows = end - row < at_once ? end - row : at_once;
        fetch_numbers(job, row * count, rows * count, numbers);
        for (size_t i = 0; i < rows * width; i++) {
            size_t first = i / width * count + i % width;
            Partial found = {0};
            for (size_t at = first; at < first + count; at += width) {
                two_sum(&found.sum, &found.rest, numbers[0][at]);
                if (job->op->is_weighted)
                    two_sum(&found.weight, &found.weight_rest, numbers[1][at]);
                if (job->mask)
                    found.selected += numbers[2][at];
            }
            put_row(job, row * width + i, found);
        }
    }
}

static void strip_task(void *data, size_t number) {
    const Job *job = data;
    size_t strips = strips_of(job), row = job->columns * job->width;
    if (job->tasks_per_row > 1) {
        size_t column = number % job->tasks_per_row * job->run, end = column + job->run;
        size_t strip = number / job->tasks_per_row;
        end = end < job->columns ? end : job->columns;
        add_strip(job, strip, column, end, job->partials + number * side_of(job, 0));
        give_each(job, strip * row + column * job->width, strip * row + end * job->width);
        return;
    }
    size_t first = number * job->rows_per_task, last = first + job->rows_per_task;
    last = last < job->rows * strips ? last : job->rows * strips;
    if (0 < job->columns && job->columns * job->width <= FEW)
        add_strips(job, first, last);
    else
        for (size_t strip = first; strip < last; strip++)
            add_strip(job, strip, 0, job->columns, NULL);
    give_each(job, first * row, last * row);
}

static OrtStatus *each_task(Job *job, OrtApi *api, const OrtKernelContext *context,
                            void (*one)(void *, size_t), size_t tasks) {
    if (job->space.count >= THREADED && tasks > 1)
        return ort_parallel_for(context, one, tasks, 0, job);
    for (size_t i = 0; i < tasks; i++)
        one(job, i);
    return NULL;
}

const char *const execution_provider = NULL;

bool has_kernel(const Operator *op) { (void)op; return true; }

OrtStatus *check_device(OrtApi *api) { (void)api; return NULL; }

/* How each element is computed. */
static void settle(Job *job) {
    const Operator *op = job->op;
    bool in_strips = has_strips(job);
    job->beta = beta_of(job);
    double beta = job->beta.value;
    job->is_wide = op->form && (job->betas || op->form == SLOPES || in_strips ||
                                (op->is_huber && (op->type == ORT_DOUBLE || op->form == ELEMENTS)));
    job->is_direct &= !job->is_wide && (!job->mask || reads_mask(job));
    job->is_undivided = in_strips && op->type != ORT_DOUBLE && !op->is_huber && beta > 0;
    if ((job->is_wide && !job->is_undivided) || op->is_huber)
        job->beta.divisor = job->betas || beta > 0 || (beta == 0 && !op->is_huber) ? 1 : NAN;
    bool is_flat = isinf(beta) && beta > 0;
    job->slope.beta = beta;
    job->slope.scale = is_flat && job->op->type == ORT_DOUBLE ? 0.5 : 1;
    job->slope.over_divisor = divided_by(is_flat ? 1 : job->beta.divisor);
    job->is_streamed = job->space.count >= STREAMED;
}

OrtStatus *compute_job(Job *job, OrtApi *api, OrtKernelContext *context) {
    bool in_strips = has_strips(job);
    Job *later = strips_of(job) > 1 ? job->each : NULL; /* where a task has parts of rows */
    settle(job);
    if (later)
        job->each = NULL;
    else if (job->each)
        settle(job->each);
    bool is_sum = job->op->reduction != NONE;
    size_t rows = job->rows * strips_of(job), side = side_of(job, 0);
    job->run = RUN / side < LEAST ? LEAST : RUN / side;
    job->tasks_per_row = job->columns > job->run ? (job->columns + job->run - 1) / job->run : 1;
    job->rows_per_task = job->columns ? RUN / (job->columns * side) : RUN;
    job->rows_per_task += !job->rows_per_task;
    size_t tasks = job->tasks_per_row > 1 ? rows * job->tasks_per_row
                                          : (rows + job->rows_per_task - 1) / job->rows_per_task;
    bool has_partials = is_sum && job->tasks_per_row > 1;
    bool has_weights = job->gradient && job->op->reduction == AVERAGE;
    if (has_partials)
        job->partials = malloc(tasks * side * sizeof *job->partials);
    if (has_weights)
        job->weights = malloc((job->rows + 1) * sizeof *job->weights);
    OrtStatus *status = NULL;
    if ((has_partials && !job->partials) || (has_weights && !job->weights))
        status = ort_error(ORT_FAIL, "smoothl1_deploy: out of memory");
    if (!status)
        status = each_task(job, api, context, in_strips ? strip_task : task, tasks);
    if (job->partials && !status)
        for (size_t row = 0; row < rows; row++)
            for (size_t j = 0; j < side_of(job, row); j++) {
                Partial *first = job->partials + row * job->tasks_per_row * side + j, all = first[0];
                for (size_t i = 1; i < job->tasks_per_row; i++)
                    join(is_exact(job), &all, &first[i * side]);
                put_row(job, row / strips_of(job) * job->width + row % strips_of(job) * SIDE + j, all);
            }
    if (job->partials && job->weights && !status)
        status = each_task(job, api, context, gradient_task, tasks);
    if (later && !status)
        status = compute_job(later, api, context);
    free(job->partials);
    free(job->weights);
    return status;
}
