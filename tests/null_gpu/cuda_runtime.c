/* A stand-in for the CUDA runtime, cuBLAS and NCCL: what they are asked for is counted, not done.
 *
 * Preloaded before PyTorch's CUDA build, it lets all of PyTorch's host code run without a GPU.
 * Memory is real (address space that costs nothing until it is written to), copies between host and
 * device are real up to COPIED_BYTES, and kernels do nothing, so that all values are garbage.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

#define OK return cudaSuccess
#define COPIED_BYTES (1 << 20)

/* ---------------------------------------------------------------- counters, as in device.py */

enum counter {
  LAUNCHES, BLAS, MEMSETS, H2D_PAGEABLE, H2D_PINNED, D2H_PAGEABLE, D2H_PINNED, D2D,
  STREAM_WAITS, DEVICE_WAITS, EVENT_WAITS, ALLOCATIONS, NCCL, NUM_COUNTERS
};
static long long counts[NUM_COUNTERS];

long long null_gpu_count(int counter) { return counts[counter]; }
static int count(enum counter counter) { counts[counter]++; return 0; }

/* ---------------------------------------------------------------- memory */

enum kind { PAGEABLE, PINNED, DEVICE };
struct block { char *start; size_t size; enum kind kind; };
static struct block blocks[65536];
static int num_blocks;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void note(void *start, size_t size, enum kind kind) {
  pthread_mutex_lock(&mutex);
  if (num_blocks == sizeof blocks / sizeof *blocks) abort();
  blocks[num_blocks++] = (struct block){start, size, kind};
  pthread_mutex_unlock(&mutex);
}

static void *allocate(size_t size, enum kind kind) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *start = mmap(0, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return 0;
  note(start, size, kind);
  return start;
}

static void forget(void *start, int unmap) {
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < num_blocks; i++)
    if (blocks[i].start == start) {
      if (unmap) munmap(start, blocks[i].size ? blocks[i].size : 1);
      blocks[i] = blocks[--num_blocks];
      break;
    }
  pthread_mutex_unlock(&mutex);
}

static enum kind kind_of(const void *address) {
  enum kind kind = PAGEABLE;
  const char *p = address;
  pthread_mutex_lock(&mutex);
  for (int i = num_blocks - 1; i >= 0; i--)
    if (p >= blocks[i].start && p < blocks[i].start + blocks[i].size) {
      kind = blocks[i].kind;
      break;
    }
  pthread_mutex_unlock(&mutex);
  return kind;
}

cudaError_t cudaMalloc(void **p, size_t size) {
  count(ALLOCATIONS);
  *p = allocate(size, DEVICE);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *p) { if (p) forget(p, 1); OK; }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  *p = allocate(size, PINNED);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *p) { forget(p, 1); OK; }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { note(p, size, PINNED); OK; }
cudaError_t cudaHostUnregister(void *p) { forget(p, 0); OK; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = 78ull << 30;
  *total = 80ull << 30;
  OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p);

/* ---------------------------------------------------------------- copies */

static void copy(void *to, const void *from, size_t size) {
  enum kind source = kind_of(from), target = kind_of(to);
  if (source == DEVICE && target == DEVICE) {
    count(D2D);
  } else if (target == DEVICE) {
    count(source == PINNED ? H2D_PINNED : H2D_PAGEABLE);
    if (size <= COPIED_BYTES) memcpy(to, from, size);
  } else if (source == DEVICE) {
    count(target == PINNED ? D2H_PINNED : D2H_PAGEABLE);
    memcpy(to, from, size);
    /* A single number is mostly asked whether it is finite, and whether something is true: 1 or 0,
     * and four doubles are sums to divide by. */
    if (size <= 8) memset(to, size == 1, size);
    if (size == 32) for (int i = 0; i < 4; i++) ((double *)to)[i] = 1.0;
  } else {
    memcpy(to, from, size);
  }
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) { copy(to, from, size); OK; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  copy(to, from, size);
  count(DEVICE_WAITS);
  OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t size,
                                cudaStream_t stream) { count(D2D); OK; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
  count(MEMSETS);
  OK;
}
cudaError_t cudaMemset(void *p, int value, size_t size) { count(MEMSETS); OK; }

