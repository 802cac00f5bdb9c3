/* The operators of the domain `smoothl1_deploy` as ONNX Runtime calls them.
 *
 * An operator's name says what it computes (graph/_functions.py makes the same names):
 *     [Weighted][Smooth]L1Loss[Row][Sum|Mean|Average][At][Gradient[Upstream]][Float16|BFloat16|Float64]
 * Without Smooth beta is 0; Average divides by the sum of the weights; At takes beta as an input, not as
 * an attribute; Gradient has a second output, the gradient of each element; Upstream multiplies it by
 * the last input, which has the shape of the loss.
 * The second family is for graphs that go on from what the one pass over memory finds:
 *     [Masked][Weighted](SmoothL1|Huber)Loss(Elements|Totals[AndLosses|AndDifferences]|Slopes)
 *     [Float16|BFloat16|Float64]
 * of input, target, weight, mask and beta, in this order; all broadcast, and what isn't selected by the mask
 * is as if it weren't there. Elements gives each loss; Totals, over the axes that its last input names, the
 * sum of the losses, how many they are and, Weighted, the sum of their weights, as float64, and then each
 * loss or difference; Slopes each gradient, times its last input, what flows in, as float64.
 * Any broadcast of at most 64 axes.
 */
#include <stdio.h>
#include <stdlib.h>

#include "job.h"

typedef struct {
    const Operator *op;
    OrtApi *api;
    float beta;
} Kernel;

static OrtApi *inferring; /* the interface while shapes are inferred, where none is handed over */

typedef struct {
    int64_t dims[AXES];
    size_t rank;
} Dims;

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

