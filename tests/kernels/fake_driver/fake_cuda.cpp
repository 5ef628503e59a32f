// A libcuda.so.1 for machines without a GPU, strict where a driver is merely undefined. PyCUDA runs on it unchanged.
//
// Memory is the host's, poisoned and followed by a guarded page. Work on a stream is done when somebody waits for it.
// A module is a library of kernels that were compiled for the CPU (tests/kernels/host.py): its image is "VEHOSTSO:" and
// the path. A capture records work, a launch of its graph does it. What failed on the GPU fails until it is given back.
#include <dlfcn.h>
#include <cstring>
#include "state.hpp"

#define CALL extern "C" __attribute__((visibility("default"))) int
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

// For the tests: settings, and how much of something there is.
CALL ve_fake_set(const char* name, long long value) { LOCKED; return settings.count(name) ? settings[name] = value, OK : INVALID_VALUE; }
CALL ve_fake_count(const char* name) {
  LOCKED;
  const std::string kind = name;
  if (kind == "memory") return memory.size();
  if (kind == "pinned") return pinned.size();
  if (kind == "streams") return streams.size();
  if (kind == "events") return events.size();
  if (kind == "modules") return modules.size();
  if (kind == "graphs") return graphs.size() + executables.size();
  if (kind == "contexts") return contexts + pushed;
  return settings.count(kind) ? settings[kind] : -1;
}

CALL cuInit(unsigned) { return OK; }
CALL cuDriverGetVersion(int* version) { return *version = settings["version"], OK; }
CALL cuGetErrorString(int result, const char** text) {
  static const std::map<int, const char*> texts = {
      {INVALID_VALUE, "invalid argument"}, {OUT_OF_MEMORY, "out of memory"}, {INVALID_DEVICE, "invalid device"}, {INVALID_IMAGE, "invalid image"},
      {INVALID_CONTEXT, "invalid device context"}, {NO_BINARY, "no kernel image is available for execution on the device"},
      {INVALID_HANDLE, "invalid resource handle"}, {NOT_FOUND, "named symbol not found"}, {NOT_READY, "not ready"},
      {ILLEGAL_ADDRESS, "an illegal memory access was encountered"}, {LAUNCH_FAILED, "unspecified launch failure"},
      {NOT_SUPPORTED, "not supported"}, {IN_CAPTURE, "not permitted when stream is capturing"}, {CAPTURE_INVALIDATED, "capture was invalidated"}};
  static std::string whole_text;
  auto found = texts.find(result);
  whole_text = found == texts.end() ? "unknown" : found->second;
  if (result == sticky && sticky) whole_text += ": " + reason;
  *text = whole_text.c_str();
  return OK;
}
CALL cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR", OK; }
CALL cuDeviceGetCount(int* count) { return *count = settings["devices"], OK; }
CALL cuDeviceGet(int* device, int index) { return *device = index, index < settings["devices"] ? OK : INVALID_DEVICE; }
CALL cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "Fake Orin"), OK; }
CALL cuDeviceTotalMem_v2(size_t* total, int) { return *total = settings["total"], OK; }
CALL cuDeviceComputeCapability(int* major, int* minor, int) { return *major = 8, *minor = 7, OK; }
CALL cuDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> values = {{10, 32}, {16, 16}, {38, 4 << 20}, {75, 8}, {76, 7}, {97, 163 << 10}};  // warp, SMs, L2, 8.7, shared memory
  return *value = values.count(attribute) ? values.at(attribute) : 0, OK;
}
CALL cuDevicePrimaryCtxRetain(void** context, int) { LOCKED; return ++contexts, *context = &context_object, OK; }
CALL cuDevicePrimaryCtxRelease_v2(int) { LOCKED; return contexts ? (--contexts || (sticky = 0), OK) : INVALID_CONTEXT; }
CALL cuCtxPushCurrent_v2(void*) { return contexts ? (++pushed, OK) : INVALID_CONTEXT; }
CALL cuCtxPopCurrent_v2(void** context) { return pushed ? (--pushed, *context = &context_object, OK) : INVALID_CONTEXT; }
CALL cuCtxGetCurrent(void** context) { return *context = pushed > 0 ? &context_object : nullptr, OK; }
CALL cuCtxGetDevice(int* device) { return *device = 0, pushed > 0 ? OK : INVALID_CONTEXT; }

