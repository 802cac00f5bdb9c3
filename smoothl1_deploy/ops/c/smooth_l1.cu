/* The operators by CUDA: one pass over the inputs, on the stream of ONNX Runtime's provider.
 *
 * A sum's bits depend on the shapes alone: its elements go to threads and blocks in an order that no
 * device changes, and nothing is added atomically. No product is fused with a sum (-fmad=false) but
 * where `fmaf` says so: the losses of `none` have the bits of the file's own body.
 *
 * No card has run this yet. The tests run these very kernels on the CPU (tests/ops/host).
 */
#include <cuda_runtime.h>
#include <stdio.h>

#include "job.h"

#define THREADS 256 /* of a block */
#define AHEAD 8 /* elements that a thread reads before it computes with the first */
#define RUN ((size_t)THREADS * 32) /* elements of one block, of which a longer row has one partial */
#define DEVICES 64

#define DEVICE __device__ static inline

/* What a kernel is given: by value, as the device can't read the host's memory. */
struct Work {
    Job job;
    Operator op;
};
static_assert(sizeof(Work) <= 4096, "what CUDA's older drivers pass to a kernel");

template <int TYPE> struct Computed { using Number = float; };
template <> struct Computed<ORT_DOUBLE> { using Number = double; };
template <int TYPE> using Number = typename Computed<TYPE>::Number;

template <class Index> DEVICE size_t offset_as(const Operand *from, const Space *space, Index index) {
    size_t offset = 0;
    for (size_t axis = space->axes - 1; axis > 0; axis--) {
        Index size = (Index)space->sizes[axis];
        offset += index % size * from->steps[axis];
        index /= size;
    }
    return offset + index * from->steps[0];
}

/* Where an element lies. Not inlined 24 times into each kernel, which takes ptxas seconds. */
__device__ __noinline__ static size_t offset_of(const Operand *from, const Space *space, size_t index) {
    if (from->is_whole)
        return index;
    return space->count >> 32 ? offset_as<size_t>(from, space, index) /* a slow division */
                              : offset_as<uint32_t>(from, space, (uint32_t)index);
}

/* An element in the dtype that is computed in; 0 of an operand that the operator has not. */
template <int TYPE, bool WHOLE>
DEVICE Number<TYPE> element(const Operand *from, const Space *space, size_t index) {
    if (!from->data)
        return 0;
    if (!WHOLE)
        index = offset_of(from, space, index);
    if constexpr (TYPE == ORT_FLOAT || TYPE == ORT_DOUBLE)
        return ((const Number<TYPE> *)(const void *)from->data)[index];
    else {
        uint16_t half = ((const uint16_t *)(const void *)from->data)[index];
        if (TYPE == ORT_BFLOAT16)
            return float_of((uint32_t)half << 16);
#ifdef __CUDA_ARCH__ /* one instruction where half_to_float is ten */
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
        return wide;
#else
        return half_to_float(half);
#endif
    }
}

/* AHEAD elements of each input from `first`, a `stride` apart, of those before `end`. */
template <int TYPE, bool WHOLE> struct Ahead {
    Number<TYPE> input[AHEAD], target[AHEAD], weight[AHEAD];

    __device__ Ahead(const Job *job, size_t first, size_t end, size_t stride) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * stride < end) {
                input[i] = element<TYPE, WHOLE>(&job->input, &job->space, first + i * stride);
                target[i] = element<TYPE, WHOLE>(&job->target, &job->space, first + i * stride);
                weight[i] = element<TYPE, WHOLE>(&job->weight, &job->space, first + i * stride);
            }
    }
};

/* The loss of one element as the file's own body has it. */
template <class Real> DEVICE Real loss_of(Real d, Real beta, Real divisor) {
    Real core = d > beta ? beta : d < -beta ? -beta : d;
    return fabs(d - core) + ((Real)0.5 * core) * (core / divisor);
}

