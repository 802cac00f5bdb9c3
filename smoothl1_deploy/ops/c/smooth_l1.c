/* The operators on the CPU: one pass over the inputs.
 *
 * A file of the route `function` is one node of the domain `smoothl1_deploy`, and carries its body.
 * Where this library is registered ONNX Runtime runs its kernels instead.
 *
 * Sums are added up in a fixed order, in runs of RUN elements whatever the number of threads: the
 * same bits for each of them.
 */
#include <stdio.h>
#include <stdlib.h>

#include "job.h"

#define RUN ((size_t)1 << 15) /* elements of one task, of which a sum has one partial */
#define BLOCK ((size_t)1 << 10) /* elements that are widened or repeated at a time */
#define THREADED ((size_t)1 << 18) /* elements from which threads gain more than they cost */
#define STREAMED ((size_t)1 << 22) /* outputs from which the cache had better keep the inputs */

typedef struct {
    double lanes[16], rests[16], weights[16];
} Sum;

typedef struct {
    void (*each_f)(const float *, const float *, const float *, size_t, const Beta *, float *);
    void (*each_d)(const double *, const double *, const double *, size_t, const Beta *, double *);
    void (*sum_f)(const float *, const float *, const float *, size_t, const Beta *, Sum *);
    void (*sum_d)(const double *, const double *, const double *, size_t, const Beta *, Sum *);
    void (*total_f)(const float *, size_t, Sum *);
    void (*total_d)(const double *, size_t, Sum *);
    void (*widen_half)(const uint16_t *, size_t, float *);
    void (*widen_bfloat)(const uint16_t *, size_t, float *);
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
#define LESSER(a, b) (vd_v2)_mm_min_pd((__m128d)(a), (__m128d)(b))
#pragma GCC push_options
#pragma GCC target("sse4.2")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v3
#define VECTOR_BYTES 32
#define WIDEN(x) (vd_v3)_mm256_cvtps_pd((__m128)(x))
#define LESSER(a, b) (vd_v3)_mm256_min_pd((__m256d)(a), (__m256d)(b))
#pragma GCC push_options
#pragma GCC target("avx2")
#include "loops.h"
#pragma GCC pop_options

#define ISA(name) name##_v4
#define VECTOR_BYTES 64
#define WIDEN(x) (vd_v4)_mm512_cvtps_pd((__m256)(x))
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
#define LESSER(a, b) SELECT((a) < (b), a, b, vd, vl)
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

static Partial folded(Sum *sum, bool is_double) {
    for (size_t step = 8; step; step /= 2)
        for (size_t i = 0; i < step; i++) {
            if (is_double) {
                two_sum(&sum->lanes[i], &sum->rests[i], sum->lanes[i + step]);
                sum->rests[i] += sum->rests[i + step];
            } else
                sum->lanes[i] += sum->lanes[i + step];
            sum->weights[i] += sum->weights[i + step];
        }
    return (Partial){sum->lanes[0], sum->rests[0], sum->weights[0]};
}

static void put_row(const Job *job, size_t row, Partial found) {
    put(job->op, job->out, row, result_of(job->op, &job->beta, job->columns, &found));
}

/* Adds `count` elements, in the dtype that is computed in, to `sum`. */
static void add(const Job *job, const void *input, const void *target, const void *weight,
                size_t count, Sum *sum) {
    if (job->op->is_total && job->input.type == ORT_DOUBLE)
        loops->total_d(input, count, sum);
    else if (job->op->is_total)
        loops->total_f(input, count, sum);
    else if (job->op->type == ORT_DOUBLE)
        loops->sum_d(input, target, weight, count, &job->beta, sum);
    else
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
    return folded(&sum, job->op->type == ORT_DOUBLE);
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
            put_row(job, row + i, folded(&sum, job->op->type == ORT_DOUBLE));
        }
    }
}

static void each_block(const Job *job, size_t start, size_t count, uint64_t (*buffers)[BLOCK]) {
    int type = job->op->type;
    bool is_half = size_of(type) == 2;
    char *to = job->out + start * size_of(type);
    const char *at[3];
    fetch(job, start, count, buffers, at);
    void *losses = is_half || job->is_streamed ? (void *)buffers[3] : to, *result = losses;
    if (type == ORT_DOUBLE)
        loops->each_d((const void *)at[0], (const void *)at[1], (const void *)at[2], count,
                      &job->beta, losses);
    else
        loops->each_f((const void *)at[0], (const void *)at[1], (const void *)at[2], count,
                      &job->beta, losses);
    if (is_half) {
        result = job->is_streamed ? (void *)buffers[0] : to;
        (type == ORT_FLOAT16 ? loops->narrow_half : loops->narrow_bfloat)(losses, count, result);
    }
    if (job->is_streamed)
        stream(to, result, count * size_of(type));
}

static void task(void *data, size_t number) {
    const Job *job = data;
    if (job->op->reduction == NONE) {
        uint64_t buffers[4][BLOCK];
        size_t end = (number + 1) * RUN < job->space.count ? (number + 1) * RUN : job->space.count;
        for (size_t start = number * RUN; start < end; start += BLOCK)
            each_block(job, start, end - start < BLOCK ? end - start : BLOCK, buffers);
        if (job->is_streamed)
            end_stream();
    } else if (job->tasks_per_row > 1) {
        size_t row = number / job->tasks_per_row, start = number % job->tasks_per_row * RUN;
        size_t count = job->columns - start < RUN ? job->columns - start : RUN;
        job->partials[number] = added(job, row * job->columns + start, count);
    } else {
        size_t first = number * job->rows_per_task, end = first + job->rows_per_task;
        if (end > job->rows)
            end = job->rows;
        if (0 < job->columns && job->columns <= BLOCK)
            add_rows(job, first, end);
        else
            for (size_t row = first; row < end; row++)
                put_row(job, row, added(job, row * job->columns, job->columns));
    }
}

const char *const execution_provider = NULL;

OrtStatus *check_device(OrtApi *api) { (void)api; return NULL; }

OrtStatus *compute_job(Job *job, OrtApi *api, OrtKernelContext *context) {
    size_t tasks;
    job->beta = beta_of(job);
    job->is_streamed = job->op->reduction == NONE && job->space.count >= STREAMED && !((uintptr_t)job->out & 15);
    if (job->op->reduction == NONE)
        tasks = (job->space.count + RUN - 1) / RUN;
    else {
        job->tasks_per_row = job->columns > RUN ? (job->columns + RUN - 1) / RUN : 1;
        job->rows_per_task = job->columns ? RUN / job->columns : RUN;
        job->rows_per_task += !job->rows_per_task;
        tasks = job->tasks_per_row > 1 ? job->rows * job->tasks_per_row
                                       : (job->rows + job->rows_per_task - 1) / job->rows_per_task;
        if (job->tasks_per_row > 1 && !(job->partials = malloc(tasks * sizeof *job->partials)))
            return ort_error(ORT_FAIL, "smoothl1_deploy: out of memory");
    }
    OrtStatus *status = NULL;
    if (job->space.count >= THREADED && tasks > 1)
        status = ort_parallel_for(context, task, tasks, 0, job);
    else
        for (size_t i = 0; i < tasks; i++)
            task(job, i);
    if (job->partials && !status)
        for (size_t row = 0; row < job->rows; row++) {
            Partial *first = job->partials + row * job->tasks_per_row, all = first[0];
            for (size_t i = 1; i < job->tasks_per_row; i++)
                join(job->op, &all, &first[i]);
            put_row(job, row, all);
        }
    free(job->partials);
    return status;
}
