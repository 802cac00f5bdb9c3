/* What of ONNX Runtime's C interface the operators use.
 *
 * Its table of functions only ever grows at its end, so that an entry is known by its place in it;
 * the places and the layouts are those of onnxruntime_c_api.h, version 17 and later.
 * Source: the documentation of onnxruntime_c_api.h.
 */
#pragma once
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

enum { ORT_API = 17, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_INT64 = 7, ORT_BOOL = 9, ORT_FLOAT16 = 10, ORT_DOUBLE = 11, ORT_BFLOAT16 = 16, ORT_ANY = 0 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtShapeInfo OrtShapeInfo;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef void *const OrtApi;

typedef struct {
    OrtApi *(*get_api)(uint32_t version);
    const char *(*version)(void);
} OrtApiBase;

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*create_kernel)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *);
    const char *(*name)(const OrtCustomOp *);
    const char *(*provider)(const OrtCustomOp *);
    int (*input_type)(const OrtCustomOp *, size_t);
    size_t (*input_count)(const OrtCustomOp *);
    int (*output_type)(const OrtCustomOp *, size_t);
    size_t (*output_count)(const OrtCustomOp *);
    void (*compute)(void *, OrtKernelContext *);
    void (*destroy)(void *);
    int (*input_kind)(const OrtCustomOp *, size_t);
    int (*output_kind)(const OrtCustomOp *, size_t);
    int (*input_memory)(const OrtCustomOp *, size_t);
    int (*variadic_input_least)(const OrtCustomOp *);
    int (*variadic_input_alike)(const OrtCustomOp *);
    int (*variadic_output_least)(const OrtCustomOp *);
    int (*variadic_output_alike)(const OrtCustomOp *);
    OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
    OrtStatus *(*infer_shape)(const OrtCustomOp *, OrtShapeInferContext *);
    int (*first_version)(const OrtCustomOp *);
    int (*last_version)(const OrtCustomOp *);
    size_t (*may_inplace)(int **, int **);
    void (*release_may_inplace)(int *, int *);
    size_t (*aliases)(int **, int **);
    void (*release_aliases)(int *, int *);
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void *), "the layout of OrtCustomOp");

/* ORT(place, type of the result, types of the arguments)(arguments) */
#define ORT(place, result, ...) ((result(*)(__VA_ARGS__))api[place])
#define ort_error(code, text) ORT(0, OrtStatus *, int, const char *)(code, text)
#define ort_create_domain(name, out) \
    ORT(26, OrtStatus *, const char *, OrtCustomOpDomain **)(name, out)
#define ort_domain_add(domain, op) \
    ORT(27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)(domain, op)
#define ort_add_domain(options, domain) \
    ORT(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)(options, domain)
#define ort_data(value, out) ORT(51, OrtStatus *, OrtValue *, void **)(value, out)
#define ort_new_info(out) ORT(57, OrtStatus *, OrtShapeInfo **)(out)
#define ort_set_type(info, type) ORT(58, OrtStatus *, OrtShapeInfo *, int)(info, type)
#define ort_set_dims(info, dims, rank) \
    ORT(59, OrtStatus *, OrtShapeInfo *, const int64_t *, size_t)(info, dims, rank)
#define ort_type(info, out) ORT(60, OrtStatus *, const OrtShapeInfo *, int *)(info, out)
#define ort_rank(info, out) ORT(61, OrtStatus *, const OrtShapeInfo *, size_t *)(info, out)
#define ort_dims(info, dims, rank) \
    ORT(62, OrtStatus *, const OrtShapeInfo *, int64_t *, size_t)(info, dims, rank)
#define ort_names(info, names, rank) \
    ORT(63, OrtStatus *, const OrtShapeInfo *, const char **, size_t)(info, names, rank)
#define ort_info(value, out) \
    ORT(65, OrtStatus *, const OrtValue *, OrtShapeInfo **)(value, out)
#define ort_float_attribute(info, name, out) \
    ORT(85, OrtStatus *, const OrtKernelInfo *, const char *, float *)(info, name, out)
#define ort_input(context, index, out) \
    ORT(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)(context, index, out)
#define ort_output(context, index, dims, rank, out) \
    ORT(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)( \
        context, index, dims, rank, out)
#define ort_release_status(status) ORT(93, void, OrtStatus *)(status)
#define ort_release_info(info) ORT(99, void, OrtShapeInfo *)(info)
#define ort_stream(context, out) \
    ORT(193, OrtStatus *, const OrtKernelContext *, void **)(context, out)
#define ort_inferred_input(context, index, out) \
    ORT(268, OrtStatus *, const OrtShapeInferContext *, size_t, OrtShapeInfo **)(context, index, out)
#define ort_infer_output(context, index, info) \
    ORT(270, OrtStatus *, const OrtShapeInferContext *, size_t, const OrtShapeInfo *)( \
        context, index, info)
#define ort_set_names(info, names, rank) \
    ORT(271, OrtStatus *, OrtShapeInfo *, const char **, size_t)(info, names, rank)
#define ort_parallel_for(context, each, count, batches, data) \
    ORT(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, \
        void *)(context, each, count, batches, data)