template <int TYPE, bool WHOLE>
__global__ void __launch_bounds__(THREADS) each(const __grid_constant__ Work work) {
    const Job *job = &work.job;
    const Beta beta = beta_of(job);
    size_t first = (size_t)blockIdx.x * THREADS * AHEAD + threadIdx.x;
    Ahead<TYPE, WHOLE> given(job, first, job->space.count, THREADS);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        size_t index = first + (size_t)i * THREADS;
        if (index >= job->space.count)
            return;
        Number<TYPE> loss = loss_of<Number<TYPE>>(given.input[i] - given.target[i],
                                                  (Number<TYPE>)beta.value, (Number<TYPE>)beta.divisor);
        if (job->weight.data)
            loss *= given.weight[i];
        if constexpr (TYPE == ORT_FLOAT || TYPE == ORT_DOUBLE)
            ((Number<TYPE> *)(void *)job->out)[index] = loss;
        else
            ((uint16_t *)(void *)job->out)[index] =
                TYPE == ORT_FLOAT16 ? float_to_half(loss) : float_to_bfloat(loss);
    }
}

/* Numbers that a thread adds up in two float32, the sum and what its additions rounded off (Knuth's
 * TwoSum); those that need more range in a float64. Many cards have one unit for float64 where they
 * have 64 for float32. */
struct Narrow {
    static constexpr float LEAST = 0x1p-90f, MOST = 0x1p100f; /* what a product rounds off is kept */
    float sum = 0, rest = 0;
    double wide = 0;

    __device__ void add(float term, float low) {
        float whole = sum + term, part = whole - sum;
        rest += ((sum - (whole - part)) + (term - part)) + low;
        sum = whole;
    }
    __device__ double total() const { return (double)sum + (double)rest; }
};

/* Beta times each loss, as the CPU's kernels add it up in float64: core * (distance - core / 2) with
 * core = min(distance, beta). Here of distance and beta times a power of two that makes beta 1 to 2:
 * as a float32 and what that rounds off, but where they are too far apart, in float64. */
template <int TYPE> class Sum {
    Narrow losses, weights;
    double beta, down; /* the scale's square, undone */
    float scaled, up;

  public:
    __device__ explicit Sum(const Beta *given) : beta(given->value) {
        int exponent = 254 - (int)(bits_of((float)beta) >> 23 & 0xff); /* as a float32 has it */
        exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
        up = beta == 0 ? 1 : float_of((uint32_t)exponent << 23);
        scaled = (float)beta * up;
        down = 1 / (double)up * (1 / (double)up);
    }

    __device__ void add(const Job *job, float input, float target, float weight, bool averages) {
        float distance = job->target.data ? fabsf(input - target) : input, term = distance, low = 0;
        bool is_l1 = beta == 0, fits = fabsf(distance) <= Narrow::MOST;
        if (!is_l1) {
            float x = distance * up, core = fminf(x, scaled), half = 0.5f * core;
            float slope = x - half, slope_low = (x - slope) - half;
            term = core * slope;
            low = fmaf(core, slope, -term) + core * slope_low;
            fits = (term >= Narrow::LEAST || distance == 0) && term <= Narrow::MOST;
        }
        if (job->weight.data) {
            float product = term * weight;
            low = fmaf(term, weight, -product) + low * weight;
            fits = fits && fabsf(product) <= Narrow::MOST &&
                   (fabsf(product) >= Narrow::LEAST || term == 0 || weight == 0);
            term = product;
        }
        if (fits)
            losses.add(term, low);
        else {
            double wide = distance, core = wide < beta ? wide : beta;
            wide = is_l1 ? wide : core * (wide - 0.5 * core);
            losses.wide += job->weight.data ? wide * (double)weight : wide;
        }
        if (averages && fabsf(weight) <= Narrow::MOST)
            weights.add(weight, 0);
        else if (averages)
            weights.wide += (double)weight;
    }

    __device__ Partial found() const {
        return {losses.wide + losses.total() * down, 0, weights.wide + weights.total(), 0, 0};
    }
};