CALL cuMemGetInfo_v2(size_t* left, size_t* total) {
  LOCKED;
  size_t used = 0;
  for (auto& range : memory) used += range.second;
  *total = settings["total"], *left = *total - used;
  return entered();
}
CALL cuMemAlloc_v2(Address* out, size_t bytes) { LOCKED; return allocate(memory, out, bytes); }
CALL cuMemFree_v2(Address address) { LOCKED; return release(memory, address); }
CALL cuMemHostAlloc(void** out, size_t bytes, unsigned) { LOCKED; return allocate(pinned, (Address*)out, bytes); }
CALL cuMemAllocHost_v2(void** out, size_t bytes) { LOCKED; return allocate(pinned, (Address*)out, bytes); }
CALL cuMemFreeHost(void* address) { LOCKED; return release(pinned, (Address)address); }

// A copy is checked when it is given, and again when it is done: its memory may be gone by then.
static int copy(void* stream, Address to, Address from, size_t bytes, std::function<bool()> allowed) {
  if (!allowed()) return INVALID_VALUE;
  return give(stream, [=] { return allowed() ? memmove((void*)to, (void*)from, bytes), OK : ILLEGAL_ADDRESS; });
}
CALL cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  LOCKED;
  return copy(stream, to, (Address)from, bytes, [=] { return within(memory, to, bytes) && is_pinned(from, bytes); });
}
CALL cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  LOCKED;
  return copy(stream, (Address)to, from, bytes, [=] { return within(memory, from, bytes) && is_pinned(to, bytes); });
}
CALL cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  LOCKED;
  return copy(stream, to, from, bytes, [=] { return within(memory, to, bytes) && within(memory, from, bytes); });
}
CALL cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
  LOCKED;
  if (!within(memory, to, bytes)) return INVALID_VALUE;
  return give(stream, [=] { return within(memory, to, bytes) ? memset((void*)to, value, bytes), OK : ILLEGAL_ADDRESS; });
}

CALL cuStreamCreate(void** stream, unsigned) {
  LOCKED;
  if (int failed = entered()) return failed;
  return streams.insert(*stream = new Stream), OK;
}
CALL cuStreamSynchronize(void* handle) {
  LOCKED;
  if (!streams.count(handle)) return INVALID_HANDLE;
  auto* stream = (Stream*)handle;
  if (stream->capture) return outside_capture();
  if (int failed = entered()) return failed;
  ++settings["waits"];
  return drain(stream, stream->given);
}
// Time passes from one question to the next: one piece of work is done.
CALL cuStreamQuery(void* handle) {
  LOCKED;
  if (!streams.count(handle)) return INVALID_HANDLE;
  auto* stream = (Stream*)handle;
  if (stream->capture) return outside_capture();
  if (int failed = entered()) return failed;
  if (int failed = drain(stream, std::min(stream->done + 1, stream->given))) return failed;
  return stream->given ? NOT_READY : OK;
}
CALL cuStreamDestroy_v2(void* stream) {
  LOCKED;
  if (!streams.count(stream)) return INVALID_HANDLE;
  drain((Stream*)stream, ((Stream*)stream)->given);
  return destroy<Stream>(streams, stream);
}
CALL cuEventCreate(void** event, unsigned) {
  LOCKED;
  if (int failed = entered()) return failed;
  return events.insert(*event = new Event), OK;
}
CALL cuEventDestroy_v2(void* event) { LOCKED; return destroy<Event>(events, event); }
CALL cuEventRecord(void* handle, void* stream) {
  LOCKED;
  auto* event = (Event*)handle;
  if (int failed = give(stream, [=] { return event->time = now(), OK; })) return failed;
  event->time = 0, event->stream = (Stream*)stream, event->index = event->stream->given;
  return OK;
}
CALL cuEventSynchronize(void* handle) { LOCKED; auto* event = (Event*)handle; return event->stream ? drain(event->stream, event->index) : OK; }
CALL cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  LOCKED;
  if (!events.count(handle)) return INVALID_HANDLE;
  auto* from = ((Event*)handle)->stream;
  const size_t upto = ((Event*)handle)->index;
  return give(stream, [=] { return streams.count(from) ? drain(from, upto) : OK; });
}
CALL cuEventElapsedTime(float* ms, void* start, void* end) {
  LOCKED;
  if (!events.count(start) || !events.count(end)) return INVALID_HANDLE;
  auto *from = (Event*)start, *to = (Event*)end;
  if (!from->stream || !to->stream) return INVALID_HANDLE;
  if (!from->time || !to->time) return sticky ? sticky : NOT_READY;
  return *ms = to->time - from->time, OK;
}

