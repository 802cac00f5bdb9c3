/* As much of CUDA as smooth_l1.cu needs, on the CPU: its kernels as they are, one block at a time.
 *
 * Each thread of a block is a context of its own, and runs on to the next barrier or to its end
 * before the one after it does: what reads behind a missing barrier reads what isn't there yet.
 */
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <mutex>

#define __host__
#define __device__
#define __global__
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

typedef enum { cudaSuccess, cudaErrorInvalidDevice } cudaError_t;
typedef void *cudaStream_t;
typedef void *cudaMemPool_t;
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice, cudaMemPoolAttrReleaseThreshold };

struct dim3 {
    unsigned x = 1;
    dim3(unsigned size = 1) : x(size) {}
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};
struct cudaMemPoolProps {
    int allocType;
    struct { int type, id; } location;
};

static dim3 threadIdx, blockIdx;

namespace host {
constexpr unsigned THREADS_AT_MOST = 1024;
constexpr size_t STACK = 1 << 16;
inline ucontext_t between, threads[THREADS_AT_MOST];
inline bool is_done[THREADS_AT_MOST];
inline void (*body)(const void *);
inline const void *argument;
inline std::mutex one_grid;

inline void enter() {
    body(argument);
    is_done[threadIdx.x] = true;
}

inline void run(unsigned blocks, unsigned size) {
    static char *stacks = (char *)malloc(THREADS_AT_MOST * STACK);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (unsigned i = 0; i < size; i++) {
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = stacks + i * STACK;
            threads[i].uc_stack.ss_size = STACK;
            threads[i].uc_link = &between;
            makecontext(&threads[i], enter, 0);
            is_done[i] = false;
        }
        for (bool goes_on = true; goes_on;) {
            goes_on = false;
            for (threadIdx.x = 0; threadIdx.x < size; threadIdx.x++)
                if (!is_done[threadIdx.x]) {
                    swapcontext(&between, &threads[threadIdx.x]);
                    goes_on |= !is_done[threadIdx.x];
                }
        }
    }
}
} // namespace host

inline void __syncthreads() { swapcontext(&host::threads[threadIdx.x], &host::between); }

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Argument), const Argument &given) {
    struct Call {
        void (*kernel)(Argument);
        const Argument &given;
    } call = {kernel, given};
    std::lock_guard<std::mutex> lock(host::one_grid);
    host::argument = &call;
    host::body = [](const void *at) { ((const Call *)at)->kernel(((const Call *)at)->given); };
    host::run(config->gridDim.x, config->blockDim.x);
    return cudaSuccess;
}

inline const char *cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) {
    return *pool = malloc(1), cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void *) { return cudaSuccess; }
inline cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return free(pool), cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void **out, size_t bytes, cudaMemPool_t, cudaStream_t) {
    *out = malloc(bytes);
    memset(*out, 0xff, bytes); /* NaN, for whoever reads what nobody wrote */
    return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void *at, cudaStream_t) { return free(at), cudaSuccess; }
