// What the fake driver holds, and the rules that its calls share.
#pragma once
#include <sys/mman.h>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {
enum Result { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
              NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719,
              NOT_SUPPORTED = 801, IN_CAPTURE = 900, CAPTURE_INVALIDATED = 901 };
using Address = unsigned long long;
using Work = std::function<int()>;

struct Graph { std::vector<Work> work; bool valid = true; };
struct Stream { std::vector<Work> queue; size_t given = 0, done = 0; Graph* capture = nullptr; };
struct Event { Stream* stream = nullptr; size_t index = 0; double time = 0; };
struct Function {
  int (*run)(const unsigned*, const unsigned*, size_t, void**, int);
  const char* (*message)();
  std::vector<unsigned> offsets;  // of the arguments; the last is the size of all
  unsigned shared_limit = 48 << 10;
};
struct Module { void* library; std::map<std::string, Function*> functions; };

std::recursive_mutex lock;
std::map<std::string, long long> settings = {{"version", 12060}, {"devices", 1}, {"total", 1ll << 30}, {"launches", 0}, {"graph launches", 0}, {"waits", 0}, {"allocations", 0}};
std::map<Address, size_t> memory, pinned;  // address -> bytes
std::set<void*> streams, events, modules, functions, graphs, executables;
int contexts, sticky, context_object, captures;
std::string reason;  // of `sticky`
thread_local int pushed;

const size_t PAGE = 4096;
size_t whole(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What every call on a context has to pass.
int entered() { return pushed <= 0 || !contexts ? INVALID_CONTEXT : sticky; }
// The same for what a capture in any stream does not allow; the captures are spoilt by it.
int outside_capture() {
  if (int failed = entered()) return failed;
  if (!captures) return OK;
  for (void* stream : streams) if (auto* graph = ((Stream*)stream)->capture) graph->valid = false;
  return IN_CAPTURE;
}
bool within(const std::map<Address, size_t>& ranges, Address start, size_t bytes) {
  auto after = ranges.upper_bound(start);
  if (after == ranges.begin()) return false;
  auto& [address, size] = *--after;
  return start + bytes <= address + size;
}
bool is_pinned(const void* start, size_t bytes) { return within(pinned, (Address)start, bytes); }

int fail(int result, const std::string& why) {
  if (!sticky) sticky = result, reason = why;
  return result;
}
// Do what was given to a stream, up to a number of pieces.
int drain(Stream* stream, size_t upto) {
  while (stream->done < upto && !sticky) {
    Work work = stream->queue[stream->done++];
    if (int failed = work()) fail(failed, "work on a stream failed");
  }
  if (stream->done == stream->given) stream->queue.clear(), stream->done = stream->given = 0;
  return sticky;
}
int give(void* handle, Work work) {
  if (int failed = entered()) return failed;
  if (!streams.count(handle)) return INVALID_HANDLE;  // the default stream too: nothing of ours uses it
  auto* stream = (Stream*)handle;
  if (stream->capture) return stream->capture->work.push_back(work), OK;
  stream->queue.push_back(work), ++stream->given;
  return OK;
}
[[maybe_unused]] int not_supported(const char* name) {
  fprintf(stderr, "the fake driver has no %s\n", name);
  return NOT_SUPPORTED;
}
int allocate(std::map<Address, size_t>& ranges, Address* out, size_t bytes) {
  if (int failed = outside_capture()) return failed;
  if (!bytes) return INVALID_VALUE;
  size_t used = 0;
  for (auto& range : memory) used += range.second;
  if (&ranges == &memory && used + bytes > (size_t)settings["total"]) return OUT_OF_MEMORY;
  char* base = (char*)mmap(nullptr, whole(bytes) + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return OUT_OF_MEMORY;
  memset(base, 0xFF, whole(bytes));
  mprotect(base + whole(bytes), PAGE, PROT_NONE);
  const size_t taken = (bytes + 255) / 256 * 256;  // what a driver promises is a multiple of 256
  *out = (Address)base + whole(bytes) - taken;
  ranges[*out] = bytes;
  ++settings["allocations"];
  return OK;
}
int release(std::map<Address, size_t>& ranges, Address address) {
  if (captures) return outside_capture();
  auto found = ranges.find(address);
  if (found == ranges.end()) return INVALID_VALUE;
  munmap((void*)(address / PAGE * PAGE), whole(found->second) + PAGE);
  ranges.erase(found);
  return OK;
}
template <class T> int destroy(std::set<void*>& live, void* object) {
  if (!live.erase(object)) return INVALID_HANDLE;
  delete (T*)object;
  return OK;
}
}  // namespace