/* ---------------------------------------------------------------- devices */

static __thread int current;

static int number_from(const char *variable, int otherwise) {
  const char *text = getenv(variable);
  return text ? atoi(text) : otherwise;
}
static int num_devices(void) { return number_from("NULL_GPU_DEVICES", 1); }
static int major(void) { return number_from("NULL_GPU_MAJOR", 8); }
static int minor(void) { return major() == 7 ? 5 : 0; }

cudaError_t cudaGetDeviceCount(int *number) { *number = num_devices(); OK; }
cudaError_t cudaGetDevice(int *device) { *device = current; OK; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= num_devices()) return cudaErrorInvalidDevice;
  current = device;
  OK;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null GPU");
  p->totalGlobalMem = 80ull << 30;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 166912;
  p->sharedMemPerMultiprocessor = 167936;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = major();
  p->minor = minor();
  p->multiProcessorCount = 108;
  p->l2CacheSize = 40 << 20;
  p->textureAlignment = 512;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->managedMemory = 1;
  OK;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = major(); break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor(); break;
    case cudaDevAttrMultiProcessorCount: *value = 108; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 166912; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  enum kind kind = kind_of(p);
  memset(a, 0, sizeof *a);
  a->type = kind == DEVICE   ? cudaMemoryTypeDevice
            : kind == PINNED ? cudaMemoryTypeHost
                             : cudaMemoryTypeUnregistered;
  a->device = current;
  a->devicePointer = a->hostPointer = (void *)p;
  OK;
}
cudaError_t cudaGetLastError(void) { OK; }
cudaError_t cudaPeekAtLastError(void) { OK; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; OK; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  strncpy(id, "0000:00:00.0", size);
  OK;
}
static int primary_context_state(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
static int do_nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  int is_state = strstr(name, "PrimaryCtxGetState") != 0;
  *function = is_state ? (void *)primary_context_state : (void *)do_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  OK;
}

/* ---------------------------------------------------------------- kernels */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) { count(LAUNCHES); OK; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) { count(LAUNCHES); OK; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                void **arguments) { count(LAUNCHES); OK; }
cudaError_t __cudaGetKernel(void **kernel, const void *function) {
  *kernel = (void *)function;
  OK;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->ptxVersion = a->binaryVersion = major() * 10;
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  OK;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute a, int value) { OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *number, const void *f,
                                                                   int block, size_t shared,
                                                                   unsigned flags) {
  *number = 2;
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *number, const void *f, int block,
                                                          size_t shared) {
  *number = 2;
  OK;
}

