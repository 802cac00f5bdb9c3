/* What the operators of the domain `smoothl1_deploy` are made of, whoever computes them.
 *
 * operators.c is what ONNX Runtime calls; it describes a loss as a Job, and `compute_job` does it:
 * smooth_l1.c on the CPU, smooth_l1.cu by CUDA, in which these functions run on the device too.
 */
#pragma once
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "ort.h"

#ifdef __CUDACC__
#define SHARED __host__ __device__ static inline
#else
#define SHARED static inline
#endif

#define AXES 64

#define TRY(call) \
    do { \
        OrtStatus *failed_ = (call); \
        if (failed_) \
            return failed_; \
    } while (0)

typedef struct {
    double value, divisor; /* divisor is value, or 1 for 0, or NaN for what is no beta */
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

SHARED float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SHARED uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

SHARED float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    if (bits < 1u << 23) /* subnormal */
        return float_of(sign | bits_of(float_of(bits + (113u << 23)) - float_of(113u << 23)));
    return float_of(sign | (bits + (112u << 23) * (bits < 31u << 23 ? 1 : 2)));
}

SHARED uint16_t float_to_half(float value) {
    uint32_t bits = bits_of(value), size = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (size >> 13 & 0x3ff));
    if (size >= 0x477ff000) /* rounds to more than float16 holds */
        return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) /* subnormal: added to a half, its last bit is the sum's */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13));
}

SHARED uint16_t float_to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* To the nearest float32 that a rounding to half as many bits can't tell from `value`: what is cut
 * off sets the last bit ("rounding to odd"; Boldo and Melquiond, 2008). */
SHARED float odd_float(double value) {
    float nearest = (float)value;
    if (isnan(value) || (double)nearest == value || isinf(nearest))
        return nearest;
    uint32_t bits = bits_of(nearest);
    if (fabs((double)nearest) > fabs(value))
        bits--;
    return float_of(bits | 1);
}

SHARED void two_sum(double *sum, double *rest, double term) {
    double whole = *sum + term, added = whole - *sum;
    *rest += (*sum - (whole - added)) + (term - added);
    *sum = whole;
}

/* The sign of the sum of four numbers, exactly (Shewchuk, 1997: expansions). */
SHARED int sign_of_sum(const double *terms) {
    double parts[4];
    int sign = 0;
    for (int n = 0; n < 4; n++) {
        parts[n] = terms[n];
        for (int i = 0; i < n; i++) {
            double rest = 0;
            two_sum(&parts[n], &rest, parts[i]);
            parts[i] = rest;
        }
    }
    for (int n = 0; n < 4; n++)
        sign = parts[n] > 0 ? 1 : parts[n] < 0 ? -1 : sign;
    return sign;
}

/* Of the two numbers of a half format around `value` the middle, where a rounding to it turns. */
SHARED float middle_at(float value, bool is_bfloat) {
    if (is_bfloat)
        return float_of((bits_of(value) & ~0xffffu) | 0x8000);
    if (value < 0x1p-14f) /* subnormal */
        return (floorf(value * 0x1p24f) + 0.5f) * 0x1p-24f;
    return float_of((bits_of(value) & ~0x1fffu) | 0x1000);
}

/* The loss of two numbers of a half format, to a float32 that is rounded to that format as the exact
 * loss is: on the same side of the middle. Products of two such numbers, and of beta and a middle,
 * are exact in float64. */
