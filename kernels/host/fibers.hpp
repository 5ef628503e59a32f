// Runs a CUDA block on one CPU thread: every CUDA thread is a fiber, barriers and warp collectives are rendezvous.
// What goes wrong is said, not hung on: a rendezvous that can never complete, an access to a page that is guarded.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "half.hpp"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace ve_host {
enum State : uint8_t { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, DONE };
enum Result { OK = 0, DIVERGENCE = 1, FAULT = 2, BROKEN_RULE = 3 };
enum Order { FORWARD = 0, REVERSE = 1, SHUFFLED = 2 };

struct Copy {  // a cp.async on its way
  void* to;
  const void* from;
  bool pred;
  bool was_read;            // when it was asked for, not when it lands
  unsigned char bytes[16];  // that were read
};
struct Fiber {
  uint3 index;
  unsigned lane, warp, shared_reads;
  State state;
  uint8_t parity;
  bool started;
  ucontext_t context;
  jmp_buf jump;
  char* stack;
  const char* waits_in;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // committed: how many of `copies` each one ends after
};
struct Warp {
  unsigned lanes, arrived;
  const char* collective;                     // that the lanes which arrived are in
  alignas(16) unsigned char slot[2][32][64];  // what the lanes of a collective hand in, by parity
  struct {
    unsigned lanes;
    uintptr_t address[32];
  } reads[256];  // of ve_ld_shared, until all lanes are there
};

constexpr size_t STACK = 256 * 1024, PAGE = 4096;
inline struct {
  unsigned long long switches, shared_reads, bank_conflicts;
} stats;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline unsigned live, block_threads, at_barrier, barrier_line, block_number;
inline Fiber* current;
inline jmp_buf scheduler;
inline sigjmp_buf out_of_launch;
inline void (*entry)(void*);
inline void* entry_argument;
inline unsigned char* dynamic_shared;
inline size_t dynamic_bytes;
inline std::vector<std::pair<uintptr_t, size_t>> static_shared;  // of this block, as its threads come by them
inline Order order;
inline uint64_t random_state;
inline char message[256];

// Ends the launch with a message that says which thread.
[[noreturn]] inline void fail(Result result, const char* what, uintptr_t address = 0) {
  const uint3 t = current->index, b = blockIdx;
  const int end = snprintf(message, sizeof message, "%s in block (%u, %u, %u), thread (%u, %u, %u)", what, b.x, b.y,
                           b.z, t.x, t.y, t.z);
  if (address) snprintf(message + end, sizeof message - end, ", address %#llx", (unsigned long long)address);
  siglongjmp(out_of_launch, result);
}
inline void must_be_aligned(const void* p, size_t bytes) {
  if ((uintptr_t)p % bytes) fail(BROKEN_RULE, "a vector access is not aligned", (uintptr_t)p);
}
inline void must_be_shared(const void* p, size_t bytes) {
  const auto at = (uintptr_t)p;
  if (at >= (uintptr_t)dynamic_shared && at + bytes <= (uintptr_t)dynamic_shared + dynamic_bytes) return;
  for (const auto& [array, size] : static_shared)
    if (at >= array && at + bytes <= array + size) return;
  fail(BROKEN_RULE, "an atomic outside shared memory", at);
}
inline void on_signal(int, siginfo_t* info, void*) {
  fail(FAULT, "an access out of bounds, or a write to a const argument", (uintptr_t)info->si_addr);
}

inline void yield() {
  ++stats.switches;
  if (!_setjmp(current->jump)) _longjmp(scheduler, 1);
  threadIdx = current->index;
}
inline void trampoline() {
  threadIdx = current->index;
  entry(entry_argument);
  current->state = DONE;
  --live;
  _longjmp(scheduler, 1);
}
inline void release_warp(unsigned w) {
  warps[w].arrived = 0;
  for (size_t i = w * 32; i < fibers.size() && i < w * 32 + 32; ++i)
    if (fibers[i].state == WAITS_FOR_WARP) fibers[i].state = RUNS;
}
inline void release_block() {
  at_barrier = 0;
  for (auto& f : fibers)
    if (f.state == WAITS_FOR_BLOCK) f.state = RUNS;
}
// All lanes of `mask` must come, to the same collective. A lane that has left hangs no GPU, but it is a mistake.
inline void warp_barrier(unsigned mask, const char* name) {
  Warp& w = warps[current->warp];
  if (!(mask >> current->lane & 1)) fail(BROKEN_RULE, "a lane is not in the mask of its own collective");
  if (!w.arrived) w.collective = name;
  if (strcmp(w.collective, name)) fail(DIVERGENCE, "divergence: lanes of a warp meet in different collectives");
  w.arrived |= 1u << current->lane;
  if ((w.arrived & mask) == (mask & w.lanes)) return release_warp(current->warp);
  current->state = WAITS_FOR_WARP;
  current->waits_in = name;
  yield();
}
// All threads of the block must come, to the barrier of the same line.
inline void block_barrier(unsigned line) {
  if (!at_barrier) barrier_line = line;
  if (barrier_line != line) fail(DIVERGENCE, "divergence: threads of a block meet at different barriers");
  if (++at_barrier == block_threads) return release_block();
  current->state = WAITS_FOR_BLOCK;
  current->waits_in = "__syncthreads";
  yield();
}
// Hands in `mine` and gives back what all 32 lanes handed in.
inline unsigned char (*exchange(const void* mine, size_t bytes, unsigned mask, const char* name))[64] {
  Warp& w = warps[current->warp];
  const unsigned parity = current->parity;
  current->parity ^= 1;
  memcpy(w.slot[parity][current->lane], mine, bytes);
  warp_barrier(mask, name);
  return w.slot[parity];
}

