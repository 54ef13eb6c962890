// A CUDA runtime without a GPU, to be preloaded before torch's: memory is the host's, and kernels do nothing.
//
// What a driver refuses is refused: launches that no GPU takes, and in a capture whatever would wait for the GPU,
// allocate, or leave a stream unjoined. sitecustomize.py gives torch's operators their values.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t MEMORY = 80ull << 30, SHARED = 48 << 10, SHARED_OPTIN = 227 << 10;  // bytes
constexpr int PROCESSORS = 132, MAJOR = 9, MINOR = 0;

struct Block {
  size_t bytes;
  bool on_device;
};
struct Graph {
  size_t launches = 0;
};
struct Stream {
  Graph* graph = nullptr;  // while it is captured
  bool joined = true;      // into the stream where the capture began
};
struct Event {
  Graph* graph = nullptr;  // whose capture it was recorded in
  Stream* stream = nullptr;
  double seconds = 0;
};
struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::recursive_mutex mutex;
std::map<uintptr_t, Block> blocks;
std::map<const void*, std::string> names;    // of kernels
std::map<const void*, size_t> shared_limit;  // of kernels that asked for more
size_t used = 0;
Stream main_stream;
Graph* captured = nullptr;  // the graph of the one capture at a time
std::vector<Stream*> forked;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last = cudaSuccess;
thread_local std::vector<Call> calls;

cudaError_t refuse(cudaError_t error, const char* what) {
  fprintf(stderr, "emulated GPU: %s: error %d\n", what, int(error));
  return last = error;
}

cudaError_t unless_captured(const char* what) {
  bool refused = captured != nullptr && mode != cudaStreamCaptureModeRelaxed;
  return refused ? refuse(cudaErrorStreamCaptureUnsupported, what) : cudaSuccess;
}

Stream& of(cudaStream_t stream) {  // 0, 1 and 2 are names of the default stream
  return uintptr_t(stream) <= 2 ? main_stream : *reinterpret_cast<Stream*>(stream);
}

Event& of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

cudaError_t allocate(void** pointer, size_t bytes, bool on_device) {
  if (cudaError_t error = unless_captured("an allocation in a capture")) return error;
  bytes = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return refuse(cudaErrorMemoryAllocation, "mmap");
  std::lock_guard lock(mutex);
  blocks[uintptr_t(found)] = {bytes, on_device};
  used += on_device ? bytes : 0;
  *pointer = found;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  std::lock_guard lock(mutex);
  auto block = blocks.find(uintptr_t(pointer));
  if (block == blocks.end()) return refuse(cudaErrorInvalidValue, "freeing what was not allocated");
  munmap(pointer, block->second.bytes);
  used -= block->second.on_device ? block->second.bytes : 0;
  blocks.erase(block);
  return cudaSuccess;
}

const Block* block_of(const void* pointer) {
  std::lock_guard lock(mutex);
  auto after = blocks.upper_bound(uintptr_t(pointer));
  if (after == blocks.begin()) return nullptr;
  --after;
  return uintptr_t(pointer) < after->first + after->second.bytes ? &after->second : nullptr;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  std::lock_guard lock(mutex);
  size_t limit = shared_limit.count(kernel) ? shared_limit[kernel] : SHARED;
  size_t threads = size_t(block.x) * block.y * block.z;
  bool takes = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16 && threads &&
               threads <= 1024 && block.z <= 64 && shared <= limit;
  if (!takes) return refuse(cudaErrorInvalidConfiguration, names[kernel].c_str());
  if (captured != nullptr && of(stream).graph == nullptr && &of(stream) == &main_stream)
    return refuse(cudaErrorStreamCaptureImplicit, names[kernel].c_str());
  if (of(stream).graph != nullptr) of(stream).graph->launches++;
  return cudaSuccess;
}

int attribute(cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxGridDimX: return (1u << 31) - 1;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return (1 << 16) - 1;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_OPTIN;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return PROCESSORS;
    case cudaDevAttrComputeCapabilityMajor: return MAJOR;
    case cudaDevAttrComputeCapabilityMinor: return MINOR;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels: return 1;
    default: return 0;
  }
}

cudaError_t nothing() { return cudaSuccess; }

}  // namespace

// The device

API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : refuse(cudaErrorInvalidDevice, "set"); }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return *value = attribute(name), cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {};
  strcpy(found->name, "emulated");
  found->totalGlobalMem = MEMORY;
  found->major = MAJOR, found->minor = MINOR;
  found->multiProcessorCount = PROCESSORS, found->maxThreadsPerMultiProcessor = 2048;
  found->warpSize = 32, found->maxThreadsPerBlock = 1024;
  found->sharedMemPerBlock = SHARED, found->sharedMemPerBlockOptin = SHARED_OPTIN;
  found->maxGridSize[0] = (1u << 31) - 1, found->maxGridSize[1] = found->maxGridSize[2] = (1 << 16) - 1;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  return snprintf(id, size, "0000:00:00.0"), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { return unless_captured("cudaDeviceSynchronize"); }
API cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  return last = cudaSuccess, error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(cudaError_t) { return "of the emulated GPU"; }
API const char* cudaGetErrorString(cudaError_t) { return "refused by the emulated GPU, which said why on stderr"; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(nothing);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
// Of the driver, for which the linker's name of this library stands (libcuda.so.1), torch asks one thing.
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }

// Memory

API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  return *total = MEMORY, *left = MEMORY - used, cudaSuccess;
}
API cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, true); }
API cudaError_t cudaFree(void* pointer) {
  cudaError_t error = pointer == nullptr ? cudaSuccess : unless_captured("cudaFree");
  return error ? error : release(pointer);
}
API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, false); }
API cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  *found = {};
  const Block* block = block_of(pointer);
  found->type = block == nullptr   ? cudaMemoryTypeUnregistered
                : block->on_device ? cudaMemoryTypeDevice
                                   : cudaMemoryTypeHost;
  found->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  cudaError_t error = unless_captured("cudaMemcpy");
  return error ? error : (memmove(to, from, bytes), cudaSuccess);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const void* host = kind == cudaMemcpyHostToDevice ? from : to;
  if (of(stream).graph != nullptr && kind != cudaMemcpyDeviceToDevice && block_of(host) == nullptr)
    return refuse(cudaErrorStreamCaptureUnsupported, "a captured copy of pageable memory");
  return memmove(to, from, bytes), cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return memset(to, value, bytes), cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}

// Streams, events and graphs

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = reinterpret_cast<cudaStream_t>(new Stream), cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t) { return unless_captured("cudaStreamQuery"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  bool waits = of(stream).graph != nullptr || &of(stream) == &main_stream;
  return waits ? unless_captured("cudaStreamSynchronize") : cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return function(stream, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete &of(event), cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  of(event) = {of(stream).graph, &of(stream), std::chrono::duration<double>(now).count()};
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaEventQuery(cudaEvent_t) { return unless_captured("cudaEventQuery"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return unless_captured("cudaEventSynchronize"); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  return *ms = 1e3 * (of(end).seconds - of(begin).seconds), cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Stream& own = of(stream);
  bool inside = of(event).graph != nullptr && of(event).graph == captured;
  if (own.graph != nullptr && !inside && of(event).stream != nullptr)
    return refuse(cudaErrorStreamCaptureIsolation, "a capture waits for what is outside");
  if (inside && own.graph == nullptr) {
    own = {captured, false};
    forked.push_back(&own);
  }
  if (inside && of(event).stream != &own) of(event).stream->joined = true;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = of(stream).graph == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* count) {
  if (id != nullptr) *id = uintptr_t(of(stream).graph);
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(of(stream).graph);
  if (count != nullptr) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  return std::swap(mode, *other), cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (&of(stream) == &main_stream || captured != nullptr) return refuse(cudaErrorIllegalState, "a capture begins");
  return of(stream).graph = captured = new Graph, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  bool joined = std::all_of(forked.begin(), forked.end(), [](Stream* side) { return side->joined; });
  for (Stream* side : forked) *side = {};
  forked.clear();
  *graph = reinterpret_cast<cudaGraph_t>(captured);
  of(stream).graph = captured = nullptr;
  return joined ? cudaSuccess : refuse(cudaErrorStreamCaptureUnjoined, "a stream was not joined");
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* run, cudaGraph_t graph, unsigned long long) {
  return *run = reinterpret_cast<cudaGraphExec_t>(graph), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return unless_captured("cudaGraphLaunch"); }
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->launches, cudaSuccess;
}

// Kernels

API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(
    void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard lock(mutex);
  names[kernel] = name;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  return calls.push_back({grid, block, shared, stream}), 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = calls.back().grid, *block = calls.back().block, *shared = calls.back().shared;
  *static_cast<cudaStream_t*>(stream) = calls.back().stream;
  return calls.pop_back(), cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchKernel(
    const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024;
  found->ptxVersion = found->binaryVersion = 10 * MAJOR + MINOR;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (size_t(value) > SHARED_OPTIN) return refuse(cudaErrorInvalidValue, "cudaFuncSetAttribute");
  std::lock_guard lock(mutex);
  return shared_limit[kernel] = value, cudaSuccess;
}