static size_t elements_of(const Dims *dims) {
    size_t count = 1;
    for (size_t axis = 0; axis < dims->rank; axis++)
        count *= (size_t)dims->dims[axis];
    return count;
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

/* Whether the space, as it is, has the elements of another operand. */
static bool broadcasts_to(const Space *space, const Dims *dims) {
    if (dims->rank > space->rank)
        return false;
    for (size_t axis = 0; axis < dims->rank; axis++) {
        int64_t size = dims->dims[axis];
        if (size != 1 && size != space->dims[space->rank - dims->rank + axis])
            return false;
    }
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

/* Puts the axes that are reduced behind those that are kept, but for the last kept ones: those lie side by
 * side in memory, and so do their sums. `kept` becomes the shape of the result. */
static OrtStatus *read_axes(OrtApi *api, const OrtKernelContext *context, size_t index, Job *job, Dims *kept,
                            Operand **operands, size_t inputs) {
    Operand given;
    Dims dims;
    Space *space = &job->space;
    bool is_reduced[AXES] = {false}, is_moved = false;
    size_t order[AXES], suffix = space->rank, at = 0, steps[AXES];
    TRY(read_operand(api, context, index, &given, &dims));
    const int64_t *axes = (const void *)given.data;
    for (size_t i = 0; i < elements_of(&dims); i++) {
        if (axes[i] < 0 || axes[i] >= (int64_t)space->rank)
            return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: an axis that the elements haven't");
        is_reduced[axes[i]] = true;
    }
    job->rows = job->columns = job->width = 1;
    while (suffix > 0 && (!is_reduced[suffix - 1] || space->dims[suffix - 1] == 1))
        suffix--;
    size_t *const sizes_of[] = {&job->rows, &job->columns, &job->width};
    for (int pass = 0; pass < 3; pass++)
        for (size_t axis = 0; axis < space->rank; axis++)
            if ((axis >= suffix ? 2 : is_reduced[axis]) == pass) {
                order[at++] = axis;
                *sizes_of[pass] *= (size_t)space->dims[axis];
            }
    if (!job->width)
        job->rows = 0, job->width = 1;
    int64_t sizes[AXES];
    kept->rank = 0;
    for (size_t axis = 0; axis < space->rank; axis++) {
        if (!is_reduced[axis])
            kept->dims[kept->rank++] = space->dims[axis];
        sizes[axis] = space->dims[order[axis]];
        is_moved |= order[axis] != axis;
    }
    memcpy(space->dims, sizes, space->rank * sizeof *sizes);
    for (size_t i = 0; i < inputs && is_moved; i++) {
        memcpy(steps, operands[i]->steps, sizeof steps);
        for (size_t axis = 0; axis < space->rank; axis++)
            operands[i]->steps[axis] = steps[order[axis]];
        operands[i]->is_whole = false;
    }
    return NULL;
}

static OrtStatus *read_beta(OrtApi *api, const OrtKernelContext *context, size_t index, Job *job) {
    Operand beta;
    Dims dims;
    TRY(read_operand(api, context, index, &beta, &dims));
    if (elements_of(&dims) != 1 || (beta.type != ORT_FLOAT && beta.type != ORT_DOUBLE))
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: beta must be one float32 or float64");
    job->beta_input = beta.data;
    job->beta_type = beta.type;
    return NULL;
}

/* Whether one of the betas is none: negative or NaN, or of a Huber loss 0. */
static bool has_no_beta(const Operand *betas, size_t count, bool is_huber) {
    for (size_t i = 0; i < count; i++) {
        double beta = betas->type == ORT_DOUBLE ? ((const double *)betas->data)[i]
                                                : (double)((const float *)betas->data)[i];
        if (!(beta > 0 || (beta == 0 && !is_huber)))
            return true;
    }
    return false;
}

/* The axes that elements are gone through along, each in one go where they lie so, but for those of totals
 * all of one sum. */
static void settle_axes(Job *job, Operand **operands, size_t inputs) {
    if (job->op->form != TOTALS) {
        job->rows = job->op->by_row ? (size_t)job->space.dims[0] : 1;
        job->columns = job->width = 1;
        for (size_t axis = job->op->by_row; axis < job->space.rank; axis++)
            job->columns *= (size_t)job->space.dims[axis];
    }
    join_axes(&job->space, operands, inputs);
    job->is_direct = true;
    for (size_t i = 0; i < inputs; i++)
        job->is_direct &= operands[i]->is_whole && operands[i]->size != 2;
}

static size_t input_count(const OrtCustomOp *ort) {
    const Operator *op = (const Operator *)ort;
    return op->is_total ? 1
                        : 2 + (size_t)op->is_weighted + (size_t)op->is_masked + (size_t)op->takes_beta +
                              (size_t)(op->takes_upstream || op->form == TOTALS || op->form == SLOPES);
}

static size_t output_count(const OrtCustomOp *ort) {
    const Operator *op = (const Operator *)ort;
    size_t sums = op->form == TOTALS ? 2 + (size_t)op->is_weighted : 1;
    return sums + (size_t)op->gives_gradient + (size_t)(op->beside != NOTHING);
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    const Kernel *kernel = state;
    const Operator *op = kernel->op;
    OrtApi *api = kernel->api;
    Job job = {.op = op, .beta_attribute = kernel->beta};
    Operand mask, betas, *operands[6] = {&job.input, &job.target};
    Dims dims[6];
    size_t inputs = op->is_total ? 1 : 2;
    if (op->is_weighted)
        operands[inputs++] = &job.weight;
    if (op->is_masked)
        operands[inputs++] = &mask, job.mask = &mask;
    if (op->form)
        operands[inputs++] = &betas;
    for (size_t i = 0; i < inputs; i++)
        TRY(read_operand(api, context, i, operands[i], &dims[i]));
    if (!broadcast(&job.space, dims, inputs))
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: the inputs can't be broadcast to one shape");
    if (op->form && elements_of(&dims[inputs - 1]) == 1) /* which is no operand of each element */
        job.beta_input = betas.data, job.beta_type = betas.type, inputs--;
    else if (op->form)
        job.betas = &betas;
    static const float no_beta = NAN;
    if (job.betas && !job.space.count && has_no_beta(&betas, elements_of(&dims[inputs - 1]), op->is_huber))
        job.beta_input = &no_beta, job.beta_type = ORT_FLOAT, job.betas = NULL, inputs--;
    if (op->form == SLOPES) {
        operands[inputs] = &job.upstream;
        TRY(read_operand(api, context, input_count(&op->ort) - 1, &job.upstream, &dims[inputs]));
        if (!broadcasts_to(&job.space, &dims[inputs++]))
            return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: what flows in hasn't the elements' shape");
    }
    for (size_t i = 0; i < inputs; i++)
        set_steps(&job.space, &dims[i], operands[i]);
    size_t rank = op->reduction == NONE ? job.space.rank : op->by_row;
    Dims kept;
    memcpy(kept.dims, job.space.dims, sizeof kept.dims);
    Operator alone;
    Job each;
    Operand each_mask, each_betas, *each_operands[6];
    if (op->beside) {
        alone = *op, each = job, each_mask = mask, each_betas = betas;
        alone.form = ELEMENTS, alone.reduction = NONE;
        each.op = &alone;
        for (size_t i = 0; i < inputs; i++) /* the same in the copies */
            each_operands[i] = operands[i] == &mask         ? (each.mask = &each_mask, &each_mask)
                               : operands[i] == &betas      ? (each.betas = &each_betas, &each_betas)
                               : operands[i] == &job.weight ? &each.weight
                               : i                          ? &each.target
                                                            : &each.input;
    }
    if (op->form == TOTALS) {
        TRY(read_axes(api, context, input_count(&op->ort) - 1, &job, &kept, operands, inputs));
        rank = kept.rank;
    }
    if (op->takes_beta && !op->form)
        TRY(read_beta(api, context, inputs, &job));

    if (op->takes_upstream) {
        TRY(read_operand(api, context, inputs + op->takes_beta, &job.upstream, &dims[3]));
        size_t wanted = op->reduction == NONE ? job.space.count : 1;
        if (op->by_row && job.space.rank)
            wanted = (size_t)job.space.dims[0];
        if (elements_of(&dims[3]) != wanted)
            return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: grad_output hasn't the loss's shape");
        job.upstream.is_whole = true;
    }

    if (op->by_row && !job.space.rank)
        return ort_error(ORT_INVALID_ARGUMENT, "smoothl1_deploy: per sample, and the inputs have rank 0");
    OrtValue *out;
    TRY(ort_output(context, 0, kept.dims, rank, &out));
    TRY(ort_data(out, (void **)&job.out));
    if (op->gives_gradient) {
        TRY(ort_output(context, 1, job.space.dims, job.space.rank, &out));
        TRY(ort_data(out, (void **)&job.gradient));
    }
    for (size_t i = 1; op->form == TOTALS && i < 2 + (size_t)op->is_weighted; i++) {
        TRY(ort_output(context, i, kept.dims, rank, &out));
        TRY(ort_data(out, (void **)(i == 1 ? &job.selected : &job.weight_sums)));
    }
    if (op->beside) {
        TRY(ort_output(context, output_count(&op->ort) - 1, each.space.dims, each.space.rank, &out));
        TRY(ort_data(out, (void **)&each.out));
        settle_axes(&each, each_operands, inputs);
        job.each = &each;
    }
    settle_axes(&job, operands, inputs);
    return compute_job(&job, api, context);
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
static const char *get_provider(const OrtCustomOp *ort) { (void)ort; return execution_provider; }
static int input_type(const OrtCustomOp *ort, size_t index) {
    const Operator *op = (const Operator *)ort;
    size_t place = 2 + (size_t)op->is_weighted + (size_t)op->is_masked; /* of beta */
    bool is_beta = op->takes_beta && index == place;
    if (op->is_masked && index == place - 1)
        return ORT_BOOL;
    if (op->form && index > place)
        return op->form == SLOPES ? ORT_DOUBLE : ORT_INT64;
    if (op->form && is_beta && op->type == ORT_DOUBLE)
        return ORT_DOUBLE;
    if (is_beta && op->type != ORT_DOUBLE)
        return ORT_FLOAT; /* of any type, each session would take longer to open */
    return is_beta || op->is_total ? ORT_ANY : op->type;
}
static int output_type(const OrtCustomOp *ort, size_t index) {
    const Operator *op = (const Operator *)ort;
    bool is_sum = op->form == TOTALS && (!op->beside || index + 1 < output_count(ort));
    return op->is_total || is_sum ? ORT_DOUBLE : op->type;
}
/* Shapes are told where every size or name is certain. Of an axis of two names, of which either may
 * be 1, nothing is; nor of an input of rank 0, which is also how one of any rank looks here: a beta is
 * taken at its word, as it nearly always has rank 0. */
static OrtStatus *infer(const OrtCustomOp *ort, OrtShapeInferContext *context) {
    const Operator *op = (const Operator *)ort;
    OrtApi *api = inferring;
    const char *names[AXES], *axis_names[AXES];
    int64_t sizes[AXES], axis_sizes[AXES];
    size_t rank, widest = 0, inputs = op->is_total ? 0 : op->is_weighted ? 3 : 2;
    bool is_certain = op->form != TOTALS;
    if (op->form)
        inputs += 1 + (size_t)op->is_masked;
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
        is_certain = !status && (0 < rank || (op->form && i == inputs - 1)) && rank <= AXES;
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

static Operator operators[512];
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
                if (has_kernel(&op))
                    add_operator(op);
            }
    for (int type = 0; type < 4; type++)
        for (int form = 0; form < 5; form++)
            for (int flags = 0; flags < 8; flags++) {
                static const struct { const char *name; Form form; Beside beside; } forms[] = {
                    {"Elements", ELEMENTS, NOTHING}, {"Slopes", SLOPES, NOTHING}, {"Totals", TOTALS, NOTHING},
                    {"TotalsAndLosses", TOTALS, LOSSES}, {"TotalsAndDifferences", TOTALS, DIFFERENCES}};
                Operator op = {.form = forms[form].form, .beside = forms[form].beside,
                               .type = types[type].type, .takes_beta = true, .is_masked = flags & 1,
                               .is_weighted = flags & 2, .is_huber = flags & 4};
                op.reduction = op.form == TOTALS ? SUM : NONE;
                snprintf(op.name, sizeof op.name, "%s%s%sLoss%s%s", op.is_masked ? "Masked" : "",
                         op.is_weighted ? "Weighted" : "", op.is_huber ? "Huber" : "SmoothL1",
                         forms[form].name, types[type].name);
                if (has_kernel(&op))
                    add_operator(op);
            }
    add_operator((Operator){.name = "WideSum", .reduction = SUM, .type = ORT_FLOAT, .is_total = true});
    add_operator((Operator){.name = "WideMean", .reduction = MEAN, .type = ORT_FLOAT, .is_total = true});
}

/* The name of an operator, counted from 0; NULL behind the last. */
__attribute__((visibility("default"))) const char *smoothl1_deploy_operator(size_t number) {
    return number < operator_count ? operators[number].name : NULL;
}

/* What ONNX Runtime calls when the library is registered with a session's options. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
    static OrtCustomOpDomain *domain; /* of every session; made once, and as long as the process */
    OrtApi *api = base->get_api(ORT_API);
    if (!api)
        return NULL; /* older than 1.17: its sessions run the bodies */
    TRY(check_device(api));
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