/* ---------------------------------------------------------------- streams and events */

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { count(STREAM_WAITS); OK; }
cudaError_t cudaDeviceSynchronize(void) { count(DEVICE_WAITS); OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { count(EVENT_WAITS); OK; }

static cudaError_t create(void **handle) { *handle = malloc(512); OK; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return create((void **)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return create((void **)s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int priority) {
  return create((void **)s);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { OK; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *number) {
  if (status) *status = cudaStreamCaptureStatusNone;
  OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { OK; }

cudaError_t cudaEventCreate(cudaEvent_t *e) { return create((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return create((void **)e); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); OK; }
cudaError_t cudaEventQuery(cudaEvent_t event) { OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { OK; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 0; OK; }

/* ---------------------------------------------------------------- cuBLAS */

#define COUNTED(name) int name() { return count(BLAS); }
#define IGNORED(name) int name() { return 0; }
#define CREATED(name) int name(void **handle) { return create(handle); }
COUNTED(cublasGemmEx) COUNTED(cublasSgemm_v2) COUNTED(cublasSgemmEx) COUNTED(cublasDgemm_v2)
COUNTED(cublasGemmStridedBatchedEx) COUNTED(cublasSgemmStridedBatched)
COUNTED(cublasDgemmStridedBatched) COUNTED(cublasSgemv_v2) COUNTED(cublasSdot_v2)
COUNTED(cublasDotEx) COUNTED(cublasLtMatmul)
IGNORED(cublasDestroy_v2) IGNORED(cublasGetMathMode) IGNORED(cublasSetMathMode)
IGNORED(cublasSetStream_v2) IGNORED(cublasSetWorkspace_v2) IGNORED(cublasSetPointerMode_v2)
IGNORED(cublasGetPointerMode_v2) IGNORED(cublasSetSmCountTarget)
IGNORED(cublasLtMatmulDescDestroy) IGNORED(cublasLtMatmulDescSetAttribute)
IGNORED(cublasLtMatmulPreferenceDestroy) IGNORED(cublasLtMatmulPreferenceSetAttribute)
IGNORED(cublasLtMatrixLayoutDestroy) IGNORED(cublasLtMatrixLayoutSetAttribute)
CREATED(cublasCreate_v2) CREATED(cublasLtCreate) CREATED(cublasLtMatmulDescCreate)
CREATED(cublasLtMatmulPreferenceCreate) CREATED(cublasLtMatrixLayoutCreate)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int requested, void *results,
                                   int *found) {
  memset(results, 0, 64);
  *found = 1;
  return 0;
}

/* ---------------------------------------------------------------- NCCL: moves no data */

#undef COUNTED
#define COUNTED(name) int name() { return count(NCCL); }
COUNTED(ncclAllReduce) COUNTED(ncclBroadcast) COUNTED(ncclBcast) COUNTED(ncclAllGather)
COUNTED(ncclAlltoAll) COUNTED(ncclGather) COUNTED(ncclReduce) COUNTED(ncclReduceScatter)
COUNTED(ncclSend) COUNTED(ncclRecv) COUNTED(ncclPutSignal) COUNTED(ncclSignal)
COUNTED(ncclWaitSignal)
IGNORED(ncclGroupStart) IGNORED(ncclGroupEnd) IGNORED(ncclGroupSimulateEnd) IGNORED(ncclMemFree)
IGNORED(ncclCommDestroy) IGNORED(ncclCommAbort) IGNORED(ncclCommFinalize)
IGNORED(ncclCommRegister) IGNORED(ncclCommDeregister) IGNORED(ncclCommMemStats)
IGNORED(ncclCommResume) IGNORED(ncclCommRevoke) IGNORED(ncclCommSuspend) IGNORED(ncclCommShrink)
IGNORED(ncclCommGrow) IGNORED(ncclCommWindowRegister) IGNORED(ncclCommWindowDeregister)
IGNORED(ncclDevCommCreate) IGNORED(ncclDevCommDestroy) IGNORED(ncclRedOpDestroy)
IGNORED(ncclGetLsaMultimemDevicePointer) IGNORED(ncclGetPeerDevicePointer)
IGNORED(ncclWinGetUserPtr)
CREATED(ncclCommInitRank) CREATED(ncclCommInitRankConfig) CREATED(ncclCommInitRankScalable)
CREATED(ncclCommInitAll)
int ncclCommSplit(void *comm, int color, int key, void **split) { return create(split); }
int ncclGetVersion(int *version) { *version = 22800; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 1, 128); return 0; }
int ncclCommGetUniqueId(void *comm, void *id) { memset(id, 1, 128); return 0; }
int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }
int ncclCommCount(void *comm, int *number) { *number = 2; return 0; }
int ncclCommUserRank(void *comm, int *rank) { *rank = 0; return 0; }
int ncclRedOpCreatePreMulSum(int *operation) { *operation = 5; return 0; }
int ncclMemAlloc(void **p, size_t size) { *p = allocate(size, DEVICE); return 0; }
const char *ncclGetErrorString(int result) { return "null"; }
const char *ncclGetLastError(void *comm) { return "null"; }