/* Float64: each loss as the body has it. */
template <> class Sum<ORT_DOUBLE> {
    Partial sum = {};
    Beta beta;

  public:
    __device__ explicit Sum(const Beta *given) : beta(*given) {}

    __device__ void add(const Job *job, double input, double target, double weight, bool) {
        double term = job->target.data ? loss_of(input - target, beta.value, beta.divisor) : input;
        two_sum(&sum.sum, &sum.rest, job->weight.data ? term * weight : term);
    }

    __device__ Partial found() const { return sum; }
};

/* Adds up what the threads of each team found, in a fixed order; true for the one that has it. */
DEVICE bool fold_team(bool is_double, Partial *found, unsigned team) {
    unsigned lane = threadIdx.x % team;
    for (unsigned step = team / 2; step; step /= 2) {
        __syncthreads();
        if (lane < step)
            join(is_double, &found[threadIdx.x], &found[threadIdx.x + step]);
    }
    return lane == 0;
}

DEVICE void put_row(const Work *work, size_t row, const Partial *found) {
    const Beta beta = beta_of(&work->job);
    put(&work->op, work->job.out, row, result_of(&work->op, &beta, work->job.columns, found));
}

/* A block has a run of a long row, or several rows and for each a team of threads. */
template <int TYPE, bool WHOLE>
__global__ void __launch_bounds__(THREADS) sums(const __grid_constant__ Work work) {
    __shared__ Partial found[THREADS];
    const Job *job = &work.job;
    const Beta beta = beta_of(job);
    bool is_part = job->tasks_per_row > 1, averages = work.op.reduction == AVERAGE;
    unsigned team = THREADS / (unsigned)job->rows_per_task;
    size_t row = is_part ? blockIdx.x / job->tasks_per_row
                         : blockIdx.x * job->rows_per_task + threadIdx.x / team;
    size_t start = is_part ? blockIdx.x % job->tasks_per_row * RUN : 0;
    size_t end = is_part && start + RUN < job->columns ? start + RUN : job->columns;
    Sum<TYPE> sum(&beta);
    if (row < job->rows)
        for (size_t first = start + threadIdx.x % team; first < end; first += (size_t)team * AHEAD) {
            size_t shift = row * job->columns;
            Ahead<TYPE, WHOLE> given(job, shift + first, shift + end, team);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (first + (size_t)i * team < end)
                    sum.add(job, given.input[i], given.target[i], given.weight[i], averages);
        }
    found[threadIdx.x] = sum.found();
    if (!fold_team(TYPE == ORT_DOUBLE, found, team) || row >= job->rows)
        return;
    if (is_part)
        job->partials[blockIdx.x] = found[0];
    else
        put_row(&work, row, &found[threadIdx.x]);
}

/* The partials of a long row, which a block adds up. It is a kernel of its own: a counter by which
 * the last block of `sums` could know itself would have to be set to 0 by another launch before. */
__global__ void __launch_bounds__(THREADS) fold(const __grid_constant__ Work work) {
    __shared__ Partial found[THREADS];
    const Job *job = &work.job;
    const Partial *parts = job->partials + blockIdx.x * job->tasks_per_row;
    bool is_double = job->input.type == ORT_DOUBLE;
    Partial sum = {};
    for (size_t i = threadIdx.x; i < job->tasks_per_row; i += THREADS)
        join(is_double, &sum, &parts[i]);
    found[threadIdx.x] = sum;
    if (fold_team(is_double, found, THREADS))
        put_row(&work, blockIdx.x, &found[0]);
}

static cudaError_t launch(void (*kernel)(Work), size_t blocks, cudaStream_t stream, const Work &work) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    return blocks ? cudaLaunchKernelEx(&config, kernel, work) : cudaSuccess;
}

/* Memory that belongs to a stream's order, so that calls on other streams never see it: each device's
 * from a pool of ours, which keeps what is freed (the default pool gives it back whenever anyone
 * waits for the device, and asking again takes long). */