SHARED float settled(double input, double target, const Beta *beta, bool is_bfloat) {
    double distance = fabs(input - target), b = beta->value, core = distance < b ? distance : b;
    float near = (float)((distance - core) + 0.5 * core * (core / beta->divisor));
    if (isinf(b) || !isfinite(near))
        return near;
    double middle = middle_at(near, is_bfloat), d = input - target, sign = d < 0 ? -1 : 1;
    double beyond[] = {sign * input, -sign * target, -0.5 * b, -middle};
    double within[] = {input * input, target * target, -2 * input * target, -2 * b * middle};
    bool is_within = distance < b, is_exact = input - d == target && d + target == input;
    double found = is_within ? d * d + within[3] : distance - middle - 0.5 * b;
    if (!is_exact || d != (float)d) /* or else their square is exact, or their difference */
        found = sign_of_sum(is_within ? within : beyond);
    return float_of(bits_of((float)middle) + (uint32_t)(found > 0) - (uint32_t)(found < 0));
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

SHARED size_t size_of(int type) {
    return type == ORT_DOUBLE || type == ORT_INT64 ? 8 : type == ORT_FLOAT ? 4 : type == ORT_BOOL ? 1 : 2;
}

typedef enum { NONE, SUM, MEAN, AVERAGE } Reduction;

/* What an operator of the second family gives, for a graph to go on from; the first family's is WHOLE. */
typedef enum { WHOLE, ELEMENTS, TOTALS, SLOPES } Form;

/* What totals give of each element beside; it alone where the form is ELEMENTS. */
typedef enum { NOTHING, LOSSES, DIFFERENCES } Beside;

/* An operator of the domain, and the first field of what ONNX Runtime is given of it. */
typedef struct {
    OrtCustomOp ort;
    char name[64];
    Reduction reduction;
    bool by_row, is_weighted, takes_beta, gives_gradient, takes_upstream, is_l1;
    int type; /* of its inputs and its outputs */
    bool is_total; /* of files of version 1: the sum of numbers of any type, as a float64 */
    Form form;
    Beside beside;
    bool is_masked, is_huber;
} Operator;

/* What adds up the elements of one row: of what its tasks found. */
typedef struct {
    double sum, rest, weight, weight_rest, selected;
} Partial;

typedef struct Job {
    const Operator *op;
    Space space;
    Operand input, target, weight, upstream; /* data is NULL of those that the operator has not */
    const Operand *mask, *betas; /* NULL where every element is selected, or all have one beta */
    const void *beta_input; /* a number of beta_type, or NULL */
    int beta_type;
    float beta_attribute; /* where there is no input of it */
    Beta beta;
    Slope slope;
    size_t rows, columns; /* a sum of each row */
    size_t width; /* where it isn't 1, rows are so many sums side by side, of elements as far apart */
    size_t tasks_per_row, rows_per_task; /* one of the two is 1 */
    size_t run; /* columns of one task */
    Partial *partials; /* of each task, where a row has several */
    double *weights; /* what each row's mean was divided by, for the gradient */
    char *out, *gradient;
    double *selected, *weight_sums; /* of each row, beside its total */
    struct Job *each; /* what is given of each element beside; NULL for nothing */
    bool is_wide;     /* each element is computed in float64, with its own beta where it has one */
    bool is_undivided; /* where all have one beta, by which the sum is divided */
    bool is_direct;   /* every input is computed with where it lies */
    bool is_streamed; /* outputs as large as the inputs go past the cache */
} Job;

SHARED Beta beta_of(const Job *job) {
    const void *at = job->beta_input;
    double value = !at                            ? job->beta_attribute
                   : job->beta_type == ORT_DOUBLE ? *(const double *)at
                                                  : (double)*(const float *)at;
    if (job->input.type != ORT_DOUBLE)
        value = (double)(float)value; /* as PyTorch has it, and each loss */
    Beta beta = {value, value > 0 ? value : value == 0 ? 1 : NAN};
    return beta;
}

/* Adds what another task or thread found. */
SHARED void join(bool is_double, Partial *to, const Partial *from) {
    if (is_double) {
        two_sum(&to->sum, &to->rest, from->sum);
        two_sum(&to->weight, &to->weight_rest, from->weight);
    } else {
        to->sum += from->sum;
        to->weight += from->weight;
    }
    to->rest += from->rest;
    to->weight_rest += from->weight_rest;
    to->selected += from->selected;
}

SHARED double complete(double sum, double rest) {
    return isfinite(sum) ? sum + rest : sum; /* where the rest is NaN */
}

/* What is put in the place of one row. */
SHARED double result_of(const Operator *op, const Beta *beta, size_t columns, const Partial *found) {
    double total = complete(found->sum, found->rest);
    if (op->type != ORT_DOUBLE && !op->is_total)
        total /= beta->divisor;
    total += 0; /* a sum is never -0, and what is divided by an infinite beta may be */
    if (op->reduction == MEAN)
        total /= (double)columns;
    if (op->reduction == AVERAGE)
        total /= complete(found->weight, found->weight_rest);
    return isnan(beta->divisor) ? NAN : total;
}

SHARED void put(const Operator *op, char *out, size_t index, double value) {
    char *to = out + index * (op->is_total ? 8 : size_of(op->type));
    if (op->is_total || op->type == ORT_DOUBLE)
        *(double *)(void *)to = value;
    else if (op->type == ORT_FLOAT)
        *(float *)(void *)to = (float)value;
    else {
        float odd = odd_float(value);
        *(uint16_t *)(void *)to = op->type == ORT_FLOAT16 ? float_to_half(odd) : float_to_bfloat(odd);
    }
}

#ifdef __cplusplus
extern "C" {
#endif
/* What this library's operators run on, by ONNX Runtime's name; NULL for the CPU. */
extern const char *const execution_provider;

/* Whether this library has the operator; it leaves others to their bodies. */
bool has_kernel(const Operator *op);

/* An error where nothing can run on this machine. */
OrtStatus *check_device(OrtApi *api);

/* Fills `job->out`; `job->rows` and `job->columns` are what a reduction makes of the space. */
OrtStatus *compute_job(Job *job, OrtApi *api, OrtKernelContext *context);
#ifdef __cplusplus
}
#endif