inline void start_block(unsigned threads) {
  live = block_threads = threads;
  at_barrier = 0;
  ++block_number;
  static_shared.clear();
  memset(dynamic_shared, 0xFF, dynamic_bytes);  // poison: NaN as half or float
  for (auto& w : warps) {
    w.lanes = w.arrived = 0;
    memset(w.slot, 0xFF, sizeof w.slot);
    for (auto& read : w.reads) read.lanes = 0;
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    f.lane = i % 32, f.warp = i / 32, f.shared_reads = 0, f.parity = 0, f.state = RUNS, f.started = false;
    f.copies.clear(), f.groups.clear();
    warps[f.warp].lanes |= 1u << f.lane;
  }
}
inline void resume(Fiber& f) {
  current = &f;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.jump, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack + PAGE, f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
  makecontext(&f.context, (void (*)())trampoline, 0);
  setcontext(&f.context);
}
// A turn for each thread that can run; whether there was one.
inline bool give_turns(std::vector<unsigned>& group) {
  bool ran = false;
  for (size_t k = 0; k < group.size(); ++k) {
    if (order == SHUFFLED) {
      random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
      std::swap(group[k], group[k + random_state % (group.size() - k)]);
    }
    if (fibers[group[k]].state != RUNS) continue;
    ran = true;
    resume(fibers[group[k]]);
  }
  return ran;
}
// In order or in reverse, a warp runs as far ahead of the others as barriers let it; shuffled, all go together.
inline void run_block(unsigned threads) {
  start_block(threads);
  std::vector<std::vector<unsigned>> groups(order == SHUFFLED ? 1 : warps.size());
  for (unsigned i = 0; i < threads; ++i) groups[order == SHUFFLED ? 0 : i / 32].push_back(i);
  if (order == REVERSE) {
    std::reverse(groups.begin(), groups.end());
    for (auto& group : groups) std::reverse(group.begin(), group.end());
  }
  while (live) {
    bool progress = false;
    for (auto& group : groups)
      while (give_turns(group)) {
        progress = true;
        if (order == SHUFFLED) break;
      }
    if (progress) continue;
    for (auto& f : fibers)
      if (f.state != DONE) {
        current = &f;
        char what[96];
        snprintf(what, sizeof what, "divergence: %s waits for threads that never come", f.waits_in);
        fail(DIVERGENCE, what);
      }
  }
}

// Poisons an array of static shared memory for the first thread of a block that comes along.
inline void poison_once(void* array, size_t bytes, unsigned& last_block) {
  if (last_block == block_number) return;
  memset(array, 0xFF, bytes);
  static_shared.emplace_back((uintptr_t)array, bytes);
  last_block = block_number;
}

// Pages whose ends are guarded, to hold `bytes` up against the upper guard.
inline unsigned char* guarded(size_t bytes) {
  const size_t inside = (bytes + PAGE - 1) / PAGE * PAGE;
  auto* base = (unsigned char*)mmap(nullptr, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(base + PAGE, inside, PROT_READ | PROT_WRITE)) abort();
  return base;
}
inline void prepare(unsigned threads, size_t shared_bytes) {
  static unsigned char* shared_base = guarded(1 << 18);
  dynamic_bytes = (shared_bytes + 127) / 128 * 128;
  if (dynamic_bytes > 1 << 18) abort();
  dynamic_shared = shared_base + PAGE + (1 << 18) - dynamic_bytes;
  const size_t before = fibers.size();
  fibers.resize(threads > before ? threads : before);
  for (size_t i = before; i < fibers.size(); ++i) fibers[i].stack = (char*)guarded(STACK);
  warps.resize((threads + 31) / 32);
}
template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
// Runs the blocks of a grid one after another; the result is of `Result`, and `message` says more.
template <class... A>
inline int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared_bytes,
                  void** arguments, int in_order) {
  static thread_local unsigned char signal_stack[64 * 1024];
  struct Call {
    void (*kernel)(A...);
    void** arguments;
  } what{kernel, arguments};
  entry_argument = &what;
  entry = [](void* p) { call(((Call*)p)->kernel, ((Call*)p)->arguments, std::index_sequence_for<A...>{}); };
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  order = (Order)in_order, random_state = 88172645463325252ull, message[0] = 0, stats = {};
  const unsigned threads = block[0] * block[1] * block[2];
  for (auto& f : fibers) f.state = DONE;
  prepare(threads, shared_bytes);
  stack_t alternate{}, old_stack;
  alternate.ss_sp = signal_stack, alternate.ss_size = sizeof signal_stack;
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&alternate, &old_stack), sigaction(SIGSEGV, &action, &old_segv), sigaction(SIGBUS, &action, &old_bus);
  const int result = sigsetjmp(out_of_launch, 1);
  if (!result)
    for (unsigned z = 0; z < grid[2]; ++z)
      for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) blockIdx = {x, y, z}, run_block(threads);
  sigaction(SIGSEGV, &old_segv, nullptr), sigaction(SIGBUS, &old_bus, nullptr), sigaltstack(&old_stack, nullptr);
  return result;
}
// The place of every argument in a packed launch buffer, each aligned to its size; then the buffer's length.
template <class... A>
inline unsigned argument_offsets(void (*)(A...), unsigned* offsets) {
  unsigned end = 0, i = 0;
  ((end = (end + alignof(A) - 1) / alignof(A) * alignof(A), offsets[i++] = end, end += sizeof(A)), ...);
  offsets[i] = end;
  return i;
}
}  // namespace ve_host