static cudaError_t allocate(void **out, size_t bytes, cudaStream_t stream) {
    static cudaMemPool_t pools[DEVICES];
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error || device >= DEVICES)
        return error ? error : cudaErrorInvalidDevice;
    cudaMemPool_t pool = __atomic_load_n(&pools[device], __ATOMIC_ACQUIRE), none = NULL;
    if (!pool) {
        cudaMemPoolProps wanted = {};
        wanted.allocType = cudaMemAllocationTypePinned;
        wanted.location.type = cudaMemLocationTypeDevice;
        wanted.location.id = device;
        uint64_t kept = UINT64_MAX;
        if ((error = cudaMemPoolCreate(&pool, &wanted)) ||
            (error = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept)))
            return error;
        if (!__atomic_compare_exchange_n(&pools[device], &none, pool, false, __ATOMIC_ACQ_REL,
                                         __ATOMIC_ACQUIRE)) {
            cudaMemPoolDestroy(pool);
            pool = none; /* what another thread made meanwhile */
        }
    }
    return cudaMallocFromPoolAsync(out, bytes, pool, stream);
}

template <int TYPE, bool WHOLE> static cudaError_t run(Work *work, cudaStream_t stream) {
    Job *job = &work->job;
    if (work->op.reduction == NONE)
        return launch(each<TYPE, WHOLE>, (job->space.count + THREADS * AHEAD - 1) / (THREADS * AHEAD),
                      stream, *work);
    job->tasks_per_row = job->columns > RUN ? (job->columns + RUN - 1) / RUN : 1;
    job->rows_per_task = THREADS;
    while (job->rows_per_task > 1 && job->columns > THREADS / job->rows_per_task * AHEAD)
        job->rows_per_task /= 2;
    if (job->tasks_per_row == 1)
        return launch(sums<TYPE, WHOLE>, (job->rows + job->rows_per_task - 1) / job->rows_per_task,
                      stream, *work);
    size_t tasks = job->rows * job->tasks_per_row;
    cudaError_t error = allocate((void **)&job->partials, tasks * sizeof(Partial), stream), freed;
    if (error)
        return error;
    error = launch(sums<TYPE, WHOLE>, tasks, stream, *work);
    if (!error)
        error = launch(fold, job->rows, stream, *work);
    freed = cudaFreeAsync(job->partials, stream);
    return error ? error : freed;
}

template <int TYPE> static cudaError_t run(Work *work, cudaStream_t stream) {
    const Job *job = &work->job;
    bool is_whole = job->input.is_whole && (!job->target.data || job->target.is_whole) &&
                    (!job->weight.data || job->weight.is_whole);
    return is_whole ? run<TYPE, true>(work, stream) : run<TYPE, false>(work, stream);
}

static OrtStatus *error_of(OrtApi *api, cudaError_t error, const char *remedy) {
    if (!error)
        return NULL;
    char text[256];
    snprintf(text, sizeof text, "smoothl1_deploy: CUDA says: %s%s", cudaGetErrorString(error), remedy);
    return ort_error(ORT_FAIL, text);
}

#ifndef PROVIDER
#define PROVIDER "CUDAExecutionProvider"
#endif
const char *const execution_provider = PROVIDER;

/* A gradient's, what would have to save a mean from the overflow of its sums, and the second family's
 * are left to bodies. */
bool has_kernel(const Operator *op) {
    return op->form == WHOLE && !op->gives_gradient && !(op->type == ORT_DOUBLE && op->reduction == AVERAGE);
}

OrtStatus *check_device(OrtApi *api) {
    int count;
    return error_of(api, cudaGetDeviceCount(&count),
                    "; these operators need a GPU, and a driver as new as the CUDA they are built by");
}

OrtStatus *compute_job(Job *job, OrtApi *api, OrtKernelContext *context) {
    cudaStream_t stream;
    TRY(ort_stream(context, (void **)&stream));
    Work work = {*job, *job->op};
    int type = job->input.type;
    cudaError_t error = type == ORT_DOUBLE    ? run<ORT_DOUBLE>(&work, stream)
                        : type == ORT_FLOAT   ? run<ORT_FLOAT>(&work, stream)
                        : type == ORT_FLOAT16 ? run<ORT_FLOAT16>(&work, stream)
                                              : run<ORT_BFLOAT16>(&work, stream);
    return error_of(api, error, "");
}