CALL cuModuleLoadDataEx(void** out, const char* image, unsigned, void*, void*) {
  LOCKED;
  if (int failed = outside_capture()) return failed;
  static const char HOST[] = "VEHOSTSO:";
  if (strncmp(image, HOST, strlen(HOST))) return strncmp(image, "\x7f" "ELF", 4) ? INVALID_IMAGE : NO_BINARY;
  void* library = dlopen(image + strlen(HOST), RTLD_NOW | RTLD_LOCAL);
  if (!library) return INVALID_IMAGE;
  return modules.insert(*out = new Module{library, {}}), OK;
}
CALL cuModuleLoadData(void** out, const char* image) { return cuModuleLoadDataEx(out, image, 0, nullptr, nullptr); }
CALL cuModuleUnload(void* handle) {
  LOCKED;
  if (!modules.count(handle)) return INVALID_HANDLE;
  auto* module = (Module*)handle;
  for (auto& entry : module->functions) destroy<Function>(functions, entry.second);
  dlclose(module->library);
  return destroy<Module>(modules, handle);
}
CALL cuModuleGetFunction(void** out, void* handle, const char* name) {
  LOCKED;
  if (!modules.count(handle)) return INVALID_HANDLE;
  auto* module = (Module*)handle;
  auto symbol = [&](const std::string& of) { return dlsym(module->library, of.c_str()); };
  auto count = (unsigned (*)(unsigned*))symbol(std::string("ve_args_") + name);
  auto run = (decltype(Function::run))symbol(std::string("ve_host_") + name);
  if (!count || !run) return NOT_FOUND;
  auto*& function = module->functions[name];
  if (!function) {
    unsigned offsets[64];
    const unsigned number = count(offsets);
    function = new Function{run, (decltype(Function::message))symbol("ve_host_message"), {offsets, offsets + number + 1}};
    functions.insert(function);
  }
  return *out = function, OK;
}
CALL cuFuncSetAttribute(void* function, int attribute, int value) {
  LOCKED;
  if (!functions.count(function)) return INVALID_HANDLE;
  if (attribute != 8 || value > 163 << 10) return INVALID_VALUE;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
  return ((Function*)function)->shared_limit = value, OK;
}
CALL cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                    void** parameters, void** extra) {
  LOCKED;
  if (!functions.count(handle)) return INVALID_HANDLE;
  auto* function = (Function*)handle;
  const char* packed = nullptr;
  size_t size = 0;
  for (; extra && *extra; extra += 2) *extra == (void*)1 ? packed = (const char*)extra[1] : (size = *(size_t*)extra[1], nullptr);
  const auto& offsets = function->offsets;
  if (parameters || !packed || size != offsets.back()) return INVALID_VALUE;
  if (!gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024 || shared > function->shared_limit) return INVALID_VALUE;
  std::vector<char> arguments(packed, packed + size);
  return give(stream, [=]() mutable -> int {
    if (!functions.count(handle)) return INVALID_HANDLE;
    ++settings["launches"];
    std::vector<void*> pointers;
    for (size_t i = 0; i + 1 < offsets.size(); ++i) pointers.push_back(arguments.data() + offsets[i]);
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    return function->run(grid, block, shared, pointers.data(), 0) ? fail(LAUNCH_FAILED, function->message()) : OK;
  });
}

CALL cuStreamBeginCapture_v2(void* handle, int) {
  LOCKED;
  if (int failed = entered()) return failed;
  if (!streams.count(handle)) return INVALID_HANDLE;
  auto* stream = (Stream*)handle;
  if (stream->capture) return IN_CAPTURE;
  return stream->capture = new Graph, ++captures, OK;
}
CALL cuStreamEndCapture(void* handle, void** out) {
  LOCKED;
  auto* stream = (Stream*)handle;
  if (!streams.count(handle) || !stream->capture) return INVALID_HANDLE;
  auto* graph = stream->capture;
  stream->capture = nullptr, --captures;
  if (graph->valid) return graphs.insert(*out = graph), OK;
  delete graph;
  return *out = nullptr, CAPTURE_INVALIDATED;
}
CALL cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
  LOCKED;
  if (!graphs.count(graph)) return INVALID_HANDLE;
  return executables.insert(*out = new Graph(*(Graph*)graph)), OK;
}
CALL cuGraphDestroy(void* graph) { LOCKED; return destroy<Graph>(graphs, graph); }
CALL cuGraphExecDestroy(void* graph) { LOCKED; return destroy<Graph>(executables, graph); }
CALL cuGraphLaunch(void* graph, void* stream) {
  LOCKED;
  if (!executables.count(graph)) return INVALID_HANDLE;
  ++settings["graph launches"];
  for (auto& work : ((Graph*)graph)->work) if (int failed = give(stream, work)) return failed;
  return OK;
}
