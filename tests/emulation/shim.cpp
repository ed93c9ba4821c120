// Runs the kernels of kernel.cu on the host: `launch` starts one by its name. Tests only.
#include "shim.h"

#include "kernel.cu"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstddef>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr std::size_t STACK = 32 << 10;   // bytes of a fiber's stack
enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };
enum Failure { NONE = 0, UNKNOWN_KERNEL = 1, WRONG_SIZE = 2, MISALIGNED = 3, DEADLOCK = 4 };

std::atomic<unsigned> order_seed{0};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
};

// The block that a host thread is running.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<double> lanes;
  ucontext_t scheduler;
  std::function<void()> kernel;
  unsigned current;
};
thread_local Block block;

// A fiber that is done waits for the next block's work: making it anew would cost more than it does.
void fiber_main() {
  for (;;) {
    block.kernel();
    Fiber& self = block.fibers[block.current];
    self.state = DONE;
    swapcontext(&self.context, &block.scheduler);
  }
}

void wait_in(State state) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
}

// Lets the threads [first, last) go on if all of them that are not done wait in `state`.
bool release(unsigned first, unsigned last, State state) {
  bool any = false;
  for (unsigned t = first; t < last; ++t) {
    const State is = block.fibers[t].state;
    if (is != state && is != DONE) return false;
    any |= is == state;
  }
  for (unsigned t = first; any && t < last; ++t)
    if (block.fibers[t].state == state) block.fibers[t].state = READY;
  return any;
}

bool run_block(const std::vector<unsigned>& order) {
  const unsigned threads = unsigned(order.size());
  for (Fiber& fiber : block.fibers) fiber.state = READY;
  for (;;) {
    for (unsigned t : order) {
      if (block.fibers[t].state != READY) continue;
      block.current = t;
      threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t].context);
    }
    bool go_on = false;
    for (unsigned t = 0; t < threads; t += 32)
      go_on |= release(t, std::min(t + 32, threads), AT_WARP_BARRIER);
    go_on |= release(0, threads, AT_BLOCK_BARRIER);
    if (!go_on) break;
  }
  return std::all_of(block.fibers.begin(), block.fibers.end(),
                     [](const Fiber& fiber) { return fiber.state == DONE; });
}

void make_fibers(unsigned threads) {
  if (block.fibers.size() == threads) return;
  block.fibers = std::vector<Fiber>(threads);
  block.lanes.assign(threads, 0.0);
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

std::vector<unsigned> in_some_order(unsigned count, unsigned seed) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

void* symbol(const char* name) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&in_some_order), &self)) return nullptr;
  void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

template <class Argument>
bool bind(void* function, const void* argument, std::size_t size) {
  Argument copy;
  if (size != sizeof copy) return false;
  std::memcpy(&copy, argument, size);
  const auto kernel = reinterpret_cast<void (*)(const Argument)>(function);
  block.kernel = [kernel, copy] { kernel(copy); };
  return true;
}

}  // namespace

void shim::block_barrier() { wait_in(AT_BLOCK_BARRIER); }
void shim::warp_barrier() { wait_in(AT_WARP_BARRIER); }
double* shim::lane(unsigned index) { return &block.lanes[block.current / 32 * 32 + index]; }

extern "C" {

// Blocks and threads run in ascending order with seed 0, descending with 1, else shuffled.
void set_order(unsigned seed) { order_seed = seed; }

// Runs a kernel to its end; may be called from several host threads at a time. 0 or a Failure.
int launch(const char* name, unsigned blocks, unsigned threads, const void* argument,
           std::size_t size) {
  void* function = symbol(name);
  if (!function) return UNKNOWN_KERNEL;
  const bool bound = std::string(name) == "add_partials"
                         ? bind<mpicdsgd::Partials>(function, argument, size)
                         : bind<mpicdsgd::Arguments>(function, argument, size);
  if (!bound) return WRONG_SIZE;
  std::fenv_t callers;   // a GPU does not ask the caller whether to flush subnormals
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);
  make_fibers(threads);
  const unsigned seed = order_seed;
  const std::vector<unsigned> order = in_some_order(threads, seed);
  gridDim.x = blocks, blockDim.x = threads;
  shim::misaligned = false;
  int failure = NONE;
  for (unsigned b : in_some_order(blocks, seed)) {
    blockIdx.x = b;
    if (!run_block(order)) failure = DEADLOCK;
    if (shim::misaligned) failure = MISALIGNED;
    if (failure != NONE) break;
  }
  if (failure == DEADLOCK) block.fibers.clear();   // their stacks hold what never went on
  std::fesetenv(&callers);
  return failure;
}

// Accesses to four elements at a time that this host thread has made so far.
long long wide_accesses() { return shim::wide; }

// Where kernel.cu keeps what gpu/update.py writes: "Struct.field" or "Struct" for its size, else -1.
long long layout_of(const char* what) {
  using namespace mpicdsgd;
  const std::string asked = what;
#define SIZE(STRUCT) if (asked == #STRUCT) return sizeof(STRUCT);
#define FIELD(STRUCT, NAME) if (asked == #STRUCT "." #NAME) return offsetof(STRUCT, NAME);
  SIZE(Arguments) SIZE(Partials) SIZE(Tile)
  FIELD(Arguments, out) FIELD(Arguments, z) FIELD(Arguments, at) FIELD(Arguments, v)
  FIELD(Arguments, y) FIELD(Arguments, p) FIELD(Arguments, q) FIELD(Arguments, segments)
  FIELD(Arguments, tiles) FIELD(Arguments, near) FIELD(Arguments, neighbours)
  FIELD(Arguments, weights) FIELD(Arguments, scale) FIELD(Arguments, overflow)
  FIELD(Arguments, partial) FIELD(Arguments, flags) FIELD(Arguments, weight)
  FIELD(Arguments, degree) FIELD(Arguments, aligned)
  FIELD(Partials, partial) FIELD(Partials, count) FIELD(Partials, result)
  FIELD(Tile, begin) FIELD(Tile, length) FIELD(Tile, segment)
  if (asked == "THREADS") return THREADS;
  if (asked == "MOST") return MOST;
  return -1;
}

}  // extern "C"
